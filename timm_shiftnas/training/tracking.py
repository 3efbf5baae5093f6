"""Metrics for TensorBoard and Weights & Biases."""
from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.files import name_disk_errors
from ..utils.text import one_line

__all__ = ['Tracker']

_logger = logging.getLogger('train')
MIN_FREE = 2 ** 20  # bytes; with less free space, no other event file is opened, because each attempt leaves one behind


class Tracker:
    """Writes metrics to TensorBoard (event files in the folder of the run), to Weights & Biases, to both or to none.

    Logging failures never stop training. On a full disk, metrics are dropped and one error is logged; a new event file
    is opened once the disk has room, or once a removed folder exists again.

    Args:
        folder: The folder of the run; its name is the name of the run.
        config: The flags of the run.
        tensorboard, wandb: Where to write.
        project, tags, resume_id: Arguments of `wandb.init`; the id is that of a run to resume.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If Weights & Biases refuses the run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, tensorboard: bool = False, wandb: bool = False,
                 project: str | None = None, tags: Sequence[str] = (), resume_id: str = '') -> None:
        self._folder, self._events, self._run = folder, None, None
        self._failed = False
        self._summary_writer: Any = None
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            if wandb:
                import wandb as client
        except ImportError as error:
            flag = '--log-wandb' if 'wandb' in str(error) else '--log-tensorboard'
            raise ImportError(f"{flag}: run pip install 'timm_shiftnas[tracking]'") from error
        self._thread_hook = threading.excepthook
        if tensorboard:
            self._summary_writer, threading.excepthook = SummaryWriter, self._handle_thread_error
        if wandb:
            try:
                self._run = client.init(
                    project=project, name=folder.name, dir=str(folder), config=dict(config), tags=list(tags),
                    resume='must' if resume_id else None, id=resume_id or None)
            except client.Error as error:
                raise ValueError(
                    f'--log-wandb: {one_line(error)}; run wandb login, or set WANDB_MODE=offline') from None

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Log metrics after an update of the weights."""
        if self._summary_writer is not None:
            with self._tolerate_errors():
                self._log_events(update, values)
        if self._run is not None:
            with self._tolerate_errors():
                self._run.log({**values, 'update': update})

    def _log_events(self, update: int, values: Mapping[str, float]) -> None:
        events, self._events = self._events, None  # an error ends the thread that writes the file
        if events is None:
            if self._failed and shutil.disk_usage(self._folder).free < MIN_FREE:
                return
            events = self._summary_writer(str(self._folder))
        for name, value in values.items():
            events.add_scalar(name, value, update)
        self._events = events

    def close(self, exit_code: int = 0) -> None:
        """Write what is buffered, and how the run ended."""
        with self._tolerate_errors():
            if self._events is not None:
                self._events.close()
        with self._tolerate_errors():
            if self._run is not None:
                self._run.finish(exit_code=exit_code)
        threading.excepthook = self._thread_hook

    @contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        try:
            with name_disk_errors(self._folder):
                yield
        except OSError as error:
            if not self._failed:
                _logger.error(f'cannot write metrics ({error}); training continues without them')
            self._failed = True

    def _handle_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Drop the traceback of TensorBoard's thread: `log` raises the same error."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith('tensorboard')):
            self._thread_hook(args)
