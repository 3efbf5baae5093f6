"""Checkpoints of a run, which survive kills, full disks and corrupt files.

timm's `CheckpointSaver` decides which ones are kept. This module adds writes that may fail, the search for the newest
intact checkpoint, and resuming from the middle of an epoch.
"""
from __future__ import annotations

import logging
import os
import re
import reprlib
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import Tensor, nn

from ..hub.format import build_network, check_tensors
from ..method.generator import ArchitectureGenerator
from ..method.network import NetworkTask
from ..method.task import ShiftNASTask, check_same_space, resource_state, resume_task_checkpoint
from ..models.subnet import describe_images
from ..space.core import SearchSpace
from ..space.latency import Device
from ..space.resources import MACS, RESOURCES, Resource
from ..utils.distributed import Ranks
from ..utils.files import atomic_write, name_disk_errors, zip_is_intact
from ..utils.json_types import fits
from ..utils.paths import expand_home
from ..utils.text import one_line
from .folder import RunFolder

__all__ = [
    'Checkpoints', 'Position', 'Saver', 'check_checkpoint', 'find_checkpoint', 'load_checkpoint', 'loop_state',
    'newest_checkpoint', 'report_head', 'resume',
]

_logger = logging.getLogger('train')
SUFFIX = '.pth.tar'
ONLY_TRAIN = 'give a file that train.py wrote, such as output/NAME/last.pth.tar'
WEIGHTS_ONLY = 'to start from its weights, type --initial-checkpoint FILE in train.py'
# With other values, held-out images would be images that the weights were trained on.
SAME_DATA = ('seed', 'held_out', 'group_weights', 'glyph_images', 'glyph_difficulty', 'glyph_pixels')
SAME_OPTIMIZER = ('opt', 'layer_decay', 'weight_decay', 'freeze')  # with other values, its state has another form


class Position(NamedTuple):
    """Position of a run.

    Args:
        epoch: The epoch to train on, from 0.
        batch: Batches of this epoch that are done, in each process.
        loss: Sum of the losses of their images.
        count: Number of these images.
        seconds: Time that they took.
    """
    epoch: int
    batch: int = 0
    loss: float = 0.
    count: int = 0
    seconds: float = 0.

    @property
    def mean_loss(self) -> float:
        return self.loss / max(self.count, 1)

    @classmethod
    def of_loop(cls, loop: dict[str, Any]) -> Position:
        """The position in the `loop_state` of a checkpoint; old ones have no seconds."""
        return cls(**{name: loop[name] for name in cls._fields if name in loop})

    def after(self, batches: int, losses: list[float], batch_size: int, seconds: float) -> Position:
        """The position after some more batches, with the losses of those that count."""
        total = self.loss
        for loss in losses:
            total += loss * batch_size
        return Position(self.epoch, self.batch + batches, total, self.count + len(losses) * batch_size, seconds)


class Saver(CheckpointSaver):
    """timm's saver, which writes with `atomic_write`.

    After a failed write, torch itself would keep the file open while the traceback exists, and a deleted open file
    still occupies the disk.
    """

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        with atomic_write(save_path) as temporary, open(temporary, 'wb') as file:
            super()._save(file, epoch, metric)

    def _duplicate(self, src: str, dst: str) -> None:
        Path(dst).unlink(missing_ok=True)
        try:
            os.link(src, dst)
        except (OSError, NotImplementedError):  # a file system without hard links
            with atomic_write(dst) as temporary:
                shutil.copyfile(src, temporary)


class Checkpoints:
    """Checkpoints in the folder of a run. Only the first process of a run has them.

    Args:
        saver: timm's saver for this folder.
        folder: The folder.
        since: Time when the run started (`time.time()`); older files are another run's. `None` for a resumed run.

    Attributes:
        failure: The error of the last write, if it failed: only its text, because the error itself keeps what was
            written in memory.
    """

    def __init__(self, saver: CheckpointSaver, folder: RunFolder, since: float | None = None) -> None:
        self.saver, self.folder, self.since = saver, folder, since
        self.failure = ''
        found = sorted(folder.path.glob(f'{saver.recovery_prefix}-*{SUFFIX}'), key=os.path.getmtime)
        saver.prev_recovery_file, saver.curr_recovery_file = ['', '', *map(str, found)][-2:]
        folder.remove_temporaries(f'tmp{SUFFIX}', f'recovery_tmp{SUFFIX}')

    def save(self, epoch: int, metric: float | None) -> None:
        """Write a checkpoint at the end of an epoch; `metric` ranks it."""
        with self._tolerate_errors():
            self.saver.save_checkpoint(epoch, metric=metric)

    def save_recovery(self, epoch: int, batch: int) -> None:
        """Write a checkpoint in the middle of an epoch, and remove all but the two newest of them."""
        with self._tolerate_errors():
            self.saver.save_recovery(epoch, batch)

    def newest(self) -> Path | None:
        """The newest intact checkpoint of this run."""
        return newest_checkpoint(self.folder.path, self.since)

    def finish(self) -> None:
        """Remove the recovery files at the end of the run.

        Raises:
            OSError: If the last checkpoint could not be written.
        """
        if self.failure:
            raise OSError(
                f'training is finished, but its last checkpoint could not be written ({self.failure}); once there is '
                f'room in {self.folder.path}, run the same command with --resume auto')
        for path in (self.saver.prev_recovery_file, self.saver.curr_recovery_file):
            if path:
                Path(path).unlink(missing_ok=True)

    @contextmanager
    def _tolerate_errors(self) -> Iterator[None]:
        """Log a failed write; the disk may have room for the next checkpoint."""
        try:
            with name_disk_errors(self.folder.path):
                self.folder.restore()
                yield
            self.failure = ''
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            self.failure = one_line(error, 300)
        if self.failure:
            newest = self.newest()
            kept = f'{newest} is kept' if newest else 'there is no other yet'
            _logger.error(
                f'cannot write a checkpoint ({self.failure}); {kept}. Training continues, and the next one is tried')


# -- finding and resuming ----------------------------------------------------------------------------------------------


def find_checkpoint(args: Namespace, output: Path, ranks: Ranks) -> str:
    """The file of --resume; for 'auto' the newest checkpoint in the folder of the run, or '' if there is none."""
    if args.resume != 'auto':
        return args.resume
    newest = ranks.gather(newest_checkpoint(output) if ranks.primary else None)[0]
    _logger.info(f'resuming from {newest}' if newest else f'no checkpoint in {output}: starting a new run')
    return str(newest or '')


def newest_checkpoint(folder: str | os.PathLike, since: float | None = None) -> Path | None:
    """The newest intact checkpoint in a folder; those that are not intact are logged.

    Args:
        folder: The folder of a run.
        since: Ignore files older than this time.
    """
    found = []
    for path in Path(folder).glob(f'*{SUFFIX}'):
        if path.name in (f'tmp{SUFFIX}', f'recovery_tmp{SUFFIX}'):
            continue
        try:
            if since is not None and path.stat().st_mtime < since:
                continue
            # by time first: the folder may hold a longer, older run
            position = saved_position(load_checkpoint_metadata(str(path)))
            last = path.name == f'last{SUFFIX}'  # the best one may be the same file
            found.append((path.stat().st_mtime, position.epoch, position.batch, last, path))
        except Exception as error:  # corrupt files make torch raise RuntimeError, EOFError, KeyError, ...
            _logger.warning(f'cannot read the checkpoint {path} ({one_line(error, 120)})')
    for *_, path in sorted(found, reverse=True):
        if zip_is_intact(path):
            return path
        _logger.warning(f'the checkpoint {path} is corrupt; falling back to the one before it')
    return None


def saved_position(checkpoint: dict[str, Any]) -> Position:
    """The position to resume from. Checkpoints of other training loops are saved at the end of an epoch."""
    loop = (checkpoint.get('task_state') or {}).get('loop') or {}
    if 'epoch' in loop:
        return Position.of_loop(loop)
    return Position(checkpoint.get('epoch', -1) + 1)


def batch_layout(args: Namespace, ranks: Ranks) -> dict[str, int]:
    """The values that decide which images the n-th batch of a process holds."""
    return dict(batch_size=args.batch_size, processes=ranks.size, grad_accum_steps=args.grad_accum_steps)


def loop_state(position: Position, args: Namespace, ranks: Ranks) -> dict[str, Any]:
    """The state that a loop needs to resume: everything random is a function of the seed, the epoch and the batch."""
    return {**position._asdict(), **batch_layout(args, ranks)}


def resume(
        args: Namespace,
        task: ShiftNASTask | NetworkTask,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        ranks: Ranks,
) -> Position:
    """Load the checkpoint of --resume into task, optimizer and loss scaler.

    Returns:
        The position to continue from.

    Raises:
        ValueError: If the checkpoint does not fit the flags.
    """
    saved = check_checkpoint(args.resume, task.space)
    for name in SAME_DATA if args.no_resume_opt else (*SAME_DATA, *SAME_OPTIMIZER):
        before, now = saved.get(name), getattr(args, name)
        # the value of the weight decay may change; with it or without, the optimizer has other parameter groups
        same = bool(before) == bool(now) if name == 'weight_decay' else before == now
        if name in saved and not same:
            raise ValueError(
                f'the checkpoint was trained with --{name.replace("_", "-")} {before} and not {now}; resume with '
                f'the flags of its run: -c {Path(args.resume).with_name("args.yaml")}')
    before, now = saved['label_names'], task.network['label_names']
    if before and now and before != now:
        raise ValueError(
            f'the checkpoint was trained on the classes {reprlib.repr(before)}, and the data has {reprlib.repr(now)}; '
            'resume with the same class folders, or start from its weights with --initial-checkpoint')
    if args.no_resume_opt:
        optimizer = scaler = None
    epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer, loss_scaler=scaler)
    if not task.loop_state:
        return Position(epoch or 0)
    position = Position.of_loop(task.loop_state)
    for name, value in batch_layout(args, ranks).items():
        if position.batch and task.loop_state[name] != value:
            raise ValueError(
                f'the checkpoint is from the middle of an epoch, with {name}={task.loop_state[name]}, and not {value}: '
                'resume with the same value, or from a checkpoint of the end of an epoch')
    return position


# -- reading -----------------------------------------------------------------------------------------------------------


def load_checkpoint(
        path: str | Path, use_ema: bool = True) -> tuple[nn.Module, ArchitectureGenerator | None, dict[str, Any]]:
    """Load a network from a checkpoint of this package, or of timm's own script with `timm_shiftnas.patch`.

    Args:
        path: A checkpoint.
        use_ema: Load the averaged weights, if there are any.

    Returns:
        The network in eval mode, the generator of a supernet, and the state of the task with the flags under 'args'.

    Raises:
        ValueError: If the file is missing or corrupt, or not a checkpoint of this package.
    """
    checkpoint = read_checkpoint(path)
    state, where = checkpoint['task_state'], f'the checkpoint {str(path)!r}'
    net = build_network(state['network'], where)
    averaged = use_ema and checkpoint.get('state_dict_ema')
    weights = clean_state_dict(averaged or checkpoint['state_dict'])
    check_tensors(net.state_dict(), weights, where)
    net.load_state_dict({name: x.clone() for name, x in weights.items()}, assign=True)  # not mapped from the file
    flags = saved_flags(checkpoint)
    # checkpoints without this flag were trained by timm's own script or an older version, which turn no photographs
    upright = not flags.get('ignore_exif_orientation', True)
    describe_images(net, state['network'].get('label_names'), flags.get('input_img_mode'), upright)
    generator = None
    if 'generator' in state:
        generator = ArchitectureGenerator(net.space, resource=saved_resource(state, net.space, where))
        check_tensors(generator.state_dict(), state['generator'], where)
        generator.load_state_dict(state['generator'])
    return net.eval(), generator, dict(state, args=flags)


def saved_resource(state: dict[str, Any], space: SearchSpace, where: str) -> Resource:
    """The resource of the budgets of a task state; checkpoints of older versions have MACs."""
    saved = state.get('resource') or resource_state(MACS)
    return Device.of_json(saved['device'], where).resource(space) if saved['device'] else RESOURCES[saved['name']]


def report_head(source: str, classes: int, wanted: int) -> bool:
    """Whether the head of some weights is left out because of its number of classes; logs it."""
    if classes != wanted:
        _logger.warning(
            f'{source} has {classes} classes and the data {wanted}: its head is left out, and a new one is trained')
    return classes != wanted


def check_checkpoint(path: str | Path, space: SearchSpace) -> dict[str, Any]:
    """Check that a run can resume from a file, before anything is loaded into a model.

    Returns:
        The flags of the run that wrote it, if it holds them, and the `label_names` of its network.

    Raises:
        ValueError: If the file is missing or corrupt, not a checkpoint of this task, or of another search space.
    """
    checkpoint = read_checkpoint(path)
    check_same_space(checkpoint['task_state'], space)
    return saved_flags(checkpoint) | dict(label_names=checkpoint['task_state']['network'].get('label_names'))


def saved_flags(checkpoint: dict[str, Any]) -> dict[str, Any]:
    flags = checkpoint.get('args') or {}
    return dict(vars(flags) if isinstance(flags, Namespace) else flags)


class Network(TypedDict):
    """Arguments of `create_model`."""
    architecture: str
    model_args: dict[str, Any]


class NetworkState(TypedDict):
    """The entries that are read of the state of any task, besides those that only resuming needs."""
    network: Network
    space: dict[str, Any]


class TaskState(NetworkState, total=False):
    """The entries of a task that trains a supernet."""
    edges: list[float]
    resource: dict[str, str]
    generator: dict[str, Tensor]
    history: Annotated[list[Any], lambda history: bool(history)]
    update: int
    micro_step: int


class Checkpoint(TypedDict):
    task_state: TaskState
    state_dict: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this task, with its tensors mapped from the file.

    Raises:
        ValueError: If the file is missing or corrupt, or is something else; the message says what.
    """
    problem, hint = '', 'give another one of its folder, or --resume auto with the --experiment of the run'
    try:
        path = expand_home(path)
        with open(path, 'rb') as file:
            start = file.read(9)
        if start[8:] == b'{':  # after the length of its header
            problem, hint = 'is a safetensors file: it holds weights, and not the state of a run', WEIGHTS_ONLY
        elif start[:4] != b'PK\x03\x04':
            problem, hint = "cannot be read: it is not a torch.save file, or has torch's old format", ONLY_TRAIN
        elif not zip_is_intact(path):
            problem = 'is corrupt: its end is missing, or the checksum of a part differs'
        elif not fits(checkpoint := load_checkpoint_metadata(str(path)), Checkpoint):
            problem, hint = 'is not a checkpoint of ShiftNAS', WEIGHTS_ONLY
    except FileNotFoundError:
        problem, hint = 'does not exist', ONLY_TRAIN
    except IsADirectoryError:
        problem, hint = 'is a directory', ONLY_TRAIN
    except Exception as error:  # the reader of pickles raises any type
        blocked = re.search(r'(?i)globals?:? (?:GLOBAL )?((?:\w+(?:\.\w+)+(?:, )?)+)', str(error))
        problem, hint = f'cannot be read ({one_line(error, 100)})', ONLY_TRAIN
        if blocked:
            problem = f'holds Python objects ({blocked[1]}), which are not loaded, because they can run any code'
    if problem:
        raise ValueError(f'the checkpoint {str(path)!r} {problem}; {hint}')
    return checkpoint
