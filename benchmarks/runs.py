"""Helpers of the benchmarks: runs of `train.py`, each in its own process, and statistics of paired seeds.

A run is a name and flags. It is done when its folder holds `done.json`, which is written last. An interrupted run
resumes from its last checkpoint. Benchmarks can therefore be stopped and started again, and they share the runs that
they have in common.
"""
from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Data and recipe of all samplers. All hold out the same share, so that they see the same training images. The optimizer
# is Muon because AdamW does not leave its first plateau in runs of this length.
COMMON = '''
    --model test_shiftformer_supernet --workers 0 --batch-size 64 --opt muon --lr 1e-2 --warmup-epochs 1
    --warmup-lr 5e-4 --smoothing 0.1 --hflip 0 --color-jitter 0 --num-groups 8 --held-out 0.05
    --generator-images 64 --shift-interval 20 --shift-batch-size 64 --shift-lr 0.1 --checkpoint-hist 1
    --log-interval 1000'''.split()
TASKS = dict(
    digits='--dataset sklearn/digits --scale 0.6 1 --ratio 0.8 1.25'.split(),
    glyphs='--dataset glyphs --glyph-images 6000 --glyph-difficulty 0.2 --scale 0.9 1 --ratio 1 1'.split(),
)
TASKS['cnn'] = [*TASKS['glyphs'], '--model', 'test_shiftmobilenet_supernet']
# A third of the letters: the smallest task on which a tilt of P is still seen, for questions that take many seeds.
TASKS['letters'] = [*TASKS['glyphs'], '--glyph-images', '2000']
TASKS['letters-cnn'] = [*TASKS['cnn'], '--glyph-images', '2000']
TILT = ['--group-weights', *'8 5 3.5 2.5 2 1.5 1.2 1'.split()]  # a fixed P that favours small budgets
FITTED = ['--generator-interval', '0']  # the generator is fitted to budgets and not trained
FINE_TUNING = '--lr 2e-3 --warmup-epochs 0'.split()  # flags for training from inherited weights
GROUPS = 8  # subnets are compared at their budgets; runs have as many unless their flags differ
EPOCHS = {'digits': 30, 'glyphs': 8, 'cnn': 8, 'letters': 32, 'letters-cnn': 32}
SAMPLERS = dict(
    uniform='--sampler uniform'.split(),
    sandwich='--sampler uniform --sandwich --archs-per-step 4'.split(),
    generator='--shift none'.split(),
    hypergradient='--shift hypergradient'.split(),
    grad_norm='--shift grad_norm'.split(),
    variation='--shift variation'.split(),
    focusformer='--sampler focusformer'.split(),
    prenas='--sampler prenas'.split(),
)
SAMPLERS['best-up'] = '--sampler attentivenas_best_up'.split()
SAMPLERS['worst-up'] = '--sampler attentivenas_worst_up'.split()


@dataclass(frozen=True)
class Run:
    """One run of `train.py`.

    Args:
        name: What is trained. Runs of one name differ in their seeds and are averaged.
        task: A key of TASKS.
        flags: Flags of `train.py` beyond those of the task.
        seed: Runs of equal seeds are paired: they share the held-out split, the initial weights and the image order.
        epochs: Length of the training.
    """
    name: str
    task: str
    flags: tuple[str, ...]
    seed: int
    epochs: int

    @property
    def searches(self) -> bool:
        """Whether subnets come from a search, as with uniform sampling, and not from the sampler of the run."""
        return not {'uniform', 'attentivenas_best_up', 'attentivenas_worst_up'}.isdisjoint(self.flags)

    def folder(self, output: Path) -> Path:
        length = '' if self.epochs == EPOCHS[self.task] else f'-{self.epochs}epochs'
        return output / self.task / f'{self.name}{length}' / f'seed{self.seed}'

    def command(self) -> list[str]:
        """Flags of `train.py`, without those that name the output."""
        return [*COMMON, *TASKS[self.task], '--epochs', str(self.epochs), '--val-interval', str(self.epochs),
                '--seed', str(self.seed), *self.flags]


def folder_name(flags: Sequence[str]) -> str:
    """Name of the folder of a setting. Experiments with the same setting share its runs."""
    for name, known in SAMPLERS.items():
        if list(flags) == known:
            return name
    return '_'.join(flag.lstrip('-').replace('.', 'p') for flag in flags)


def positive(text: str) -> int:
    """A flag's text as a positive int."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number, 1 or more')
    return int(text)


def add_arguments(parser: argparse.ArgumentParser, seeds: int = 3) -> None:
    """Add the flags of every benchmark that trains."""
    parser.add_argument('--task', default='glyphs', choices=tuple(TASKS), help='images to train on')
    parser.add_argument('--seeds', type=positive, default=seeds, metavar='N', help='paired seeds 0 ... N - 1')
    parser.add_argument('--epochs', type=positive, metavar='N',
                        help='length (default: 30 of digits, 32 of letters, else 8)')
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'), metavar='DIR', help='of runs')
    parser.add_argument('--results', type=Path, default=Path('docs/results'), metavar='DIR', help='of tables, pictures')
    parser.add_argument('--train-flags', type=lambda text: tuple(shlex.split(text)), default=(), metavar='FLAGS',
                        help='further flags of train.py for all runs, in quotes after an equals sign')
    parser.add_argument('--jobs', type=positive, default=os.cpu_count(), metavar='N',
                        help='processes, of one thread each')


def single_thread() -> dict[str, str]:
    """Environment of a process that uses one core."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}


def execute(jobs: Sequence[tuple[str, Path, list[str]]], processes: int) -> None:
    """Run the commands, (title, folder, argv) each, whose folders are not done yet. Stop at the first that fails.

    A run that is started again resumes. If two benchmarks need the same run at the same time, the second one waits for
    it.

    Raises:
        SystemExit: If a command fails, with the end of its log, or if a folder was made by another command.
    """
    todo = []
    for title, folder, argv in jobs:
        for name in ('done.json', 'started.json'):
            path = folder / name
            if path.exists() and json.loads(path.read_text())['command'] != argv[1:]:
                sys.exit(f'{folder} was made by another command; remove it or give another --output')
        if not (folder / 'done.json').exists():
            todo.append((title, folder, argv))
    print(f'{len(jobs)} runs, {len(jobs) - len(todo)} of them done', file=sys.stderr, flush=True)
    failed: list[str] = []

    def start(job: tuple[str, Path, list[str]]) -> None:
        title, folder, command = job
        if failed:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / '.lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / 'done.json').exists():
                run(title, folder, command)

    def run(title: str, folder: Path, command: list[str]) -> None:
        write(folder / 'started.json', json.dumps(dict(command=command[1:])))
        begun = time.monotonic()
        checkpoint = folder / 'last.pth.tar'
        argv = [*command, '--resume', str(checkpoint)] if checkpoint.exists() else command
        with open(folder / 'log.txt', 'a') as log:
            code = subprocess.run(argv, stdout=log, stderr=log, env=single_thread(), cwd=ROOT).returncode
        if code:
            end = (folder / 'log.txt').read_text().splitlines()[-5:]
            failed.append('\n'.join([f'{title}: exit code {code}', *end]))
            return
        write(folder / 'done.json', json.dumps(dict(command=command[1:], seconds=time.monotonic() - begun)))
        print(f'{time.strftime("%H:%M:%S")}  {title}  {time.monotonic() - begun:.0f} s', file=sys.stderr, flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(start, todo))
    if failed:
        sys.exit(failed[0])


def train(runs: Iterable[Run], output: Path, processes: int) -> None:
    """Train the runs that are not finished yet."""
    output, jobs = output.resolve(), []
    for run in dict.fromkeys(runs):
        folder = run.folder(output)
        argv = [sys.executable, 'train.py', *run.command(), '--output', str(folder.parent), '--experiment', folder.name]
        jobs.append((f'{run.task} {run.name} seed {run.seed}', folder, argv))
    execute(jobs, processes)


def subnets_job(
        run: Run, output: Path, name: str, epochs: int, options: Sequence[str]) -> tuple[str, Path, list[str]]:
    """A job for `execute`: every group's subnet of a finished run, trained alone. It writes `subnets.json`."""
    source = run.folder(output).resolve()
    folder = source / name
    argv = [sys.executable, 'benchmarks/train_subnet.py', *run.command(), '--supernet', str(source / 'model'),
            '--results-file', str(folder / 'subnets.json'), '--epochs', str(epochs), *options]
    return f'{run.task} {name} seed {run.seed}', folder, argv


# -- reading finished runs ---------------------------------------------------------------------------------------------


def write(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file atomically: a text, or what a function writes to the path given to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        content(temporary) if callable(content) else temporary.write_text(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as CSV; the keys of the first are the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def group_rows(folder: Path) -> list[dict]:
    """Group, budget, MACs and top-1 of the subnets of a finished run, one per group."""
    rows = [row for row in read_csv(folder / 'budgets.csv') if row['name'].startswith('group')]
    return [dict(group=int(row['name'].split()[1]), budget=float(row['budget']), macs=int(row['macs']),
                 top1=float(row['top1'])) for row in rows]


def rows_at(run: Run, folder: Path) -> list[dict]:
    """`group_rows`, but always at the generator's archs for GROUPS budgets. The result is kept in the folder."""
    served = group_rows(folder)
    if not run.searches and len(served) == GROUPS:
        return served
    path = folder / f'generator_archs_{GROUPS}.json'
    if not path.exists():
        trained = Trained(run.command(), folder)
        write(path, json.dumps(trained.rows(trained.generator.propose_many(trained.groups.budgets))))
    return json.loads(path.read_text())


class Trained:
    """A finished run, loaded in this process: its network and generator, and the loaders of its flags.

    Args:
        command: Flags of `train.py`.
        folder: Holds `model`.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        sys.path.insert(0, str(ROOT))
        import torch
        from timm.data import resolve_input_data_config

        import timm_shiftnas
        from timm_shiftnas.method import BudgetGroups
        from timm_shiftnas.models import BatchNormCalibration, has_batch_norm
        from timm_shiftnas.training.data import create_calibration_loader, create_loaders, open_data
        from timm_shiftnas.training.flags import parse_args

        torch.set_num_threads(1)
        args = parse_args(list(command))
        # For a loader of held-out images without augmentation. As a flag, it would contradict some of the command's.
        args.sampler = 'uniform'
        self.net, self.generator = timm_shiftnas.load_supernet(folder / 'model')
        args.num_classes, self.device = self.net.num_classes, torch.device('cpu')
        data, config = open_data(args), resolve_input_data_config(self.net, vars(args))
        loaders = create_loaders(args, data, config, self.device)
        self.validation, self.held_out = loaders.validation, loaders.held_out
        self.training_images = self.calibration = None
        if has_batch_norm(self.net):
            self.training_images = create_calibration_loader(args, data, config, self.device)
            self.calibration = BatchNormCalibration(self.training_images, args.bn_images)
        self.groups, self.args = BudgetGroups.of_space(self.net.space, count=GROUPS), args

    def rows(self, archs: Sequence) -> list[dict]:
        """Group, budget, MACs and top-1 on the validation images of one arch per group."""
        from timm_shiftnas.evaluation.accuracy import evaluate_budgets

        rows = evaluate_budgets(
            self.net, self.groups, archs, self.validation, self.device, calibration=self.calibration)
        return [dict(group=k, budget=row['budget'], macs=row['macs'], top1=row['top1'])
                for k, row in enumerate(rows) if row['budget'] is not None]

    def top1(self, archs: Sequence) -> list[float]:
        """Top-1 of archs on the validation images."""
        from timm_shiftnas.evaluation.accuracy import evaluate_archs

        return [top1 for top1, _ in evaluate_archs(
            self.net, archs, self.validation, self.device, self.calibration)]

    def searched(self) -> list[dict]:
        """`rows` at the best arch of each group by held-out images, as at the end of a run with uniform sampling."""
        from timm_shiftnas.evaluation.search import search_archs

        archs = search_archs(
            self.net.space, self.generator, self.groups, self.args.search_samples, self.net, self.held_out,
            self.device, seed=self.args.seed, calibration=self.calibration)
        return self.rows(archs)


def seconds_per_epoch(folder: Path) -> float:
    """Median training time of an epoch, without evaluation."""
    return median(float(row['train_seconds']) for row in read_csv(folder / 'summary.csv'))


# -- pictures ----------------------------------------------------------------------------------------------------------


def label(ax: Any, title: str, x: str, y: str) -> None:
    """Title and axes of a picture."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc='left', fontweight='bold')
    ax.grid(color='#e4e6ea')
    ax.spines[['top', 'right']].set_visible(False)


# -- statistics --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of paired differences and the half width of its confidence interval (Student's t); NaN for one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(t.ppf(0.5 + level / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    return f'{mean(values):.2f} ± {stdev(values):.2f}' if len(values) > 1 else f'{values[0]:.2f}'


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [header, ['---'] * len(header), *lines])


def mean_interval(values: Sequence[float]) -> str:
    """Mean and the half width of its interval, without one for a single value."""
    mean_, half = interval(values)
    return f'{mean_:.2f}' if math.isnan(half) else f'{mean_:.2f} ± {half:.2f}'


def difference(values: Sequence[float]) -> str:
    mean_, half = interval(values)
    return f'{mean_:+.2f} ± {half:.2f}'


def paired_table(scores: dict[str, dict[int, list[float]]], reference: str) -> str:
    """Table of top-1 by method, at both ends and as the mean over budgets, with paired differences from a reference.

    Each difference has its 95% confidence interval for a single comparison: one in twenty is off by chance.

    Args:
        scores: Per method and seed the top-1 at every budget, smallest first.
        reference: The method to compare with, over the seeds that both have.
    """
    lines = []
    for method, by_seed in scores.items():
        cells = [method, str(len(by_seed))]
        for score in (lambda tops: tops[0], lambda tops: tops[-1], mean):
            cells.append(spread([score(tops) for tops in by_seed.values()]))
            paired = [score(tops) - score(scores[reference][seed]) for seed, tops in by_seed.items()
                      if seed in scores[reference]]
            cells.append('' if method == reference or not paired else difference(paired))
        lines.append(cells)
    header = ['method', 'seeds', 'smallest budget', f'vs {reference}', 'largest budget', f'vs {reference}',
              'mean over budgets', f'vs {reference}']
    return markdown_table(header, lines)
