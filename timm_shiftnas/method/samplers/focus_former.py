"""FocusFormer (Liu et al., 2022, arXiv 2208.10861): a sampler that learns which archs are on the Pareto front.

For every resource constraint, the architecture sampler gives more probability to the archs that are best under it.
Training draws from the sampler, and after training the sampler proposes the arch for a constraint.

The public sources (abstract and introduction) state only this. They do not say how the sampler is built, its reward,
its baseline, or how often it learns; there is no published code. This file trains such a sampler in the common way:

* It is the LSTM of `ArchitectureGenerator`, which maps a budget b to a distribution p(arch | b). It starts fitted to
  budgets alone. Budgets are drawn evenly over the groups.
* Every `generator_interval` updates it takes a step of REINFORCE (Williams, 1992) on k archs drawn for one budget:

      L = - 1/k * sum_i a_i * log p(arch_i | b) + lambda * L_resource,   a_i = (mean_j l_j - l_i) / std_j l_j

  l_i is the loss of arch i on images of the batch. The reward is only compared within one budget, so the largest archs
  have no advantage. L_resource, the squared distance from budgets of ShiftNAS, keeps the archs at their constraint.
"""
from __future__ import annotations

import torch

from ...space.core import Arch
from ...utils.streams import stream
from .base import Sampler, Step

__all__ = ['FocusFormerSampler']


class FocusFormerSampler(Sampler):
    """Draws even budgets and archs from the generator, which learns by policy gradients."""

    def draw(self, step: Step, count: int) -> list[Arch]:
        noise = stream(self.config.seed, 'arch', step.micro_step)
        return self.generator.sample(self.groups.draw(self.shift.probabilities, count, noise), noise)

    def update(self, step: Step) -> None:
        """Take the step of the sampler that is due before this update."""
        config, generator = self.config, self.generator
        if not config.generator_interval or step.update % config.generator_interval:
            return
        noise = stream(config.seed, 'generator', step.update)
        budgets = self.groups.draw(self.shift.probabilities, 1, noise).expand(config.sampler_candidates)
        with torch.no_grad():
            indices = generator(budgets, noise=noise).indices
        archs = [self.space.decode(row) for row in indices.tolist()]
        losses = step.losses(archs, self.images_of_generator(step))
        advantages = (losses.mean() - losses) / losses.std().clamp(min=1e-12)
        spread = self.groups.spread(config.resource_batch, noise)
        with torch.enable_grad():
            log_probs = generator.log_prob(budgets, indices)
            resource = generator.resource_loss(spread, generator(spread, noise=noise).one_hots)
            loss = config.resource_weight * resource - (advantages * log_probs).mean()
            self.step_generator(loss, step.ranks)
