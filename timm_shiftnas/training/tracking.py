"""Watching a run: TensorBoard and Weights & Biases, as far as they are asked for."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.text import one_line

__all__ = ['Tracker']

_logger = logging.getLogger('train')


class Tracker:
    """Writes figures to TensorBoard (events in the folder of the run), to Weights & Biases, to both or to neither.

    Args:
        folder: The folder of the run; its name is the run's.
        config: The flags of the run.
        tensorboard, wandb: Which of them to write to.
        project, tags, resume_id: As `wandb.init` has them; an id is that of a run to go on with.

    Raises:
        ImportError: If a package that is asked for is not installed.
        ValueError: If Weights & Biases refuses the run.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, tensorboard: bool = False, wandb: bool = False,
                 project: str | None = None, tags: Sequence[str] = (), resume_id: str = '') -> None:
        self._events = self._run = None
        self._failed = False
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--log-tensorboard: run pip install 'timm_shiftnas[tracking]'") from error
            self._events = SummaryWriter(str(folder))
        if wandb:
            try:
                import wandb as client
            except ImportError as error:
                raise ImportError("--log-wandb: run pip install 'timm_shiftnas[tracking]'") from error
            try:
                self._run = client.init(
                    project=project, name=folder.name, dir=str(folder), config=dict(config), tags=list(tags),
                    resume='must' if resume_id else None, id=resume_id or None)
            except client.Error as error:
                raise ValueError(
                    f'--log-wandb: {one_line(error)}; run wandb login, or set WANDB_MODE=offline'
                ) from None

    def log(self, update: int, values: Mapping[str, float]) -> None:
        """Figures at an optimizer update."""
        with self._trying():
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, update)
            if self._run is not None:
                self._run.log({**values, 'update': update})

    def close(self, exit_code: int = 0) -> None:
        """Write what is not written yet, and how the run ended."""
        with self._trying():
            if self._events is not None:
                self._events.close()
            if self._run is not None:
                self._run.finish(exit_code=exit_code)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """Nobody watches a run at the price of the run: a full disk costs figures, and is told once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                _logger.error(f'cannot log to a tracker ({error}); the training goes on')
            self._failed = True
