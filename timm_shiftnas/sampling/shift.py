"""Probability shift: the distribution over budget groups that training draws from, learned while it trains.

P = (1 - f) * softmax(theta) + f / K, with K groups and a floor f that keeps every group alive. Three signals share one
interface (see `estimators`): a score per group from a pair of batches, turned into theta here.

- 'hypergradient' scores are directions: how much held-out loss one step on a group saves. theta moves along the
  gradient of that with respect to theta, `lr * K * P_k * (s_k - sum_j P_j s_j)`, on an exponential moving average of
  the scores and in units of their noise. Advantages are soft-thresholded at 2.5 standard errors: otherwise theta is
  a random walk.
- 'grad_norm' and 'variation' scores are sizes: softmax(theta) is proportional to their moving average.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ['ProbabilityShift']

SIGNALS = ('hypergradient', 'grad_norm', 'variation', 'none')
STANDARD_ERRORS, LARGEST = 2.5, 3  # soft threshold of an advantage, and what one update counts at most


class ProbabilityShift:
    """The learned distribution over K groups.

    Args:
        num_groups: K.
        signal: 'hypergradient', 'grad_norm', 'variation', or 'none' (P stays uniform).
        lr: Step size of theta per update ('hypergradient').
        momentum: Decay of the moving averages.
        floor: f, the share of probability that is spread evenly.

    Raises:
        ValueError: If `signal` is unknown or a number is out of its range.
    """

    def __init__(self, num_groups: int, signal: str = 'hypergradient', lr: float = 0.05, momentum: float = 0.8,
                 floor: float = 0.2) -> None:
        if signal not in SIGNALS:
            raise ValueError(f'shift={signal!r} is unknown; choose one of {SIGNALS}')
        if not (lr > 0 and 0 <= momentum < 1 and 0 <= floor <= 1):
            raise ValueError(f'lr={lr} must be positive, momentum={momentum} in [0, 1), floor={floor} in [0, 1]')
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
        return (1 - self.floor) * self.theta.softmax(0) + self.floor / self.num_groups

    def observe(self, scores: Tensor) -> None:
        """Take in scores [K] without moving P: what warm-up does, so that mean and noise are known when it ends.

        Scores that are not finite (a diverging step) are left out.
        """
        scores = scores.detach().double().cpu()
        if not bool(scores.isfinite().all()):
            return
        centred = scores - scores.mean()  # what easy and hard batches do to all groups alike is no noise between them
        if self._last is not None:
            # successive batches differ by twice the variance of one
            change = float((centred - self._last).square().mean()) / 2
            self._variance = self._memory * self._variance + (1 - self._memory) * change
        self._last = centred
        self._mean = self.momentum * self._mean + (1 - self.momentum) * scores
        self._count += 1

    def update(self, scores: Tensor) -> None:
        """Take in scores [K] and shift P."""
        self.observe(scores)
        if self.signal == 'none' or not self._count:
            return
        mean = self._mean / (1 - self.momentum ** self._count)
        if self.signal != 'hypergradient':
            if float(mean.min()) > 0:
                self.theta = mean.log() - mean.log().mean()
            return
        if self._noise == 0:
            return  # one batch alone tells no noise
        p = self.probabilities
        advantage = (mean - (p * mean).sum()) / self._noise
        beta, power = self.momentum, self.momentum ** self._count
        error = math.sqrt((1 - beta) * (1 + power) / ((1 + beta) * (1 - power)))  # of the mean, in units of one score's
        threshold = STANDARD_ERRORS * error
        advantage = advantage.sign() * (advantage.abs() - threshold).clamp(0, LARGEST)
        self.theta = self.theta + self.lr * p * self.num_groups * advantage
        self.theta = self.theta - self.theta.mean()

    @property
    def _noise(self) -> float:
        """Standard deviation of a score from batch to batch, beside what all groups share."""
        return math.sqrt(self._variance / (1 - self._memory ** (self._count - 1))) if self._count > 1 else 0.

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return dict(
            signal=self.signal, theta=self.theta, mean=self._mean, variance=self._variance, last=self._last, count=self._count)

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
