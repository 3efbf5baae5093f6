"""Probability shift: the distribution P over budget groups that training samples from, learned during training.

A signal (see `signals`) gives a score for each group; a shift turns the scores into theta, and theta into P.

* 'hypergradient' scores are directions: how much one step on a group lowers the held-out loss. `shift_step` moves theta
  towards the advantage of a group over the mean under P, in units of the noise of the scores. This is mirror descent on
  the held-out loss after one step plus the divergence of P from uniform; its fixed point is P proportional to
  exp(advantage / noise). Scores that are pure noise leave P near uniform, whereas steps of a fixed size, as Adam's,
  would make theta a random walk.
* 'grad_norm' and 'variation' scores are sizes: `proportional_theta` makes softmax(theta) proportional to their moving
  average.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ShiftNASConfig

__all__ = ['ProbabilityShift', 'group_probabilities', 'proportional_theta', 'shift_step']

LARGEST = 3.  # bound of an advantage, in units of the noise


def group_probabilities(theta: Tensor, floor: float) -> Tensor:
    """P over K groups: `P_k = (1 - f) * softmax(theta)_k + f / K`.

    Args:
        theta: Logits, [K].
        floor: f, the share that is spread evenly, so that every group is trained.
    """
    return (1 - floor) * theta.softmax(0) + floor / len(theta)


def shift_step(theta: Tensor, probabilities: Tensor, scores: Tensor, noise: float, lr: float) -> Tensor:
    """theta after a shift by the hypergradient: a step of length lr towards the advantages of the groups.

    `theta_k <- theta_k + lr * (a_k - theta_k)` with the advantage `a_k = clamp((s_k - sum_j P_j s_j) / sigma, -3, 3)`.

    Args:
        theta: Logits, [K].
        probabilities: P, [K].
        scores: s, [K]; larger scores for groups whose training lowers the held-out loss more.
        noise: sigma, the standard deviation of a score from batch to batch.
        lr: Step length, 0 to 1.
    """
    advantage = (scores - (probabilities * scores).sum()) / noise
    return torch.lerp(theta, advantage.clamp(-LARGEST, LARGEST), lr)


def proportional_theta(sizes: Tensor) -> Tensor:
    """theta for which softmax(theta) is proportional to positive sizes m: `theta_k = log m_k - mean_j log m_j`; [K]."""
    return sizes.log() - sizes.log().mean()


class ProbabilityShift:
    """The learned distribution over K groups.

    Args:
        num_groups: K.
        signal: 'hypergradient', 'grad_norm', 'variation', or 'none' (P stays uniform).
        lr: Step length of theta ('hypergradient').
        momentum: Decay of the moving average of the sizes. The average of the noise decays more slowly: by the fourth
            root of this number.
        floor: f, the share of P that is spread evenly.
        weights: With 'none', fix P proportional to these numbers, [K].

    Raises:
        ValueError: If an argument is out of range, or the weights are not K numbers with a positive sum.
    """

    def __init__(self, num_groups: int, signal: str = 'hypergradient', lr: float = 0.01, momentum: float = 0.8,
                 floor: float = 0.2, weights: Sequence[float] | None = None) -> None:
        ShiftNASConfig(  # raises for values out of range
            shift=signal, shift_lr=lr, shift_momentum=momentum, shift_floor=floor,
            group_weights=None if weights is None else tuple(weights))
        if weights is not None and (len(weights) != num_groups or sum(weights) == 0):
            raise ValueError(f'the group weights {list(weights)} must be {num_groups} numbers, not all 0')
        self._fixed = None if weights is None else torch.tensor(weights, dtype=torch.float64) / sum(weights)
        self.num_groups, self.signal, self.lr, self.momentum, self.floor = num_groups, signal, lr, momentum, floor
        self.theta = torch.zeros(num_groups, dtype=torch.float64)
        self._mean = torch.zeros(num_groups, dtype=torch.float64)  # moving averages, biased towards zero at first
        self._variance = 0.
        self._memory = momentum ** .25  # the noise changes slowly, and a longer past gives a better estimate
        self._last: Tensor | None = None
        self._count = 0

    @property
    def probabilities(self) -> Tensor:
        """P, float64 [K]."""
        return group_probabilities(self.theta, self.floor) if self._fixed is None else self._fixed

    def observe(self, scores: Tensor) -> bool:
        """Take in scores [K] without moving P, as during warm-up, so that the noise is known when the warm-up ends.

        Returns:
            False if a score is not finite (the step diverged); the scores are then ignored.
        """
        scores = scores.detach().double().cpu()
        if not bool(scores.isfinite().all()):
            return False
        # Subtract the mean: a hard batch raises all groups alike, which is not noise between groups.
        centred = scores - scores.mean()
        if self._last is not None:
            # The difference of two batches has twice the variance of one.
            change = float((centred - self._last).square().mean()) / 2
            self._variance = self._memory * self._variance + (1 - self._memory) * change
        self._last = centred
        self._mean = self.momentum * self._mean + (1 - self.momentum) * scores
        self._count += 1
        return True

    def update(self, scores: Tensor) -> None:
        """Take in scores [K] and shift P."""
        if self.signal == 'none' or not self.observe(scores):
            return
        if self.signal == 'hypergradient':
            if self._noise > 0:  # unknown after a single batch
                scores = scores.detach().double().cpu()
                self.theta = shift_step(self.theta, self.probabilities, scores, self._noise, self.lr)
        else:
            sizes = self._mean / (1 - self.momentum ** self._count)
            if float(sizes.min()) > 0:
                self.theta = proportional_theta(sizes)

    @property
    def _noise(self) -> float:
        """Standard deviation of a score from batch to batch, without what all groups have in common."""
        return math.sqrt(self._variance / (1 - self._memory ** (self._count - 1))) if self._count > 1 else 0.

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        return dict(
            signal=self.signal, theta=self.theta, mean=self._mean, variance=self._variance,
            last=self._last, count=self._count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If the state has another number of groups or another signal.
        """
        if len(state['theta']) != self.num_groups or state['signal'] != self.signal:
            raise ValueError(
                f'the saved shift has {len(state["theta"])} groups and signal {state["signal"]!r}, this one has '
                f'{self.num_groups} and {self.signal!r}; resume with the same flags')
        self.theta, self._mean, self._last = state['theta'], state['mean'], state['last']
        self._variance, self._count = state['variance'], state['count']
