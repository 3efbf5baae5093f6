"""Ablations, one command each: what a setting of ShiftNAS changes, over paired seeds.

    python benchmarks/ablations.py group-width
    python benchmarks/ablations.py room

All variants of an experiment are measured at the same eight budgets. Differences are paired with the first variant.
Writes `ablation_EXPERIMENT_TASK.csv` and a table `.md`. `room` measures what any probability shift could gain: it
trains with a fixed P that gives one group twice its share or everything, tilts to one end, or favours a few groups.
`shift` takes many seeds: a learned P against an even one, with a fixed tilt as a difference that must be seen.
"""
from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import runs
from runs import FITTED, GROUPS, SAMPLERS, TILT, Run, folder_name

SHIFT, EVEN = SAMPLERS['hypergradient'], SAMPLERS['generator']


def weights(*values: float) -> list[str]:
    return [*EVEN, '--group-weights', *map(str, values)]


def boosted(group: int, factor: float) -> list[str]:
    """P with `factor` times the even share for one group; the others share the rest."""
    other = (GROUPS - factor) / (GROUPS - 1)
    return weights(*(factor if k == group else other for k in range(1, GROUPS + 1)))


# experiment -> variant -> flags; the first variant is the reference
EXPERIMENTS = {
    'group-width': {
        '8 groups': SHIFT, '4 groups': [*SHIFT, '--num-groups', '4'], '16 groups': [*SHIFT, '--num-groups', '16'],
    },
    'shift-interval': {
        'no shift': EVEN, 'every 20': SHIFT,
        **{f'every {n}': [*SHIFT, '--shift-interval', str(n)] for n in (50, 100, 500)},
    },
    'estimator': {'no shift': EVEN, **{name: SAMPLERS[name] for name in ('hypergradient', 'grad_norm', 'variation')}},
    'generator': {
        'trained': EVEN, 'fitted only': [*EVEN, '--generator-interval', '0'],
    },
    'lambda': {
        'lambda 1000': EVEN,
        **{f'lambda {n}': [*EVEN, '--resource-weight', str(n)] for n in (100, 10_000)},
    },
    'shift': {
        'even': [*EVEN, *FITTED], 'hypergradient': [*SHIFT, *FITTED],
        'tilted to small': [*EVEN, *FITTED, *TILT],
        'trained generator': EVEN,
    },
    'warmup-sampler': {
        'generator': SHIFT, 'uniform': [*SHIFT, '--warmup-sampler', 'uniform'],
    },
    'room': {
        'even': EVEN,
        **{f'group {k} twice': boosted(k, 2) for k in (1, 3, 6, 8)},
        **{f'group {k} alone': boosted(k, GROUPS) for k in (1, 3, 6, 8)},
        'tilted to small': weights(*(round(2 ** (1 - 2 * k / 7), 3) for k in range(8))),  # twice to half the even share
        'tilted to large': weights(*(round(2 ** (2 * k / 7 - 1), 3) for k in range(8))),
        'tilted more to large': weights(*(round(4 ** (2 * k / 7 - 1), 3) for k in range(8))),
        'mostly groups 1, 8': weights(3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 3),
        'mostly groups 1, 6': weights(3, 0.1, 0.1, 0.1, 0.1, 4, 0.1, 0.1),
        'mostly groups 1, 3, 7': weights(2, 0.1, 2, 0.1, 0.1, 0.1, 3, 0.1),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('experiment', choices=tuple(EXPERIMENTS))
    runs.add_arguments(parser)
    parser.add_argument('--first-seed', type=int, default=0, metavar='N',
                        help='train seeds from this on; those below are read from the CSV of an earlier series')
    parser.add_argument('--variants', nargs='+', metavar='NAME', help='those to train; tables have all that are done')
    args = parser.parse_args()
    epochs = args.epochs or runs.EPOCHS[args.task]
    variants = EXPERIMENTS[args.experiment]
    for name in args.variants or ():
        if name not in variants:
            parser.error(f'--variants {name!r} is unknown; {args.experiment} has {", ".join(map(repr, variants))}')
    trained = {(name, seed): Run(folder_name(flags), args.task, (*flags, *args.train_flags), seed, epochs)
               for seed in range(args.first_seed, args.seeds) for name, flags in variants.items()}
    runs.train([run for (name, _), run in trained.items() if name in (args.variants or variants)],
               args.output, args.jobs)
    path = args.results / f'ablation_{args.experiment}_{args.task}.csv'
    found = {key: rows for key, rows in written(path, epochs).items() if key[1] < args.first_seed}
    found |= {key: runs.rows_at(run, run.folder(args.output)) for key, run in trained.items()
              if (run.folder(args.output) / 'done.json').exists()}
    scores: dict[str, dict[int, list[float]]] = {
        variant: {seed: [row['top1'] for row in rows] for (name, seed), rows in found.items() if name == variant}
        for variant in variants if any(name == variant for name, _ in found)}
    runs.write_csv(path, [
        dict(task=args.task, experiment=args.experiment, variant=name, seed=seed, epochs=epochs,
             **{**row, 'top1': round(row['top1'], 3)})
        for name, by_seed in scores.items() for seed in by_seed for row in found[name, seed]])
    text = f'{args.task}, {epochs} epochs:\n\n' + runs.paired_table(scores, next(iter(scores))) + '\n'
    if args.experiment == 'room':
        text += '\n' + room_table(scores) + '\n'
    runs.write(path.with_suffix('.md'), text)
    print(text)


def written(path: Path, epochs: int) -> dict[tuple[str, int], list[dict]]:
    """Rows of runs of this length in the CSV of an earlier series, by variant and seed."""
    found: dict[tuple[str, int], list[dict]] = {}
    for row in runs.read_csv(path) if path.exists() else ():
        if int(row['epochs']) == epochs:
            found.setdefault((row['variant'], int(row['seed'])), []).append(dict(
                group=int(row['group']), budget=float(row['budget']), macs=int(row['macs']), top1=float(row['top1'])))
    return found


def room_table(scores: dict[str, dict[int, list[float]]]) -> str:
    """Table of what a group gains from its share and what the others gain on average, paired with even P."""
    lines = []
    for name, by_seed in scores.items():
        if not name.startswith('group'):
            continue
        group = int(name.split()[1]) - 1
        pairs = [(values, scores['even'][seed]) for seed, values in by_seed.items()]
        own = runs.difference([values[group] - even[group] for values, even in pairs])
        others = runs.difference([
            mean(v for k, v in enumerate(values) if k != group) - mean(v for k, v in enumerate(even) if k != group)
            for values, even in pairs])
        lines.append([name, own, others])
    return runs.markdown_table(['share', 'that group gains (95%)', 'the others gain (95%)'], lines)


if __name__ == '__main__':
    main()
