"""Checkpoints of a training that survive what happens to trainings: kills, full disks, files that lose a bit.

timm's `CheckpointSaver` writes them. Added are tries that may fail, and a look at what is there: the newest checkpoint
that is whole.
"""
from __future__ import annotations

import logging
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.models import clean_state_dict, create_model
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from ..method.generator import ArchitectureGenerator
from ..method.task import check_same_space
from ..space.core import SearchSpace
from ..utils.files import zip_is_intact
from ..utils.text import one_line

__all__ = ['Checkpoints', 'check_checkpoint', 'load_checkpoint', 'newest_checkpoint']

_logger = logging.getLogger('train')
SUFFIX = '.pth.tar'


class Checkpoints:
    """The checkpoints of a run in its folder; only one process of a run has them.

    Args:
        saver: timm's saver, with the run's folder.
        since: When the run began (`time.time()`): what is older is another run's. `None` for a run that goes on.

    Attributes:
        failure: What kept the last try from being written, or `None`.
    """

    def __init__(self, saver: CheckpointSaver, since: float | None = None) -> None:
        self.saver, self.since = saver, since
        self.folder = Path(saver.checkpoint_dir)
        self.failure: Exception | None = None
        found = sorted(self.folder.glob(f'{saver.recovery_prefix}-*{SUFFIX}'), key=os.path.getmtime)
        saver.prev_recovery_file, saver.curr_recovery_file = ['', '', *map(str, found)][-2:]
        self._temporaries = [self.folder / f'{name}{SUFFIX}' for name in ('tmp', 'recovery_tmp')]
        self._remove_temporaries()  # of a run that was killed while it wrote

    def save(self, epoch: int, metric: float | None) -> None:
        """Write the end of an epoch, ranked by `metric`."""
        with self._trying():
            self.saver.save_checkpoint(epoch, metric=metric)

    def save_recovery(self, epoch: int, update: int) -> None:
        """Write the middle of an epoch; the two newest of these are kept."""
        with self._trying():
            self.saver.save_recovery(epoch, update)

    def newest(self) -> Path | None:
        """The last whole checkpoint of this run."""
        return newest_checkpoint(self.folder, self.since)

    def finish(self) -> None:
        """Remove the recovery files of a run that is done."""
        for path in (self.saver.prev_recovery_file, self.saver.curr_recovery_file):
            if path and self.failure is None:
                Path(path).unlink(missing_ok=True)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """Go on without a checkpoint that cannot be written: the disk may have room again at the next one."""
        try:
            yield
            self.failure = None
        except (OSError, RuntimeError) as error:  # torch's writer has errors of its own kind
            self.failure = error
            self._remove_temporaries()
            newest = self.newest()
            kept = f'{newest} is kept' if newest else 'there is none yet'
            _logger.error(
                f'cannot write a checkpoint ({one_line(error, 200)}); {kept}. The training goes on; make '
                f'room in {self.folder}')

    def _remove_temporaries(self) -> None:
        for path in self._temporaries:
            path.unlink(missing_ok=True)


def position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Where to go on: the epoch, and how many of its batches have been trained on."""
    loop = (checkpoint.get('task_state') or {}).get('loop') or {}
    if 'epoch' in loop:
        return loop['epoch'], loop['batch']
    return checkpoint.get('epoch', -1) + 1, 0  # of another loop: what it saves are ends of epochs


def newest_checkpoint(folder: str | os.PathLike, since: float | None = None) -> Path | None:
    """Of the checkpoints in a folder, the last one written that is whole; others are told in the log.

    Args:
        folder: The folder of a run.
        since: Leave out what was written before this time.
    """
    found = []
    for path in Path(folder).glob(f'*{SUFFIX}'):
        if path.name in (f'tmp{SUFFIX}', f'recovery_tmp{SUFFIX}'):
            continue
        if since is not None and path.stat().st_mtime < since:
            continue
        try:
            # by time: a folder may hold a longer run from before
            found.append((path.stat().st_mtime, *position(load_checkpoint_metadata(str(path))), path))
        except Exception as error:  # what a broken file makes torch raise: RuntimeError, EOFError, KeyError, ...
            _logger.warning(f'cannot read the checkpoint {path} ({one_line(error, 120)})')
    for *_, path in sorted(found, reverse=True):
        if zip_is_intact(path):
            return path
        _logger.warning(f'the checkpoint {path} is corrupt; falling back to the one before it')
    return None


def load_checkpoint(path: str | Path, use_ema: bool = True) -> tuple[nn.Module, ArchitectureGenerator, dict[str, Any]]:
    """What a training of a supernet has come to, ours or timm's own with `timm_shiftnas.patch`.

    Args:
        path: A checkpoint.
        use_ema: Take the averaged weights, if there are any.

    Returns:
        The supernet in eval mode, its generator, and the state of the task with the flags under 'args'.

    Raises:
        ValueError: If the file is missing or corrupt, or no checkpoint of a supernet's training.
    """
    checkpoint = _read_checkpoint(path)
    state = checkpoint['task_state']
    net = create_model(state['network']['architecture'], **state['network']['model_args'])
    generator = ArchitectureGenerator(net.space)
    generator.load_state_dict(state['generator'])
    averaged = use_ema and checkpoint.get('state_dict_ema')
    net.load_state_dict(clean_state_dict(averaged or checkpoint['state_dict']))
    return net.eval(), generator, dict(state, args=_flags(checkpoint))


def check_checkpoint(path: str | Path, space: SearchSpace) -> dict[str, Any]:
    """Refuse a file that cannot be resumed from before anything is loaded into a model.

    Returns:
        The flags of the run that wrote it (empty if it holds none).

    Raises:
        ValueError: If the file is missing or corrupt, no checkpoint of this task, or of another search space.
    """
    checkpoint = _read_checkpoint(path)
    check_same_space(checkpoint['task_state'], space)
    return _flags(checkpoint)


def _flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    flags = checkpoint.get('args') or {}
    return dict(vars(flags) if isinstance(flags, Namespace) else flags)


def _read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this task, its tensors mapped from the file.

    Raises:
        ValueError: If it is none.
    """
    if not Path(path).is_file():
        raise ValueError(f'no checkpoint at {str(path)!r}; give a file such as output/NAME/last.pth.tar')
    hint = 'give another one of its folder, or --resume auto with the --experiment of the run'
    try:
        checkpoint = load_checkpoint_metadata(str(path))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f'cannot read the checkpoint {str(path)!r} ({str(error).splitlines()[0]}); {hint}') from None
    if not zip_is_intact(path):
        raise ValueError(f'the checkpoint {str(path)!r} is corrupt: parts have not the checksum they had; {hint}')
    if not isinstance(checkpoint, dict) or 'micro_step' not in (checkpoint.get('task_state') or {}):
        raise ValueError(
            f'{str(path)!r} is no checkpoint of a ShiftNAS training; start from its weights by --initial-checkpoint')
    return checkpoint
