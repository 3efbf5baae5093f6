"""The progress of an epoch on the terminal and in trackers."""
from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from huggingface_hub.utils import tqdm

from .checkpoints import Position
from .tracking import Tracker

__all__ = ['Progress']

_logger = logging.getLogger('train')


class Progress:
    """Loss, learning rate, speed and time left: a bar on a terminal, otherwise a line every `interval` batches.

    Args:
        title: Of the epoch.
        start: Where the epoch starts or resumes.
        total: Batches of the epoch.
        interval: Batches between two lines.
        processes: Number of processes that train together.
        tracker: Gets the figures of every line; processes without one show nothing.
    """

    def __init__(self, title: str, start: Position, total: int, interval: int, processes: int,
                 tracker: Tracker | None) -> None:
        self.title, self.start, self.total, self.interval = title, start, total, interval
        self.processes, self.tracker = processes, tracker
        self.started = time.monotonic()
        self.bar = tqdm(
            desc=title, unit='batch', leave=False, dynamic_ncols=True, initial=start.batch, total=total,
        ) if tracker is not None and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, position: Position, update: int, lr: float) -> None:
        """Show how far the epoch has come.

        Args:
            position: The current position.
            update: Updates since the start of the run.
            lr: Learning rate.
        """
        if self.bar is not None:
            self.bar.set_postfix(loss=f'{position.mean_loss:.3f}', lr=f'{lr:.2e}', refresh=False)
            self.bar.update(position.batch - self.bar.n)
        if self.tracker is None or position.batch % self.interval and position.batch < self.total:
            return
        elapsed = time.monotonic() - self.started
        rate = (position.count - self.start.count) * self.processes / elapsed
        left = (self.total - position.batch) * elapsed / (position.batch - self.start.batch)
        if self.bar is None:
            _logger.info(
                f'{self.title}  batch {position.batch}/{self.total}  loss {position.mean_loss:.3f}  lr {lr:.2e}  '
                f'{rate:.0f} images/s  {left:.0f} s left in the epoch')
        self.tracker.log(update, {'train/loss': position.mean_loss, 'lr': lr, 'train/images_per_second': rate})
