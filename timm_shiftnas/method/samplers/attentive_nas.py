"""AttentiveNAS (Wang et al., CVPR 2021, arXiv 2011.09011): the best, or the worst, of k archs near a drawn budget.

A step draws a target MACs tau from the distribution that uniform sampling has, and k archs near it. Training takes the
one of smallest loss (best-up: towards the Pareto front) or of largest loss (worst-up: the worst archs are trained).

As in the authors' published training (github.com/facebookresearch/AttentiveNAS):

* MACs are rounded to bins. The distribution of bins, and for every bin the frequency of each value of each choice, are
  those of many uniformly drawn archs. Given a bin, the choices are drawn independently with these frequencies, again
  and again until an arch lies in the bin; after enough trials, any arch is accepted.
* The k archs are compared by their loss on the current mini-batch, with k = 3 ('BestUp-3 (loss)' in their
  configuration). The paper also has a predictor of accuracy, fitted on archs of a trained supernet. It is left out: it
  needs a supernet that is already trained, and the published supernet was trained without it.

Their bins are 25 MMACs wide, for ImageNet; here the range of a space has 32 bins. Their training also follows the
sandwich rule with in-place distillation, which are separate flags here.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...space.core import Arch
from ...utils.streams import stream
from .base import Sampler, Step

__all__ = ['AttentiveNASSampler', 'BestUpSampler', 'WorstUpSampler']

BINS, OBSERVED, TRIALS = 32, 4096, 32  # bins of MACs; uniform archs behind their frequencies; trials for each arch


class AttentiveNASSampler(Sampler):
    """Draws k archs near a budget, and takes one of them by the loss on the mini-batch."""
    searches = True
    best: bool  # best-up or worst-up

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choices = self.generator.choices
        observed = self.draw_uniform_indices(stream(self.config.seed, 'attentivenas', 0))
        bins = self.bins(self.choices.count(observed, self.groups.resource))
        self.target_frequency = torch.bincount(bins, minlength=BINS).double()  # [bins]
        # frequencies of values by bin, [bins, choices, values]; a choice counts where it is active
        self.value_frequency = torch.zeros(BINS, len(self.choices), self.choices.most, dtype=torch.float64)
        rows, columns = torch.nonzero(self.choices.active(observed)).unbind(1)
        where = bins[rows], columns, observed[rows, columns]
        self.value_frequency.index_put_(where, torch.ones(len(rows), dtype=torch.float64), accumulate=True)
        self.value_frequency[..., 0] += self.value_frequency.sum(-1) == 0  # never active there: any value will do

    def draw_uniform_indices(self, noise: torch.Generator) -> Tensor:
        """Choice indices of uniformly drawn archs, as `SearchSpace.sample` draws them: int64 [archs, choices]."""
        counts = (~self.choices.is_padding).sum(1)
        drawn = (torch.rand(OBSERVED, len(counts), generator=noise, dtype=torch.float64) * counts).long()
        return drawn * self.choices.active(drawn)

    def bins(self, counts: Tensor) -> Tensor:
        """The bin of MACs, or of another resource: int64, 0 to 31."""
        low, high = self.groups.edges[0], self.groups.edges[-1]
        return ((counts - low) / (high - low or 1) * BINS).long().clamp(0, BINS - 1)

    def draw(self, step: Step, count: int) -> list[Arch]:
        noise = stream(self.config.seed, 'arch', step.micro_step)
        archs = []
        for _ in range(count):
            candidates = self.candidates(noise)
            losses = step.losses(candidates)
            archs.append(candidates[int(losses.argmin() if self.best else losses.argmax())])
        return archs

    def candidates(self, noise: torch.Generator) -> list[Arch]:
        """Draw a target and k archs: those in its bin first, then others if too few trials were in the bin."""
        count = self.config.sampler_candidates
        target = torch.multinomial(self.target_frequency, 1, generator=noise)
        drawn = torch.multinomial(
            self.value_frequency[int(target)], TRIALS * count, replacement=True, generator=noise).T  # [trials, choices]
        drawn = drawn * self.choices.active(drawn)
        outside = self.bins(self.choices.count(drawn, self.groups.resource)) != target
        return [self.space.decode(drawn[row].tolist()) for row in outside.int().argsort(stable=True)[:count].tolist()]


class BestUpSampler(AttentiveNASSampler):
    """Takes the arch of smallest loss."""
    best = True


class WorstUpSampler(AttentiveNASSampler):
    """Takes the arch of largest loss."""
    best = False
