"""Compare samplers: uniform, sandwich rule, generator with even P, three probability shifts, and rivals.

    python benchmarks/compare_samplers.py --task digits
    python benchmarks/compare_samplers.py --task glyphs

Rivals are AttentiveNAS (best-up and worst-up of 3), FocusFormer and PreNAS (`timm_shiftnas/method/samplers`).

Seeds are paired. Samplers are compared at equal images seen, and at the training time of uniform sampling (`--match
time`). Uniform sampling, the sandwich rule and AttentiveNAS are reported twice: at the archs of a generator that was
fitted to budgets alone, and at the best of 25 archs per budget by held-out accuracy. `--alone` also trains every
group's subnet alone: from scratch with all steps, and fine-tuned from inherited weights for a fifth of them. Writes
`samplers_TASK.csv`, a table `samplers_TASK.md` and pictures.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import runs
from runs import FINE_TUNING, SAMPLERS, Run

ALONE = 'generator'  # the sampler whose archs are trained alone
COLOURS = dict(zip(
    ('uniform', 'uniform, searched', 'sandwich', 'sandwich, searched', 'generator', 'hypergradient', 'grad_norm',
     'variation', 'focusformer', 'prenas', 'best-up', 'best-up, searched', 'worst-up', 'worst-up, searched',
     'from scratch', 'fine-tuned'),
    ('#b0b5bd', '#6f7680', '#e3c08a', '#b07d2b', '#1f5fa8', '#c23b3b', '#3f9a5f', '#8a4fb5', '#17becf', '#7f9f1f',
     '#f2a7c3', '#b0306a', '#a9c9e8', '#3a7fc1', '#222222', '#d96fae')))


def rows_of(run: Run, folder: Path, match: str) -> list[dict]:
    """Rows of a run: one per group, two where archs are searched."""
    common = dict(task=run.task, match=match, seed=run.seed, epochs=run.epochs)
    kinds = {run.name: runs.group_rows(folder)}
    if run.searches:
        kinds = {run.name: runs.rows_at(run, folder), f'{run.name}, searched': runs.group_rows(folder)}
    return [dict(common, method=kind, **row) for kind, rows in kinds.items() for row in rows]


def alone(args: argparse.Namespace, trained: list[Run]) -> list[dict]:
    """Train every group's subnet alone, from scratch and from inherited weights; returns the rows of both."""
    jobs, outputs = [], []
    for run in trained:
        for method, epochs, options in (('from scratch', run.epochs, ['--from-scratch']),
                                        ('fine-tuned', max(run.epochs // 5, 2), FINE_TUNING)):
            jobs.append(runs.subnets_job(run, args.output, method.replace(' ', '-'), epochs, options))
            outputs.append((run, method, epochs, jobs[-1][1] / 'subnets.json'))
    runs.execute(jobs, args.jobs)
    return [dict(task=run.task, match='images', seed=run.seed, epochs=epochs, method=method,
                 **{name: row[name] for name in ('group', 'budget', 'macs', 'top1')})
            for run, method, epochs, path in outputs for row in json.loads(path.read_text())]


def scores(rows: list[dict], match: str) -> dict[str, dict[int, list[float]]]:
    found: dict = defaultdict(dict)
    for row in rows:
        if row['match'] == match:
            found[row['method']].setdefault(row['seed'], []).append(row['top1'])
    return dict(found)


def plot_curves(path: Path, rows: list[dict], match: str, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=100, layout='constrained')
    ax = figure.add_subplot()
    for method, by_seed in scores(rows, match).items():
        lines = [[row for row in rows if (row['match'], row['method'], row['seed']) == (match, method, seed)]
                 for seed in by_seed]
        macs = [mean(row['macs'] for row in column) / 1e6 for column in zip(*lines)]
        tops = [[row['top1'] for row in column] for column in zip(*lines)]
        means = [mean(column) for column in tops]
        ax.plot(macs, means, '-o', color=COLOURS[method], markersize=4, linewidth=1.6, label=method)
        if len(lines) > 1:
            errors = [stdev(column) for column in tops]
            ax.fill_between(macs, [m - e for m, e in zip(means, errors)], [m + e for m, e in zip(means, errors)],
                            color=COLOURS[method], alpha=0.10, linewidth=0)
    runs.label(ax, title, 'MMACs per image', 'top-1 accuracy (%), mean ± standard deviation over seeds')
    ax.legend(loc='lower right', frameon=False, ncols=2)
    runs.write(path, lambda file: figure.savefig(file, format='png'))


def plot_shifts(path: Path, trained: list[tuple[Run, Path]]) -> None:
    """Plot P over time: a row of axes per signal, a column per seed, a line per group."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(run.name for run, _ in trained))
    seeds = sorted({run.seed for run, _ in trained})
    figure = Figure(figsize=(9, 2.2 * len(methods)), dpi=100, layout='constrained')
    axes = figure.subplots(len(methods), len(seeds), sharex=True, sharey=True, squeeze=False)
    for run, folder in trained:
        history = runs.read_csv(folder / 'shift.csv')
        names = [name for name in history[0] if name != 'update']
        ax = axes[methods.index(run.name)][seeds.index(run.seed)]
        for k, name in enumerate(names):
            ax.plot([int(row['update']) for row in history], [float(row[name]) * len(names) for row in history],
                    color=colormaps['viridis'](k / max(len(names) - 1, 1)), linewidth=1.3, label=name)
        ax.set_title(f'{run.name}, seed {run.seed}', loc='left', fontsize=9)
        ax.axhline(1, color='#222222', linewidth=0.6, linestyle=':')
        ax.spines[['top', 'right']].set_visible(False)
    axes[-1][0].set_xlabel('training update')
    axes[0][0].set_ylabel('P relative to uniform')
    axes[0][-1].legend(loc='upper left', fontsize=6, ncols=2, frameon=False)
    runs.write(path, lambda file: figure.savefig(file, format='png'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_arguments(parser)
    parser.add_argument('--samplers', nargs='+', default=list(SAMPLERS), choices=list(SAMPLERS), metavar='NAME')
    parser.add_argument('--reference', default='generator', choices=list(SAMPLERS), metavar='NAME',
                        help='method that differences are taken from')
    parser.add_argument('--match', nargs='+', default=['images', 'time'], choices=('images', 'time'),
                        help='equal images seen, equal training time, or both')
    parser.add_argument('--alone', action='store_true', help="also train every group's subnet alone")
    args = parser.parse_args()
    if 'time' in args.match and 'uniform' not in args.samplers:
        parser.error('--match time takes the time of uniform sampling: add uniform to --samplers, or --match images')
    if args.reference not in args.samplers:
        parser.error(f'--reference {args.reference} is not among --samplers {" ".join(args.samplers)}')
    if args.alone and ALONE not in args.samplers:
        parser.error(f'--alone trains the archs of {ALONE}: add it to --samplers')
    epochs = args.epochs or runs.EPOCHS[args.task]
    equal_images = [Run(name, args.task, (*SAMPLERS[name], *args.train_flags), seed, epochs)
                    for seed in range(args.seeds) for name in args.samplers]
    runs.train(equal_images, args.output, args.jobs)
    done = [(run, run.folder(args.output), 'images') for run in equal_images]
    lengths = {}
    if 'time' in args.match:
        # the fastest seed: other programs disturbed it least
        cost = {name: min(runs.seconds_per_epoch(folder) for run, folder, _ in done if run.name == name)
                for name in args.samplers}
        lengths = {name: max(round(epochs * cost['uniform'] / cost[name]), 1) for name in args.samplers}
        # measured times vary from run to run; the first ones are kept, so that finished runs stay valid
        kept = args.output / args.task / f'equal_time_{epochs}.json'
        lengths |= json.loads(kept.read_text()) if kept.exists() else {}
        runs.write(kept, json.dumps(lengths))
        print('epochs at the time of uniform sampling:', lengths, file=sys.stderr)
        equal_time = [Run(name, args.task, (*SAMPLERS[name], *args.train_flags), seed, lengths[name])
                      for seed in range(args.seeds) for name in args.samplers if lengths[name] != epochs]
        runs.train(equal_time, args.output, args.jobs)
        done += [(run, run.folder(args.output), 'time') for run in equal_time]
        done += [(run, run.folder(args.output), 'time') for run in equal_images if lengths[run.name] == epochs]
    rows = [row for run, folder, match in done for row in rows_of(run, folder, match)]
    if args.alone:
        rows += alone(args, [run for run in equal_images if run.name == ALONE])
    names = list(COLOURS)
    rows.sort(key=lambda row: (row['match'], names.index(row['method']), row['seed'], row['group']))
    runs.write_csv(args.results / f'samplers_{args.task}.csv', [
        dict(task=row['task'], match=row['match'], method=row['method'], seed=row['seed'], epochs=row['epochs'],
             group=row['group'], budget=row['budget'], macs=row['macs'], top1=round(row['top1'], 3)) for row in rows])
    tables = [f'Equal images seen ({epochs} epochs):', runs.paired_table(scores(rows, 'images'), args.reference)]
    plot_curves(args.results / f'samplers_{args.task}.png', rows, 'images', f'{args.task}: equal images seen')
    if lengths:
        said = ', '.join(f'{name} {length}' for name, length in lengths.items())
        tables += [f'Equal training time (epochs: {said}):', runs.paired_table(scores(rows, 'time'), args.reference)]
        plot_curves(args.results / f'samplers_{args.task}_time.png', rows, 'time', f'{args.task}: equal training time')
    shifts = [(run, folder) for run, folder, match in done
              if match == 'images' and run.name in ('hypergradient', 'grad_norm', 'variation')]
    if shifts:
        plot_shifts(args.results / f'shift_{args.task}.png', shifts)
    text = '\n\n'.join(tables) + '\n'
    runs.write(args.results / f'samplers_{args.task}.md', text)
    print(text)


if __name__ == '__main__':
    main()
