"""Does inherited accuracy rank archs as training them alone does? Kendall's tau and Spearman's rho per sampler.

    python benchmarks/ranking.py --task glyphs

All samplers rank the same uniformly drawn archs, by accuracy with inherited weights, after fine-tuning for a quarter of
the epochs, and after training from scratch for all epochs. Supernets are those of `compare_samplers.py`. The ranking by
MACs alone is the baseline that a supernet has to beat. Writes `ranking_TASK.csv` and a table `.md`.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import runs
from runs import FINE_TUNING, SAMPLERS, Run

PARTS = 2  # processes that share the archs of one supernet


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


PAIRS = (('inherited', 'fine_tuned'), ('inherited', 'from_scratch'), ('macs', 'fine_tuned'), ('macs', 'from_scratch'))


def correlations(rows: list[dict]) -> str:
    """A table with a line for each sampler: means over seeds of tau and rho, with their 95% intervals."""
    from scipy.stats import kendalltau, spearmanr

    lines = []
    for sampler in dict.fromkeys(row['sampler'] for row in rows):
        seeds = [[row for row in rows if (row['sampler'], row['seed']) == (sampler, seed)]
                 for seed in sorted({row['seed'] for row in rows if row['sampler'] == sampler})]
        cells = []
        for x, y in PAIRS:
            for statistic in (kendalltau, spearmanr):
                values = [statistic([row[x] for row in each], [row[y] for row in each]).statistic for each in seeds]
                cells.append('{:.2f} ± {:.2f}'.format(*runs.interval(values)))
        lines.append([sampler, str(len(seeds)), str(len(seeds[0])), *map(' / '.join, zip(cells[::2], cells[1::2]))])
    return runs.markdown_table(
        ['sampler', 'seeds', 'archs', 'inherited, fine-tuned', 'inherited, from scratch', 'MACs, fine-tuned',
         'MACs, from scratch'], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_arguments(parser, seeds=5)
    parser.add_argument('--samplers', nargs='+', default=list(SAMPLERS), metavar='NAME', choices=list(SAMPLERS))
    parser.add_argument('--archs', type=runs.positive, default=30, metavar='N')
    args = parser.parse_args()
    epochs = args.epochs or runs.EPOCHS[args.task]
    trained = [Run(name, args.task, (*SAMPLERS[name], *args.train_flags), seed, epochs)
               for seed in range(args.seeds) for name in args.samplers]
    runs.train(trained, args.output, args.jobs)
    archs = draw(trained[0].folder(args.output) / 'model', args.archs)
    jobs, files = [], {}
    for run in trained:
        source = run.folder(args.output).resolve()
        kinds = {'fine_tuned': (max(epochs // 4, 2), FINE_TUNING)}
        if run.name == trained[0].name:
            kinds['from_scratch'] = epochs, ['--from-scratch']  # does not depend on the sampler: once per seed
        for kind, (length, options) in kinds.items():
            for part in range(PARTS):
                folder = source / f'ranking-{kind}-{len(archs)}-{part}'
                runs.write(folder / 'archs.json', json.dumps(archs[part::PARTS]))
                jobs.append((f'{run.name} seed {run.seed} {kind} {part + 1}/{PARTS}', folder, [
                    sys.executable, 'benchmarks/train_subnet.py', *run.command(), '--supernet', str(source / 'model'),
                    '--archs', str(folder / 'archs.json'), '--results-file', str(folder / 'subnets.json'),
                    '--epochs', str(length), *options]))
                files.setdefault((run.name if kind == 'fine_tuned' else None, run.seed, kind), []).append(
                    folder / 'subnets.json')
    runs.execute(jobs, args.jobs)
    results = {key: [row for path in paths for row in json.loads(path.read_text())] for key, paths in files.items()}
    rows = []
    for run in trained:
        alone = {json.dumps(row['arch']): row['top1'] for row in results[None, run.seed, 'from_scratch']}
        rows += [dict(task=run.task, sampler=run.name, seed=run.seed, macs=row['macs'],
                      inherited=round(row['inherited'], 3), fine_tuned=round(row['top1'], 3),
                      from_scratch=round(alone[json.dumps(row['arch'])], 3), arch=json.dumps(row['arch']))
                 for row in results[run.name, run.seed, 'fine_tuned']]
    runs.write_csv(args.results / f'ranking_{args.task}.csv', rows)
    title = f"{args.task}, {epochs} epochs, Kendall's tau / Spearman's rho, means over seeds and their 95% intervals"
    text = f'{title}:\n\n{correlations(rows)}\n'
    runs.write(args.results / f'ranking_{args.task}.md', text)
    print(text)


if __name__ == '__main__':
    main()
