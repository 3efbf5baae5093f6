"""One update of the weights."""
from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from .checkpoints import Checkpoints
from .interrupts import Interrupts
from .setup import Run

__all__ = ['Update']

_logger = logging.getLogger('train')
MIN_LOSS_SCALE = 2. ** -14  # in float16; the scale starts at 2 ** 16, and every update that overflows halves it


class Update:
    """Backward passes over the micro-batches of an update, then the step of the optimizer.

    An update with a loss or a gradient that is not finite, in any process, is skipped by all processes.

    Args:
        run: Task, optimizer, schedule, precision.
        interrupts: Whether SIGTERM was received; processes agree to stop after the same update.
        checkpoints: Named in errors; only the first process has them.

    Attributes:
        skipped: Updates skipped in a row.
    """

    def __init__(self, run: Run, interrupts: Interrupts, checkpoints: Checkpoints | None) -> None:
        self.args, self.ranks, self.net, self.task = run.args, run.ranks, run.net, run.task
        self.optimizer, self.schedule = run.optimizer, run.schedule
        self.autocast, self.scaler = run.autocast, run.scaler
        self.interrupts, self.checkpoints = interrupts, checkpoints
        self.skipped = 0

    def __call__(
            self,
            micro_batches: Iterable[tuple[Tensor, Tensor]],
            count: int,
            epoch: int,
            update: int,
    ) -> list[float]:
        """Train on (images, targets).

        Args:
            micro_batches: The micro-batches of this update.
            count: Their number.
            epoch: From 0.
            update: Number of the update in the epoch, from 1.

        Returns:
            Loss of each micro-batch, the mean over all processes; nothing if the update was skipped.
        """
        losses = []
        for number, (images, targets) in enumerate(micro_batches, 1):
            with nullcontext() if number == count else self.task.no_sync():
                with self.autocast():
                    loss = self.task(images, targets)['loss']
                self.scaled(loss / count).backward()
            losses.append(loss.detach())
        return self.step(torch.stack(losses), epoch, update)

    def step(self, losses: Tensor, epoch: int, update: int) -> list[float]:
        """Step with the gradients that the micro-batches have accumulated.

        Args:
            losses: Loss of each micro-batch.
            epoch, update: As in `__call__`.

        Returns:
            As `__call__`.
        """
        finite, means = self.vote(losses)
        self.task.end_update()
        if finite:
            self.skipped = 0
            self.clip_gradients()
            self.step_optimizer()
            self.task.update_ema(step=self.schedule.updates(epoch, update))
        else:
            self.skip_update(means, epoch, update)
        self.optimizer.zero_grad()
        self.schedule.step(epoch, update)
        return means if finite else []

    def vote(self, losses: Tensor) -> tuple[bool, list[float]]:
        """Agree with the other processes whether to step, and whether to stop after this update.

        Returns:
            Whether losses and gradients are finite everywhere, and the mean losses over the processes.
        """
        finite = losses.isfinite().all()
        if self.scaler is None:  # otherwise the loss scaler looks at the gradients
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            finite &= torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        votes = torch.cat(
            [torch.stack([~finite, torch.full_like(finite, self.interrupts.received)]), losses]).float()
        self.ranks.sum_([votes])
        not_finite, stopping, *sums = votes.tolist()  # without a loss scaler, the only wait for the device
        self.interrupts.stopping = bool(stopping)
        return not not_finite, [value / self.ranks.size for value in sums]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale of float16."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def clip_gradients(self) -> None:
        """Clip the gradients as --clip-grad and --clip-mode say."""
        if self.args.clip_grad is None:
            return
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = self.task.get_clip_parameters(exclude_head='agc' in self.args.clip_mode)
        dispatch_clip_grad(parameters, value=self.args.clip_grad, mode=self.args.clip_mode)

    def step_optimizer(self) -> None:
        """Take a step, which the loss scaler skips if gradients overflow.

        Raises:
            ValueError: If gradients overflow at every scale of the loss.
        """
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise ValueError(
                'no scale of the loss gives finite gradients in float16; train with --amp-dtype bfloat16 or lower --lr')

    def skip_update(self, losses: list[float], epoch: int, update: int) -> None:
        """Count an update that is not finite; the weights stay as they are.

        Raises:
            ValueError: If more updates in a row are not finite than --skip-nonfinite allows.
        """
        self.skipped += 1
        wrong = [loss for loss in losses if not math.isfinite(loss)]
        cause = f'the loss {wrong[0]}' if wrong else 'a gradient'
        place = f'update {update} of epoch {epoch + 1}'
        if self.skipped > self.args.skip_nonfinite:
            newest = self.checkpoints and self.checkpoints.newest()
            kept = f'; {newest} is from before' if newest else ''
            raise ValueError(
                f'{cause} in {place} is not finite{kept}; lower --lr, clip with --clip-grad 1, or skip up to 10 such '
                'updates in a row with --skip-nonfinite 10')
        _logger.warning(f'skipped {place}: {cause} is not finite ({self.skipped} in a row)')
