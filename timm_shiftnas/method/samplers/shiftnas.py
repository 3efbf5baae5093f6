"""ShiftNAS (Zhang et al., ICCV 2023, arXiv 2307.08300): a budget from the learned P, an arch from the generator.

A step draws a budget group k ~ P, a budget uniform in it, and an arch from the generator. Every `generator_interval`
updates the generator takes a step on `generator_loss`, and every `shift_interval` updates P shifts by its signal.
"""
from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from torch import Tensor

from ...space.core import Arch
from ...space.matrix_mapping import arch_masks
from ...utils.streams import stream
from ..config import default_interval
from ..generator import generator_loss
from ..signals import frozen, full_precision
from .base import Batch, Sampler, ShiftBatches, Step
from .uniform import draw_uniform

__all__ = ['ShiftNASSampler']

DRAW_AHEAD = 10  # updates whose archs are drawn at once from a generator that does not change


class ShiftNASSampler(Sampler):
    """Draws budgets from P and archs from the generator, and trains both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.archs: deque[Arch] = deque()  # drawn ahead
        self.shift_interval = self.config.shift_interval or default_interval(len(self.groups))

    @property
    def shift_signal(self) -> str:
        return self.config.shift

    # -- drawing archs -------------------------------------------------------------------------------------------------

    def draw(self, step: Step, count: int) -> list[Arch]:
        if step.update < self.config.warmup_updates and self.config.warmup_sampler == 'uniform':
            self.archs.clear()
            return draw_uniform(self.space, self.config.seed, step, count)
        if not self.archs:
            self._draw_ahead(step, count)
        return [self.archs.popleft() for _ in range(count)]

    def _draw_ahead(self, step: Step, count: int) -> None:
        """Draw all archs up to the next step of the generator at once, `count` for each micro-batch."""
        config = self.config
        noise = stream(config.seed, 'arch', step.micro_step)
        total = (config.generator_interval or DRAW_AHEAD) * (config.accum_steps or 1) * count
        lowest = self.groups.lowest_budget(step.update, config.curriculum_updates)
        budgets = self.groups.draw(self.shift.probabilities, total, noise, lowest)
        self.archs.extend(self.generator.sample(budgets, noise))

    # -- learning to draw them -----------------------------------------------------------------------------------------

    def update(self, step: Step) -> None:
        """Take the steps of the generator and the shift that are due before this update."""
        if self.config.generator_interval and step.update % self.config.generator_interval == 0:
            self.update_generator(step)
            self.archs.clear()
        if self.shift_is_due(step.update):
            self.update_shift(step)
            self.archs.clear()

    def shift_is_due(self, update: int) -> bool:
        return self.shift.signal != 'none' and update > 0 and update % self.shift_interval == 0

    def update_generator(self, step: Step) -> None:
        """Take a step on `generator_loss`; only the generator gets gradients."""
        config, generator, ranks = self.config, self.generator, step.ranks
        part = slice(self.images_of_generator(step))
        noise = stream(config.seed, 'generator', step.update)
        spread = self.groups.spread(config.resource_batch, noise)
        lowest = self.groups.lowest_budget(step.update, config.curriculum_updates)
        drawn = self.groups.draw(self.shift.probabilities, 1, noise, lowest)
        budgets = torch.cat([drawn, spread])
        with torch.enable_grad():
            rollout = generator(budgets, noise=noise, tau=self._tau(step.update))
            masks = arch_masks(self.space, [one_hot[0].to(step.images.device) for one_hot in rollout.one_hots])
            resource = generator.resource_loss(budgets, rollout.one_hots)
            with frozen(step.net), full_precision(step.device):  # without autocast, float16 needs no loss scaling
                task_loss = step.criterion(step.net(step.images[part], masks), step.targets[part])
                loss = generator_loss(task_loss.cpu(), resource, config.resource_weight)
                self.step_generator(loss, ranks)  # backward needs the running statistics as they are inside `frozen`

    def _tau(self, update: int) -> float:
        """Gumbel temperature at an update: linear from the first to the last."""
        first, last = self.config.tau
        return first + (last - first) * min(update / self.config.total_updates, 1.)

    def update_shift(self, step: Step) -> None:
        """Take in the scores of the groups, and shift P after warm-up and curriculum."""
        scores = self.shift_scores(step)
        if step.update < max(self.config.warmup_updates, self.config.curriculum_updates):
            self.shift.observe(scores)
        else:
            self.shift.update(scores)
        self.history.append((step.update, self.shift.probabilities.tolist()))

    def shift_scores(self, step: Step) -> Tensor:
        """The signal of every group, [K]: at the proposed arch for its upper edge, on the batches of this shift."""
        archs = self.generator.propose_many(self.groups.budgets)
        train, held_out = cast(ShiftBatches, self.shift_batches)(step.update // self.shift_interval)

        def loss(arch: Arch, batch: Batch) -> Tensor:
            images, targets = (tensor.to(step.device, non_blocking=True) for tensor in batch)
            return step.held_out_loss(step.net(images, arch), targets)

        with frozen(step.net), full_precision(step.device), torch.enable_grad():
            return self.signal(step.net, loss, archs, train, held_out, step.ranks)

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return dict(super().state_dict(), archs=[arch.to_dict() for arch in self.archs])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.archs = deque(self.space.from_dict(arch) for arch in state['archs'])
