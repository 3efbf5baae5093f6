"""Compare ways to adapt a trained network of timm to all budgets, also with training its subnets alone.

    python benchmarks/compare_elastic.py --network vit
    python benchmarks/compare_elastic.py --network cnn

For every seed, a plain network of timm is trained on rendered letters, made elastic, and adapted in several ways.
Seeds are paired: the same base, images and order of images. `pruned alone` takes the archs of the groups out of the
sorted base, as people do today, and fine-tunes each alone: with as many steps as the whole adaptation has, and with
those of one epoch. `from scratch` trains the same supernet without a base, for as many epochs as base and adaptation
have together. `--search` also takes the best of 25 archs for each group by held-out images, as uniform sampling always
does, instead of the generator's proposals. Finished runs are kept, so that the series can be stopped and started again;
so are the rows that the CSV in `--results` has from an earlier series.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import runs

COMMON = '''
    --workers 0 --batch-size 64 --opt muon --warmup-epochs 1 --warmup-lr 5e-4 --smoothing 0.1 --hflip 0
    --color-jitter 0 --scale 0.9 1 --ratio 1 1 --dataset glyphs --glyph-images 8000 --glyph-difficulty 0.2 --img-size 32
    --checkpoint-hist 1 --log-interval 1000'''.split()
BASES = dict(
    vit='--model elastic_vit_subnet --model-kwargs base=test_vit patch_size=8'.split(),
    cnn='--model elastic_cnn_subnet --model-kwargs base=test_efficientnet'.split())
ELASTIC = dict(
    vit='--elastic test_vit --model-kwargs patch_size=8'.split(),
    cnn='--elastic test_efficientnet'.split())
SCRATCH = {network: ['--model', 'elastic_supernet', *flags[2:]] for network, flags in BASES.items()}
ADAPT = '--held-out 0.05 --num-groups 8 --shift-interval 20 --shift-lr 0.1 --shift-warmup-epochs 0'.split()
LEARNED = '--shift hypergradient --generator-interval 0'.split()
EVEN = '--shift none --generator-interval 0'.split()
UNIFORM = '--shift none --sampler uniform'.split()
SANDWICH = '--sandwich --archs-per-step 4 --inplace-distillation'.split()
METHODS = {
    'even': EVEN,
    'hypergradient': LEARNED,
    'not sorted': [*LEARNED, '--elastic-sort', 'none'],
    'sorted by magnitude': [*LEARNED, '--elastic-sort', 'magnitude'],
    'teacher': [*LEARNED, '--kd-model', 'base'],
    'curriculum': [*LEARNED, '--elastic-warmup', '2'],
    'learned, sandwich, in-place': [*LEARNED, *SANDWICH],
    'even, sandwich, in-place': [*EVEN, *SANDWICH],
    'uniform, sandwich, in-place': [*UNIFORM, *SANDWICH],
    'tilt': [*EVEN, *runs.TILT],
    'grad_norm': '--shift grad_norm --generator-interval 0'.split(),
    'variation': '--shift variation --generator-interval 0'.split(),
    'uniform': UNIFORM,
    'trained generator': '--shift hypergradient --generator-interval 10'.split(),
    'from scratch': LEARNED,
}
BASE_EPOCHS = 12
ALONE_GROUPS = (1, 3, 8)  # whose archs are trained alone
REFERENCE = 'even'
Scores = dict[tuple[str, int], dict[int, float]]  # top-1 by (method, seed) and group
SEARCHED = {name for name, flags in METHODS.items() if 'uniform' in flags}  # search at the end of the training
SORTED = 'hypergradient', 'sorted by magnitude', 'not sorted'  # methods that differ in their order of units


@dataclass(frozen=True)
class Job:
    """One run of `train.py`."""
    network: str
    name: str
    seed: int
    flags: tuple[str, ...]
    output: Path

    @property
    def folder(self) -> Path:
        return self.output / 'elastic' / self.network / self.name.replace(', ', '-').replace(' ', '-') / (
            f'seed{self.seed}')

    def job(self) -> tuple[str, Path, list[str]]:
        place = ['--output', str(self.folder.parent), '--experiment', self.folder.name]
        return f'{self.network} {self.name} seed {self.seed}', self.folder, [
            sys.executable, 'train.py', *COMMON, *self.flags, '--seed', str(self.seed), *place]


def base(args: argparse.Namespace, seed: int) -> Job:
    """The run that trains a plain network of timm."""
    flags = *BASES[args.network], '--lr', '1e-2', '--epochs', str(BASE_EPOCHS), '--val-interval', str(BASE_EPOCHS)
    return Job(args.network, 'base', seed, flags, args.output)


def adaptation(args: argparse.Namespace, method: str, seed: int) -> Job:
    """An adaptation of the base of this seed."""
    start, epochs = ELASTIC[args.network], args.epochs
    weights = ['--pretrained-path', str(base(args, seed).folder / 'model' / 'model.safetensors')]
    if method == 'from scratch':  # the same supernet, for as many epochs in all
        start, weights, epochs = SCRATCH[args.network], [], args.epochs + BASE_EPOCHS
    flags = (*start, *ADAPT, *METHODS[method], '--lr', f'{args.lr:g}', *weights, '--epochs', str(epochs),
             '--val-interval', str(epochs))
    return Job(args.network, f'{args.epochs} epochs, lr {args.lr:g}/{method}', seed, flags, args.output)


def search(job: Job) -> None:
    """Write searched.json: group and top-1 of the archs that a search finds in a finished adaptation."""
    path = job.folder / 'searched.json'
    if not path.exists():
        rows = runs.Trained([*COMMON, *job.flags, '--seed', str(job.seed)], job.folder).searched()
        runs.write(path, json.dumps(rows))


def pruned_alone(args: argparse.Namespace, seed: int, epochs: int) -> tuple[str, Path, list[str]]:
    """Fine-tune the archs of some groups alone, from the weights that they have in the sorted base."""
    job = adaptation(args, 'even', seed)
    folder = job.folder.parent.parent / f'alone-{epochs}' / job.folder.name
    return f'{args.network} alone, {epochs} epochs, seed {seed}', folder, [
        sys.executable, 'benchmarks/train_subnet.py', *COMMON, *job.flags, '--epochs', str(epochs), '--seed', str(seed),
        '--groups', *map(str, ALONE_GROUPS), '--results-file', str(folder / 'subnets.json')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--network', default='vit', choices=tuple(BASES), help='the base: test_vit, test_efficientnet')
    parser.add_argument('--seeds', type=runs.positive, default=8, metavar='N', help='paired seeds 0 ... N - 1')
    parser.add_argument('--epochs', type=runs.positive, default=12, metavar='N', help='length of an adaptation')
    parser.add_argument('--lr', type=float, default=1e-2, help='learning rate of an adaptation')
    parser.add_argument('--methods', nargs='+', default=list(METHODS), choices=list(METHODS), metavar='NAME')
    parser.add_argument('--alone', action='store_true', help='also fine-tune pruned archs alone')
    parser.add_argument('--search', action='store_true', help='also search archs after the runs of all methods')
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'), metavar='DIR', help='of runs')
    parser.add_argument('--results', type=Path, default=Path('docs/results'), metavar='DIR', help='of tables')
    parser.add_argument('--jobs', type=runs.positive, default=1, metavar='N', help='processes, of one thread each')
    args = parser.parse_args()
    args.output = args.output.resolve()
    seeds = range(args.seeds)
    runs.execute([base(args, seed).job() for seed in seeds], args.jobs)
    for method in args.methods:  # so that a series that is stopped has all seeds of the first methods
        runs.execute([adaptation(args, method, seed).job() for seed in seeds], args.jobs)
        for job in (adaptation(args, method, seed) for seed in seeds if args.search and method not in SEARCHED):
            search(job)
    if args.alone:
        runs.execute([pruned_alone(args, seed, epochs) for epochs in (args.epochs, 1) for seed in seeds], args.jobs)
    write_tables(args)


# -- tables ------------------------------------------------------------------------------------------------------------


def tops(path: Path) -> dict[int, float]:
    """Top-1 by group, counted from 1: of a table of subnets, or of networks that were trained alone."""
    if path.suffix == '.json':
        return {row['group']: row['top1'] for row in json.loads(path.read_text())}
    return {int(row['name'].split()[1]): float(row['top1'])
            for row in runs.read_csv(path) if row['name'].startswith('group')}


def trained(args: argparse.Namespace) -> Scores:
    """Scores of the finished runs of these settings."""
    scores: Scores = {}
    for seed in range(args.seeds):
        for method in METHODS:
            folder = adaptation(args, method, seed).folder
            if (folder / 'done.json').exists():
                scores[method, seed] = tops(folder / 'budgets.csv')
                if (folder / 'searched.json').exists():
                    scores[searched(method), seed] = tops(folder / 'searched.json')
                if method in SORTED:
                    scores[before(method), seed] = tops(folder / 'before.csv')
        for epochs in (args.epochs, 1):
            folder = pruned_alone(args, seed, epochs)[1]
            if (folder / 'done.json').exists():
                scores[alone(epochs), seed] = tops(folder / 'subnets.json')
    return scores


def written(path: Path) -> Scores:
    """Scores in the CSV of an earlier series, perhaps of runs whose folders are gone."""
    scores: Scores = {}
    for row in runs.read_csv(path) if path.exists() else ():
        scores.setdefault((row['method'], int(row['seed'])), {})[int(row['group'])] = float(row['top1'])
    return scores


def before(method: str) -> str:
    return f'{method}, before'


def searched(method: str) -> str:
    return f'{method}, searched'


def alone(epochs: int) -> str:
    return f'pruned, alone for {epochs} epochs'


def write_tables(args: argparse.Namespace) -> None:
    """Write elastic_NETWORK_EPOCHS_RATE.csv and .md: the finished runs, and those that the CSV had before."""
    path = args.results / f'elastic_{args.network}_{args.epochs}_{args.lr:g}.csv'
    found = written(path) | trained(args)
    by_method: dict[str, dict[int, dict[int, float]]] = {}
    for (name, seed), groups in sorted(found.items(), key=lambda item: item[0][1]):
        by_method.setdefault(name, {})[seed] = groups
    rows = [name for method in METHODS for name in (method, searched(method))]
    adapted = {name: by_method[name] for name in rows if name in by_method}
    lists = {name: {seed: list(groups.values()) for seed, groups in seeds.items()} for name, seeds in adapted.items()}
    reference = REFERENCE if REFERENCE in lists else next(iter(lists))
    parts = [
        f'Adapted for {args.epochs} epochs at the learning rate {args.lr:g}:', runs.paired_table(lists, reference),
        'After adaptation, top-1 at each group:', group_table(adapted)]
    unadapted = {name: by_method[before(name)] for name in METHODS if before(name) in by_method}
    if unadapted:
        parts += ['Before adaptation, top-1 at each group:', group_table(unadapted)]
    for epochs in (args.epochs, 1):
        if alone(epochs) in by_method:
            parts += [f'Against pruned networks, each fine-tuned alone for {epochs} epochs:',
                      alone_table(by_method[alone(epochs)], adapted)]
    order = [*rows, *map(before, METHODS), alone(args.epochs), alone(1)]
    runs.write_csv(path, [
        dict(method=name, seed=seed, group=group, top1=round(top1, 3)) for name in order
        for seed, groups in by_method.get(name, {}).items() for group, top1 in groups.items()])
    text = '\n\n'.join(parts) + '\n'
    runs.write(path.with_suffix('.md'), text)
    print(text)


def group_table(scores: dict[str, dict[int, dict[int, float]]]) -> str:
    """Mean top-1 over seeds at every group."""
    columns = sorted(next(iter(next(iter(scores.values())).values())))
    lines = [[name, str(len(by_seed)), *(f'{mean(groups[k] for groups in by_seed.values()):.1f}' for k in columns)]
             for name, by_seed in scores.items()]
    return runs.markdown_table(['method', 'seeds', *(f'group {k}' for k in columns)], lines)


def alone_table(alone: dict[int, dict[int, float]], scores: dict[str, dict[int, dict[int, float]]]) -> str:
    """Top-1 of networks trained alone, and paired differences of the subnets of one adaptation from them."""
    lines = []
    for group in ALONE_GROUPS:
        line = [f'group {group}', f'{mean(groups[group] for groups in alone.values()):.1f}']
        for by_seed in scores.values():
            paired = [groups[group] - alone[seed][group] for seed, groups in by_seed.items() if seed in alone]
            line.append(runs.difference(paired) if paired else '')
        lines.append(line)
    return runs.markdown_table(['budget', 'alone', *(f'{name} - alone' for name in scores)], lines)


if __name__ == '__main__':
    main()
