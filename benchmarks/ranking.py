"""Rank correlation (Kendall, Spearman) of inherited accuracy with that of training alone, for each sampler.

    python benchmarks/ranking.py --task letters

All samplers rank the same uniformly drawn archs by their accuracy with inherited weights. Each arch is also trained
alone, for all epochs, with `--alone-seeds` seeds; the mean of these is what rankings are compared with. Two baselines:
the ranking by MACs, which a supernet has to beat, and the ranking by training alone with one seed, compared with
another seed's, which shows the limit that noise sets to any ranking. Supernets are those of `compare_samplers.py`.
Writes `ranking_TASK.csv` and a table `.md`.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import runs
from runs import SAMPLERS, Run

PARTS = 2  # processes that share the archs of one seed
ALONE = 'alone'


def draw(model_directory: Path, count: int) -> list[dict]:
    """Draw different archs uniformly; returns their dicts."""
    sys.path.insert(0, str(runs.ROOT))
    import timm_shiftnas
    from timm_shiftnas.utils import stream

    space = timm_shiftnas.load_supernet(model_directory)[0].space
    if count > space.size:
        sys.exit(f'--archs {count} is more than the {space.size} archs of the space')
    noise, archs = stream(0, 'ranking', count), {}
    while len(archs) < count:
        archs[space.sample(noise)] = None
    return [arch.to_dict() for arch in archs]


def train_alone(run: Run, archs: list[dict], args: argparse.Namespace) -> list[dict]:
    """Train every arch alone with each seed; returns the rows: arch, MACs and top-1, in the order of archs.

    Args:
        run: A run whose supernet has the archs; its data, recipe and length are taken.
        archs: Their dicts.
        args: Arguments of the program.
    """
    source, jobs, files = run.folder(args.output).resolve(), [], {}
    for seed in range(args.alone_seeds):
        command = Run(run.name, run.task, run.flags, seed, run.epochs).command()
        for part in range(min(PARTS, len(archs))):
            folder = source.parent / f'ranking-{len(archs)}' / f'seed{seed}-{part}'
            runs.write(folder / 'archs.json', json.dumps(archs[part::PARTS]))
            files[seed, part] = folder / 'subnets.json'
            jobs.append((f'{run.task} {len(archs)} archs alone, seed {seed}, {part + 1}/{PARTS}', folder, [
                sys.executable, 'benchmarks/train_subnet.py', *command, '--supernet', str(source / 'model'),
                '--archs', str(folder / 'archs.json'), '--results-file', str(files[seed, part]), '--from-scratch']))
    runs.execute(jobs, args.jobs)
    rows = []
    for seed in range(args.alone_seeds):
        parts = [json.loads(files[seed, part].read_text()) for part in range(min(PARTS, len(archs)))]
        rows += [dict(method=ALONE, seed=seed, **{name: row[name] for name in ('macs', 'top1', 'arch')})
                 for row in (parts[number % PARTS][number // PARTS] for number in range(len(archs)))]
    return rows


def inherited(run: Run, archs: list[dict], args: argparse.Namespace) -> list[dict]:
    """Rows of the archs with the weights that they inherit from a supernet. The result is kept in its folder."""
    folder = run.folder(args.output)
    path = folder / f'ranking_{len(archs)}.json'
    if not path.exists():
        trained = runs.Trained(run.command(), folder)
        found = [trained.net.space.from_dict(arch) for arch in archs]
        runs.write(path, json.dumps([
            dict(macs=trained.net.macs(arch), top1=top1, arch=arch.to_dict())
            for arch, top1 in zip(found, trained.top1(found))]))
    return [dict(method=run.name, seed=run.seed, **row) for row in json.loads(path.read_text())]


def correlations(rows: list[dict]) -> str:
    """A table with a line for each sampler, and for the baselines: tau and rho, with 95% intervals over seeds."""
    from scipy.stats import kendalltau, spearmanr

    tops: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        tops[row['method']][row['seed']].append(row['top1'])
    alone = tops.pop(ALONE)
    truth = [mean(column) for column in zip(*alone.values())]
    pairs: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {
        name: [(values, truth) for values in by_seed.values()] for name, by_seed in tops.items()}
    pairs['MACs'] = [([row['macs'] for row in rows[:len(truth)]], truth)]
    if len(alone) > 1:
        pairs['one training alone, with another seed'] = list(combinations(alone.values(), 2))
    lines = []
    for name, each in pairs.items():
        cells = [[statistic(x, y).statistic for x, y in each] for statistic in (kendalltau, spearmanr)]
        below = f'{mean(mean(truth) - mean(values) for values, _ in each):.2f}' if name in tops else ''
        lines.append([name, str(len(each)), *map(runs.mean_interval, cells), below])
    return runs.markdown_table(
        ['ranking by', 'seeds or pairs', 'tau', 'rho', 'points below training alone'], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_arguments(parser, seeds=5)
    parser.add_argument('--samplers', nargs='+', default=list(SAMPLERS), metavar='NAME', choices=list(SAMPLERS))
    parser.add_argument('--archs', type=runs.positive, default=30, metavar='N')
    parser.add_argument('--alone-seeds', type=runs.positive, default=2, metavar='N', help='runs for each arch')
    args = parser.parse_args()
    epochs = args.epochs or runs.EPOCHS[args.task]
    trained = [Run(name, args.task, (*SAMPLERS[name], *args.train_flags), seed, epochs)
               for seed in range(args.seeds) for name in args.samplers]
    runs.train(trained, args.output, args.jobs)
    archs = draw(trained[0].folder(args.output) / 'model', args.archs)
    rows = train_alone(trained[0], archs, args)
    for name in args.samplers:
        rows += [row for run in trained if run.name == name for row in inherited(run, archs, args)]
    runs.write_csv(args.results / f'ranking_{args.task}.csv', [
        dict(task=args.task, **{**row, 'top1': round(row['top1'], 3), 'arch': json.dumps(row['arch'])})
        for row in rows])
    text = f'{args.task}, {epochs} epochs, {len(archs)} archs; means over seeds and their 95% intervals:\n\n'
    text += correlations(rows) + '\n'
    runs.write(args.results / f'ranking_{args.task}.md', text)
    print(text)


if __name__ == '__main__':
    main()
