"""Evaluation of a run, and the files that it writes: tables, pictures, the model directory."""
from __future__ import annotations

import copy
import csv
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from ..evaluation.accuracy import evaluate_budgets
from ..evaluation.plots import plot_accuracy, plot_shift
from ..evaluation.search import search_archs
from ..evaluation.tables import format_table, read_budgets_csv, write_budgets_csv, write_shift_csv
from ..hub.load import SavedModel
from ..hub.push import push_directory
from ..hub.report import write_report
from ..hub.save import save_pretrained
from ..models.calibration import BatchNormCalibration
from ..space.core import Arch, SearchSpace
from ..space.latency import Device, fingerprint
from ..space.resources import MACS, Resource
from ..utils.files import atomic_write, name_disk_errors
from ..utils.run_files import ACCURACY, BEFORE, MODEL, REPORT, SHIFT, SHIFT_TABLE, SUMMARY, TABLE
from ..utils.streams import stream
from .flags import training_facts
from .folder import RunFolder
from .interrupts import Interrupts
from .setup import Run

__all__ = ['Results']

_logger = logging.getLogger('train')


class Results:
    """Evaluates a run and writes its files; only the first process writes.

    Args:
        run: The run.
        interrupts: SIGTERM stops an evaluation at once.
        folder: The folder of the run; only the first process has it.

    Attributes:
        metrics: Names of what `evaluate` returns, the columns of summary.csv.
    """
    metrics: tuple[str, ...] = ('top1', 'top1_smallest', 'top1_largest')

    def __init__(self, run: Run, interrupts: Interrupts, folder: RunFolder | None) -> None:
        self.run, self.interrupts, self.folder = run, interrupts, folder
        self.args, self.task, self.loaders, self.output = run.args, run.task, run.loaders, run.output

    def evaluate(self, last: bool) -> dict[str, float]:
        """Evaluate, and write the files of the evaluation.

        Args:
            last: Whether this is the last evaluation, whose files must not be missing.

        Returns:
            Accuracies in percent, by `metrics`.
        """
        net = self.evaluated_net()
        rows, found = self.measure_at_once(net)
        if self.run.ranks.primary:
            with self.tolerate_errors('the table', 'standard output'):  # the reader of a pipe may have ended
                print(format_table(rows, self.resource), flush=True)
            with self.tolerate_errors('the results', unless=last):
                self.write(net, rows, **found)
        return self.summary(rows)

    def evaluate_start(self) -> None:
        """Evaluate the subnets before training, and write before.csv: what a pretrained network gives as it is."""
        rows, _ = self.measure_at_once(self.run.net)
        if self.run.ranks.primary:
            with self.tolerate_errors('the table', 'standard output'):
                print('before training', format_table(rows, self.resource), sep='\n', flush=True)
            with self.tolerate_errors(BEFORE):
                write_budgets_csv(self.output / BEFORE, rows)

    def measure_at_once(self, net: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """`measure` with the options of the run; SIGTERM stops it."""
        run = self.run
        with self.interrupts.immediate():
            return self.measure(
                net, device=run.device, autocast=run.autocast(), channels_last=self.args.channels_last, ranks=run.ranks)

    def measure(self, net: nn.Module, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Evaluate the ends of the range and one subnet per budget group.

        Args:
            net: The evaluated network.
            **options: As for `evaluate_budgets`.

        Returns:
            The budget table, and the further arguments of `write`.
        """
        args, task = self.args, self.task
        if self.loaders.calibration is not None:
            options['calibration'] = BatchNormCalibration(self.loaders.calibration, args.bn_images)
        searched = None
        if task.sampler.searches:
            searched = archs = search_archs(
                net.space, task.generator, task.groups, args.search_samples, net, self.loaders.held_out,
                seed=args.seed, **options)
        else:
            archs = task.sampler.archs_for_budgets()
            if not task.sampler.proposes:
                searched = archs
        rows = evaluate_budgets(net, task.groups, archs, self.loaders.validation, **options)
        return rows, dict(searched=searched, calibration=options.get('calibration'))

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Top-1 in percent: the mean over groups, the smallest subnet, the largest."""
        groups = [row['top1'] for row in rows[1:-1]]
        return dict(top1=sum(groups) / len(groups), top1_smallest=rows[0]['top1'], top1_largest=rows[-1]['top1'])

    def shares(self) -> dict[str, float]:
        """P, by the name of its value in trackers."""
        return {f'P/group {k + 1}': float(p) for k, p in enumerate(self.task.shift.probabilities)}

    def evaluated_net(self) -> nn.Module:
        """The averaged weights if there are any, on the device."""
        ema = self.task.get_trainable_module(ema=True)
        if ema is None:
            return self.run.net
        same_device = next(ema.module.parameters()).device == next(self.run.net.parameters()).device
        return ema.module if same_device else copy.deepcopy(ema.module).to(self.run.device)

    def write(
            self,
            net: nn.Module,
            rows: list[dict[str, Any]],
            searched: list[Arch] | None,
            calibration: BatchNormCalibration | None,
    ) -> None:
        """Write tables, pictures and the model directory.

        Args:
            net: The evaluated network.
            rows: The budget table.
            searched: Archs that a search has found for the groups.
            calibration: BatchNorm statistics of the evaluated subnets.
        """
        task, space, resource = self.task, net.space, self.resource
        write_budgets_csv(self.output / TABLE, rows)
        before = self.output / BEFORE
        others = {'before training': read_budgets_csv(before)} if before.exists() else None
        plot_accuracy(self.output / ACCURACY, rows, others, resource, beside=[MACS], space=space)
        write_shift_csv(self.output / SHIFT_TABLE, task.history)
        noise = stream(self.args.seed, 'histogram', 0)
        uniform = resource.count(space, [space.sample(noise) for _ in range(2000)]).tolist()
        plot_shift(self.output / SHIFT, task.history, task.groups.edges, uniform, resource)
        in_table = dict.fromkeys(space.from_dict(row['arch']) for row in rows)
        statistics = None if calibration is None else {arch: calibration.statistics[arch] for arch in in_table}
        self.save(
            net, rows, generator=task.generator, groups=task.groups.edges,
            probabilities=task.shift.probabilities.tolist(), searched=searched, bn_stats=statistics,
            devices=self.measured(space))

    def measured(self, space: SearchSpace) -> list[Device]:
        """Devices whose latencies were added to the model directory during the run."""
        directory = self.output / MODEL
        if not directory.exists():
            return []
        with suppress(ValueError):  # something else is saved there
            devices = SavedModel(directory).devices().values()
            return [device for device in devices if device.space == fingerprint(space)]
        return []

    def save(self, net: nn.Module, rows: list[dict[str, Any]], **more: Any) -> None:
        """Write the model directory and its report; `more` is as for `save_pretrained`."""
        facts = training_facts(self.args, self.run.ranks.size)
        if self.loaders.split is not None:
            facts['held_out'] = self.loaders.split
        save_pretrained(
            self.output / MODEL, net, results=rows, training=facts, data_config=self.run.data_config, **more)
        with self.tolerate_errors('the report'):
            write_report(self.output / REPORT, SavedModel(self.output / MODEL))

    def write_summary(self, epoch: int, metrics: dict[str, float], results: dict[str, float], lr: float) -> None:
        """Append an epoch to summary.csv.

        Args:
            epoch: From 0.
            metrics: Training loss and seconds.
            results: As `evaluate` returns them; nothing without an evaluation.
            lr: Learning rate.
        """
        row = {'epoch': epoch, **{f'train_{name}': value for name, value in metrics.items()}}
        row |= {f'eval_{name}': results.get(name, '') for name in self.metrics}
        with self.tolerate_errors(SUMMARY):
            append_epoch(self.output / SUMMARY, {**row, 'lr': lr})

    def save_images(self, images: Tensor, epoch: int, batch: int) -> None:
        """Save the images of a batch as a picture."""
        path = self.output / f'train-batch-{epoch}-{batch}.jpg'
        with self.tolerate_errors(path.name), atomic_write(path) as temporary:
            torchvision.utils.save_image(images, temporary, format='JPEG', padding=0, normalize=True)

    @property
    def resource(self) -> Resource:
        """The resource that the budgets of the run bound."""
        return self.task.groups.resource

    @contextmanager
    def tolerate_errors(self, what: str, place: str = '', unless: bool = False) -> Iterator[None]:
        """Log a failed write to a place (default: the folder of the run) and continue; raise the error if `unless`."""
        try:
            with name_disk_errors(place or self.output):
                self.folder.restore()
                yield
        except OSError as error:
            if unless:
                raise
            _logger.error(f'cannot write {what} ({error}); training continues')

    def publish(self) -> None:
        """Push the model directory to --push-to-hub."""
        args = self.args
        try:
            address = push_directory(
                self.output, args.push_to_hub, private=args.hub_private or None, revision=args.hub_revision)
        except Exception:
            flags = ' --private' * args.hub_private
            flags += f' --revision {shlex.quote(args.hub_revision)}' if args.hub_revision else ''
            _logger.error(
                'training is finished, but the model is not published; run: timm-shiftnas push '
                f'{shlex.quote(str(self.output))} {args.push_to_hub}{flags}')
            raise
        _logger.info(f'published: {address}')


def append_epoch(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file, and drop rows of the same and of later epochs, which another run has left."""
    rows = []
    with suppress(FileNotFoundError), path.open(newline='', encoding='utf-8', errors='replace') as file:
        for before in csv.DictReader(file):
            if (before.get('epoch') or '').isdecimal() and int(before['epoch']) < row['epoch']:
                rows.append(before)
    with atomic_write(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(row), extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows([*rows, row])
