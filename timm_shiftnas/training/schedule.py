"""The learning rate over a run."""
from __future__ import annotations

import argparse

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

__all__ = ['Schedule']


class Schedule:
    """timm's learning rate schedule, which changes between epochs or, with --sched-on-updates, between updates.

    Args:
        args: The flags of the run.
        optimizer: The optimizer whose learning rates are set.
        updates_per_epoch: Length of an epoch.

    Attributes:
        epochs: Length of the run; the schedule adds --cooldown-epochs.

    Raises:
        ValueError: If timm refuses the settings of --sched.
    """

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> None:
        self.optimizer, self.updates_per_epoch = optimizer, updates_per_epoch
        self.on_updates = args.sched_on_updates
        try:
            self.scheduler, self.epochs = create_scheduler_v2(
                optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f'--sched {args.sched}: {error} Look at --epochs, --warmup-epochs, --decay-epochs and '
                '--lr-stable-timescale') from None

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.optimizer.param_groups[0]['lr']

    @property
    def mean_lr(self) -> float:
        """Mean learning rate of the parameter groups."""
        return sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)

    def updates(self, epoch: int, update: int = 0) -> int:
        """Number of updates from the start of the run to an update of an epoch."""
        return epoch * self.updates_per_epoch + update

    def step(self, epoch: int, update: int = 0, metric: float | None = None) -> None:
        """Set the learning rate for an epoch (update 0) or, with --sched-on-updates, for an update of it.

        Args:
            epoch: From 0.
            update: Updates of this epoch that are done.
            metric: Accuracy of the last epoch, for --sched plateau.
        """
        if self.scheduler is None:
            return
        if self.on_updates:
            self.scheduler.step_update(self.updates(epoch, update))
        elif update == 0:
            self.scheduler.step(epoch, metric)
