"""Probability shift: the distribution over budget groups that training draws from, learned while it trains.

P = (1 - f) * softmax(theta) + f / K, with K groups and a floor f that keeps every group alive. Three signals share one
interface (see `estimators`): a score per group from a pair of batches, turned into theta here.

- 'hypergradient' scores are directions: how much held-out loss one step on a group saves. theta follows the advantage
  of a group over the mean under P, in units of the noise between groups: mirror descent on the held-out loss after one
  step plus the divergence of P from uniform, whose fixed point is P proportional to exp(advantage / noise). Noise alone
  leaves P near uniform, where a step of fixed size, as Adam's, would be a random walk.
- 'grad_norm' and 'variation' scores are sizes: softmax(theta) is proportional to their moving average.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ['ProbabilityShift']

SIGNALS = ('hypergradient', 'grad_norm', 'variation', 'none')
LARGEST = 3.  # what one advantage counts at most, in units of the noise


class ProbabilityShift:
    """The learned distribution over K groups.

    Args:
        num_groups: K.
        signal: 'hypergradient', 'grad_norm', 'variation', or 'none' (P stays uniform).
        lr: Share of the way to its target that theta goes per update ('hypergradient').
        momentum: Decay of the moving averages of sizes, and (its fourth root) of the noise.
        floor: f, the share of probability that is spread evenly.
        weights: With 'none', P is proportional to these [K], for good.

    Raises:
        ValueError: If `signal` is unknown, a number is out of its range or the weights are not K numbers, none negative
            and not all 0.
    """

    def __init__(self, num_groups: int, signal: str = 'hypergradient', lr: float = 0.01, momentum: float = 0.8,
                 floor: float = 0.2, weights: Sequence[float] | None = None) -> None:
        if signal not in SIGNALS:
            raise ValueError(f'shift={signal!r} is unknown; choose one of {SIGNALS}')
        if not (0 < lr <= 1 and 0 <= momentum < 1 and 0 <= floor <= 1):
            raise ValueError(f'lr={lr} must be in (0, 1], momentum={momentum} in [0, 1), floor={floor} in [0, 1]')
        if weights is not None and not (
                len(weights) == num_groups and all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise ValueError(
                f'the group weights {list(weights)} must be {num_groups} numbers, none negative and not all 0')
        self._fixed = None if weights is None else torch.tensor(weights, dtype=torch.float64) / sum(weights)
        self.num_groups, self.signal, self.lr, self.momentum, self.floor = num_groups, signal, lr, momentum, floor
        self.theta = torch.zeros(num_groups, dtype=torch.float64)
        self._mean = torch.zeros(num_groups, dtype=torch.float64)  # moving averages, biased towards zero at first
        self._variance = 0.
        self._memory = momentum ** .25  # noise is known better from a longer past, and changes slowly
        self._last: Tensor | None = None
        self._count = 0

    @property
    def probabilities(self) -> Tensor:
        """P, float64 [K]."""
        if self._fixed is not None:
            return self._fixed
        return (1 - self.floor) * self.theta.softmax(0) + self.floor / self.num_groups

    def observe(self, scores: Tensor) -> bool:
        """Take in scores [K] without moving P: what warm-up does, so that the noise is known when it ends.

        Returns:
            False if the scores are not all finite (of a diverging step), and were left out.
        """
        scores = scores.detach().double().cpu()
        if not bool(scores.isfinite().all()):
            return False
        centred = scores - scores.mean()  # what easy and hard batches do to all groups alike is no noise between them
        if self._last is not None:
            # successive batches differ by twice the variance of one
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
        if self.signal != 'hypergradient':
            mean = self._mean / (1 - self.momentum ** self._count)
            if float(mean.min()) > 0:
                self.theta = mean.log() - mean.log().mean()
        elif self._noise > 0:  # one batch alone tells no noise
            scores = scores.detach().double().cpu()
            advantage = (scores - (self.probabilities * scores).sum()) / self._noise
            self.theta = torch.lerp(self.theta, advantage.clamp(-LARGEST, LARGEST), self.lr)

    @property
    def _noise(self) -> float:
        """Standard deviation of a score from batch to batch, beside what all groups share."""
        return math.sqrt(self._variance / (1 - self._memory ** (self._count - 1))) if self._count > 1 else 0.

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return dict(
            signal=self.signal, theta=self.theta, mean=self._mean, variance=self._variance,
            last=self._last, count=self._count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: If the state is of another number of groups or another signal.
        """
        if len(state['theta']) != self.num_groups or state['signal'] != self.signal:
            raise ValueError(
                f'the saved shift has {len(state["theta"])} groups and signal {state["signal"]!r}, this one has '
                f'{self.num_groups} and {self.signal!r}; resume with the same flags')
        self.theta, self._mean, self._last = state['theta'], state['mean'], state['last']
        self._variance, self._count = state['variance'], state['count']
