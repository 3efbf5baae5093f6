"""Top-1 against training time, for runs of several lengths.

    python benchmarks/price.py --task letters --lengths 4 8 16 32

A supernet is trained once for all budgets; the alternative is a network for each of the eight budgets, each trained
alone. Prices are in units of one run that trains the largest network alone, of the greatest length. They are training
times: the median epoch times their number, of the seed that other programs disturbed least. The fit of a generator,
evaluation and search are not included. Only times of one machine compare, so give a series its own --output.
Supernets with uniform sampling, the sandwich rule included, are evaluated at the best of 25 archs per budget on
held-out images, the others at the archs of the generator. In-place distillation begins after half of the training:
before that, the largest arch has nothing to teach.

Writes `price_TASK.csv`, a table `.md` and a picture `.png`.
"""
from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, stdev

import runs
from runs import FITTED, GROUPS, SAMPLERS, Run, folder_name

DISTILLED = 'sandwich, distilled'
SUPERNETS = {
    'generator': [*SAMPLERS['generator'], *FITTED],
    'generator, learned P': [*SAMPLERS['hypergradient'], *FITTED],
    'uniform': SAMPLERS['uniform'],
    'sandwich': SAMPLERS['sandwich'],
    DISTILLED: [*SAMPLERS['sandwich'], '--inplace-distillation'],
    **{name: SAMPLERS[name] for name in ('focusformer', 'prenas', 'best-up', 'worst-up')},
}
ARCHS = 'generator'  # its archs are those that are trained alone
ALONE = f'{GROUPS} networks alone'
COLOURS = dict(zip((*SUPERNETS, ALONE), (
    '#1f5fa8', '#c23b3b', '#6f7680', '#b07d2b', '#3f9a5f', '#7a52a3', '#c2639b', '#4aa3b5', '#8a5a44', '#222222')))


def supernet_row(run: Run, folder: Path, method: str) -> dict:
    """Accuracies of a supernet, and the seconds of its training."""
    tops = [row['top1'] for row in runs.group_rows(folder)]
    return row_of(method, run.epochs, run.seed, runs.seconds_per_epoch(folder) * run.epochs, tops)


def row_of(method: str, epochs: int, seed: int, seconds: float, tops: list[float]) -> dict:
    return dict(method=method, epochs=epochs, seed=seed, seconds=seconds, smallest=tops[0], largest=tops[-1],
                top1=mean(tops))


def run_of(method: str, epochs: int, seed: int, args: argparse.Namespace) -> Run:
    flags = SUPERNETS[method]
    if method == DISTILLED:
        flags = [*flags, '--shift-warmup-epochs', f'{epochs / 2:g}']
    return Run(folder_name(flags), args.task, (*flags, *args.train_flags), seed, epochs)


def train_alone(args: argparse.Namespace, lengths: list[int], trained: list[Run]) -> tuple[list[dict], float]:
    """Rows of the networks that are trained alone, and the least seconds of the largest at the greatest length."""
    jobs, found = [], []
    for run in trained:
        for epochs in lengths:
            jobs.append(runs.subnets_job(run, args.output, f'alone-{epochs}epochs', epochs, ['--from-scratch']))
            found.append((run.seed, epochs, jobs[-1][1] / 'subnets.json'))
    runs.execute(jobs, args.jobs)
    rows, largest = [], []
    for seed, epochs, path in found:
        subnets = json.loads(path.read_text())
        rows.append(row_of(ALONE, epochs, seed, sum(each['seconds'] for each in subnets),
                           [each['top1'] for each in subnets]))
        largest += [subnets[-1]['seconds']] if epochs == max(lengths) else []
    return rows, min(largest)


def priced(rows: list[dict], unit: float) -> list[dict]:
    """Rows with the price of their method and length: the least seconds of the seeds, divided by the unit."""
    least: dict[tuple[str, int], float] = {}
    for row in rows:
        kind = row['method'], row['epochs']
        least[kind] = min(row['seconds'], least.get(kind, math.inf))
    return [dict(row, price=least[row['method'], row['epochs']] / unit) for row in rows]


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds by method and length, the cheapest first."""
    groups: dict = {}
    for row in rows:
        groups.setdefault((row['method'], row['epochs'], row['price']), []).append(row)
    return [dict(method=method, epochs=epochs, price=price, seeds=len(each),
                 deviation=deviation([row['top1'] for row in each]),
                 **{name: mean(row[name] for row in each) for name in ('smallest', 'largest', 'top1')})
            for (method, epochs, price), each in sorted(groups.items(), key=lambda item: item[0][2])]


def deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.


def plot(path: Path, points: list[dict], title: str) -> None:
    """Mean top-1 against price, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=100, layout='constrained')
    ax = figure.add_subplot()
    for method in dict.fromkeys(point['method'] for point in points):
        own = [point for point in points if point['method'] == method]
        ax.errorbar([point['price'] for point in own], [point['top1'] for point in own],
                    [point['deviation'] for point in own], fmt='-o', color=COLOURS[method], markersize=4, capsize=2,
                    linewidth=1.6, label=method)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}')
    runs.label(ax, title, 'training time, in trainings of the largest network alone',
               'top-1 accuracy (%), mean over eight budgets')
    ax.legend(loc='lower right', frameon=False)
    runs.write(path, lambda file: figure.savefig(file, format='png'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_arguments(parser)
    parser.add_argument('--lengths', type=runs.positive, nargs='+', metavar='N', help='epochs (default: --epochs)')
    parser.add_argument('--methods', nargs='+', default=list(SUPERNETS), choices=list(SUPERNETS), metavar='NAME')
    parser.set_defaults(jobs=1)  # runs at the same time take longer
    args = parser.parse_args()
    lengths = args.lengths or [args.epochs or runs.EPOCHS[args.task]]
    trained = {(method, epochs, seed): run_of(method, epochs, seed, args)
               for seed in range(args.seeds) for method in dict.fromkeys((ARCHS, *args.methods)) for epochs in lengths}
    runs.train(trained.values(), args.output, args.jobs)
    rows = [supernet_row(run, run.folder(args.output), method) for (method, _, _), run in trained.items()]
    alone, unit = train_alone(args, lengths, [trained[ARCHS, max(lengths), seed] for seed in range(args.seeds)])
    rows = priced([*rows, *alone], unit)
    name = f'price_{args.task}'
    runs.write_csv(args.results / f'{name}.csv', [
        {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows])
    points = summary(rows)
    text = runs.markdown_table(
        ['method', 'epochs', 'seeds', 'price', 'smallest budget', 'largest budget', 'mean over budgets'],
        [[point['method'], str(point['epochs']), str(point['seeds']), f'{point["price"]:.2f}',
          *(f'{point[key]:.2f}' for key in ('smallest', 'largest', 'top1'))] for point in points]) + '\n'
    runs.write(args.results / f'{name}.md', text)
    plot(args.results / f'{name}.png', points, f'{args.task}: what accuracy costs')
    print(text)


if __name__ == '__main__':
    main()
