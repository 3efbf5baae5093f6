"""Train a supernet with ShiftNAS, or one network, with the flags of timm's training script.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs
    torchrun --nproc-per-node=8 train.py --data-dir /data/imagenet ...

`timm-shiftnas train` is the same program. Every `--val-interval` epochs and at the end it evaluates the smallest and
the largest subnet and one subnet per budget group, and writes to `<output>/<experiment>`: `summary.csv`, `budgets.csv`,
`shift.csv`, `accuracy.png`, `shift.png`, checkpoints, and `model/`, which `timm_shiftnas.from_pretrained` and
`timm.create_model('local-dir:...')` load. A single network, such as `--model local-dir:SUBNET`, is trained in the same
loop, without drawing archs.

Exit codes: 0, finished; 2, an error, reported in one line; 130, Ctrl-C; 143, SIGTERM, after a checkpoint was written
(torchrun itself exits with 1 if a process does not exit with 0).
"""
from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from timm.utils import setup_default_logging
from torch import Tensor

from ..utils.files import find_cause
from ..utils.text import one_line
from .checkpoints import Checkpoints, Position, Saver, loop_state
from .data import read_batches
from .flags import parse_args
from .folder import RunFolder
from .interrupts import Interrupts, Terminated
from .network_results import NetworkResults
from .progress import Progress
from .results import Results
from .setup import create_run
from .tracking import Tracker
from .update import Update

__all__ = ['Trainer', 'launch', 'main']

_logger = logging.getLogger('train')


class Trainer:
    """The loop of a run: `fit` over epochs, `train_epoch` over updates.

    Args:
        args: The flags, as `parse_args` returns them.

    Attributes:
        run: All parts of the run, created from the flags; `run.args` also holds derived values.
        position: Position of the run.
        update: Trains on the micro-batches of an update.
        results: Evaluates, and writes files.
        folder, checkpoints, tracker: Only in the first process.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.run = create_run(args)
        self.args, self.task, self.ranks = self.run.args, self.run.task, self.run.ranks
        self.epochs, self.batches = self.run.schedule.epochs, len(self.run.loaders.train)
        self.position = self.run.start
        self.interrupts = Interrupts()
        self.folder: RunFolder | None = None
        self.checkpoints: Checkpoints | None = None
        self.tracker: Tracker | None = None
        if self.ranks.primary:
            self.open_output(given=dict(lr=args.lr, shift=args.shift))
        self.update = Update(self.run, self.interrupts, self.checkpoints)
        self.results = (Results if self.run.supernet else NetworkResults)(self.run, self.interrupts, self.folder)

    def fit(self) -> None:
        """Train up to the last epoch, evaluate every --val-interval epochs and at the end, and publish."""
        with self.interrupts:
            if self.run.supernet:
                self.fit_generator()
                if self.run.starts_trained:
                    self.results.evaluate_start()
            if self.position.epoch >= self.epochs:
                _logger.info(f'{self.position.epoch} of {self.epochs} epochs are finished already: evaluating only')
                self.results.evaluate(last=True)
            for epoch in range(self.position.epoch, self.epochs):
                metrics = self.train_epoch(epoch)
                results = self.evaluate(epoch) if self.evaluates(epoch) else {}
                self.end_epoch(epoch, metrics, results)
            self.finish()

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on the rest of an epoch: a function of (seed, epoch), the position and the state before it."""
        started, accum = time.perf_counter() - self.position.seconds, self.args.grad_accum_steps
        self.run.train_mode()
        micro_batches = self.read_batches(epoch)
        with self.create_progress(epoch) as progress:
            while self.position.batch < self.batches:
                update, count = self.position.batch // accum + 1, min(accum, self.batches - self.position.batch)
                losses = self.update(islice(micro_batches, count), count, epoch, update)
                self.position = self.position.after(
                    count, losses, self.args.batch_size, seconds=time.perf_counter() - started)
                progress.show(self.position, self.run.schedule.updates(epoch, update), self.run.schedule.lr)
                self.save_if_due(update)
        self.run.share_statistics()
        return dict(loss=self.position.mean_loss, seconds=self.position.seconds)

    # -- the steps of fit ----------------------------------------------------------------------------------------------

    def fit_generator(self) -> None:
        """Fit the generator of a new run to the budgets."""
        args = self.args
        if not args.resume:
            _logger.info(f'fitting the generator to the budgets ({args.generator_fit_steps} steps, no images)')
            with self.interrupts.immediate():
                self.task.generator.fit(
                    steps=args.generator_fit_steps, seed=args.seed, progress=self.ranks.primary)

    def evaluates(self, epoch: int) -> bool:
        return epoch + 1 == self.epochs or (epoch + 1) % self.args.val_interval == 0

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Evaluate, with a checkpoint in case the run is killed meanwhile."""
        # save first if --recovery-interval is set, or if another process could be killed alone
        if saved := self.args.recovery_interval or self.ranks.size > 1:
            self.save_recovery()
        try:
            return self.results.evaluate(last=epoch + 1 >= self.epochs)
        except Terminated:
            if not saved:
                self.save_recovery()
            raise

    def end_epoch(self, epoch: int, metrics: dict[str, float], results: dict[str, float]) -> None:
        """Advance to the next epoch, and write the metrics and the checkpoint of this one.

        Args:
            epoch: From 0.
            metrics: Training loss and seconds.
            results: Accuracies; nothing without an evaluation.
        """
        schedule, lr, metric = self.run.schedule, self.run.schedule.mean_lr, results.get(self.args.eval_metric)
        schedule.step(epoch + 1, metric=metric)
        self.position = Position(epoch + 1)
        self.task.loop_state = loop_state(self.position, self.args, self.ranks)
        if not self.ranks.primary:
            return
        self.tracker.log(schedule.updates(epoch + 1), dict(
            {'epoch': epoch + 1, 'lr': lr, 'train/epoch_loss': metrics['loss']},
            **{f'eval/{name}': value for name, value in results.items()},
            **self.results.shares()))
        self.results.write_summary(epoch, metrics, results, lr)
        self.checkpoints.save(epoch, metric)

    def finish(self) -> None:
        """Remove the recovery files, and publish."""
        if not self.ranks.primary:
            return
        self.checkpoints.finish()
        if self.args.push_to_hub:
            self.results.publish()
        _logger.info(f'finished; the model directory is {self.run.output / "model"}')

    def close(self, exit_code: int) -> None:
        """End workers, trackers and the lock of the folder, however the run has ended."""
        if self.run.loaders.shift is not None:
            self.run.loaders.shift.close()
        if self.ranks.primary:
            self.tracker.close(exit_code)
            self.folder.close()

    # -- the steps of train_epoch --------------------------------------------------------------------------------------

    def read_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the rest of an epoch; with --save-images, save the last micro-batch of every logged update."""
        batches = read_batches(self.args, self.run.loaders, self.run.device, epoch, self.position.batch)
        for batch, (images, targets) in enumerate(batches, self.position.batch):
            update, rest = divmod(batch, self.args.grad_accum_steps)
            ends_update = rest + 1 == self.args.grad_accum_steps or batch + 1 == self.batches
            if self.args.save_images and self.ranks.primary and ends_update and (
                    update + 1) % self.args.log_interval == 0:
                self.results.save_images(images, epoch, batch)
            yield images, targets

    def create_progress(self, epoch: int) -> Progress:
        return Progress(
            f'epoch {epoch + 1}/{self.epochs}', self.position, self.batches,
            interval=self.args.log_interval * self.args.grad_accum_steps, processes=self.ranks.size,
            tracker=self.tracker)

    def save_if_due(self, update: int) -> None:
        """Write a checkpoint every --recovery-interval updates, and stop after SIGTERM."""
        interval = self.args.recovery_interval
        due = interval and update % interval == 0 and self.position.batch < self.batches
        if due or self.interrupts.stopping:
            self.save_recovery()
        if self.interrupts.stopping:
            raise Terminated

    def save_recovery(self) -> None:
        self.task.loop_state = loop_state(self.position, self.args, self.ranks)
        if self.ranks.primary:
            self.checkpoints.save_recovery(self.position.epoch, self.position.batch)

    # -- the folder of the run -----------------------------------------------------------------------------------------

    def open_output(self, given: dict[str, Any]) -> None:
        """Create the folder, its checkpoints and trackers, and write the flags to args.yaml.

        Args:
            given: Flags as typed, because a resumed run may derive other values: --lr for another number of processes,
                --shift for a longer run.

        Raises:
            OSError: If the folder cannot be created, or if another run writes to it.
        """
        run, args, output = self.run, self.args, self.run.output
        try:
            self.folder = RunFolder(output, yaml.safe_dump(dict(vars(args), **given), sort_keys=False))
        except BlockingIOError as error:
            raise BlockingIOError(f'{error}; give another --experiment, or wait until it ends') from None
        except OSError as error:
            raise OSError(
                f'--output {args.output}: cannot create the folder {output} ({error.strerror}); give a place where '
                'files can be written') from None
        saver = Saver(
            run.net, run.optimizer, args=args, amp_scaler=run.scaler, task=run.task, checkpoint_dir=str(output),
            recovery_dir=str(output), max_history=args.checkpoint_hist)
        if args.resume and Path(args.resume).resolve().parent == output.resolve():
            saver.load_state_dict_from_checkpoint(args.resume)
        self.checkpoints = Checkpoints(saver, self.folder, since=None if args.resume else time.time())
        self.tracker = Tracker(
            output, vars(args), tensorboard=args.log_tensorboard, wandb=args.log_wandb,
            project=args.wandb_project, tags=args.wandb_tags, resume_id=args.wandb_resume_id)


# -- the program -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None, prog: str = 'train.py') -> int:
    """Train; returns the exit code.

    Args:
        argv: The flags (default: those of the process).
        prog: Name of the program in messages.
    """
    args = parse_args(argv, prog)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # it lists all files after every epoch
    trainer, code = None, 2
    try:
        trainer = Trainer(args)
        trainer.fit()
        if trainer.ranks.size > 1:
            dist.destroy_process_group()
        code = 0
    except Terminated:
        output = trainer.run.output
        folder = f'{shlex.quote(output.name)} --output {shlex.quote(str(output.parent))}'
        print(f'{prog}: terminated; continue with --resume auto --experiment {folder}', file=sys.stderr)
        code = 128 + signal.SIGTERM
    except (KeyboardInterrupt, Exception) as error:
        if find_cause(error, KeyboardInterrupt):
            print(f'{prog}: interrupted{resume_hint(trainer)}', file=sys.stderr)
            code = 130
        elif args.traceback:
            raise
        else:
            print(f'{prog}: {error_line(error, trainer)}', file=sys.stderr)
    finally:
        if trainer is not None:
            trainer.close(code)
    return code


def resume_hint(trainer: Trainer | None) -> str:
    """Hint to continue an interrupted run: from its newest checkpoint, or from the one that it has resumed from."""
    if trainer is None or trainer.checkpoints is None:
        return ''
    newest = trainer.checkpoints.newest() or trainer.args.resume
    return f'; continue with --resume {shlex.quote(str(newest))}' if newest else ''


def error_line(error: Exception, trainer: Trainer | None) -> str:
    """An error in one line, with the number of the process if there are several."""
    expected = isinstance(error, (ValueError, OSError, ImportError)) and str(error)
    if 'DataLoader worker' in str(error):  # torch raises it by a signal handler, wherever the program is
        return f'error: {one_line(error)} A worker that reads images has died, maybe out of memory; use fewer --workers'
    hint = '' if expected else f'{type(error).__name__} (--traceback shows where): '
    rank = f' (process {trainer.ranks.rank})' if trainer and trainer.ranks.size > 1 else ''
    # gloo has no separate error class
    if rank and (isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and 'gloo/' in str(error)):
        hint = 'another process has ended, and its own line says why: '
    return f'error{rank}: {hint}{one_line(error)}'


def launch(argv: list[str] | None = None, prog: str = 'train.py') -> int:
    """`main` with timm's logging to the terminal, as `train.py` and `timm-shiftnas train` call it."""
    setup_default_logging()
    return main(argv, prog)
