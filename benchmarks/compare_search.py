"""Gain and cost of a search, compared with the generator's archs.

    python benchmarks/compare_search.py --task glyphs

Supernets are those of `compare_samplers.py` (`--samplers`), trained if they are missing; seeds are paired. For each of
8 budgets, archs come from the generator, and from the Pareto fronts of `timm_shiftnas.search`: NSGA-II from the
generator's archs, NSGA-II from uniformly drawn archs, and uniformly drawn archs, with equally many evaluations. Fronts
are found on images that the run has held out. All archs are then compared on the validation images.

Writes `search_TASK.csv` and a table `search_TASK.md`: top-1 of each strategy, its paired differences from the generator
with 95% intervals, and the seconds of a search. A command that is repeated continues where it stopped.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import runs
from runs import SAMPLERS, Run

STRATEGIES = ('generator', 'evolutionary', 'random')
NAMES = dict(zip(STRATEGIES, ('search from the generator', 'search from uniform archs', 'random search')))


def measure(run: Run, folder: Path, strategies: list[str], evaluations: int, population: int) -> list[dict]:
    """Rows of one supernet: per strategy and budget the MACs and top-1 of its arch, and the seconds of the search."""
    import timm_shiftnas as tsn
    from timm_shiftnas.evaluation.archs import ArchAccuracy

    trained = runs.Trained(run.command(), folder)
    net, generator, groups = trained.net, trained.generator, trained.groups
    accuracy = ArchAccuracy(net, trained.validation, trained.device, trained.calibration)
    archs, seconds = {'generator': generator.propose_many(groups.budgets)}, {'generator': 0.}
    for strategy in strategies:
        begun = time.monotonic()
        # without a file: seconds are those of a whole search
        found = tsn.search(
            net, trained.held_out, generator=generator, strategy=strategy, evaluations=evaluations,
            population=population, groups=groups, train_loader=trained.training_images,
            bn_images=trained.args.bn_images, seed=run.seed)
        name = NAMES[strategy]
        seconds[name] = time.monotonic() - begun
        archs[name] = [
            [arch for arch in found.archs if net.macs(arch) <= budget][-1]  # the smallest is always on the front
            for budget in groups.budgets]
    return [dict(method=name, group=number, budget=round(budget), macs=net.macs(arch), top1=accuracy([arch])[0][0],
                 seconds=seconds[name])
            for name, each in archs.items()
            for number, (budget, arch) in enumerate(zip(groups.budgets, each, strict=True), 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs.add_arguments(parser)
    parser.add_argument('--samplers', nargs='+', default=['generator'], metavar='NAME', choices=list(SAMPLERS),
                        help='supernets to search (default: generator)')
    parser.add_argument('--strategies', nargs='+', default=list(STRATEGIES), metavar='NAME', choices=STRATEGIES)
    parser.add_argument('--evaluations', type=runs.positive, default=500, metavar='N', help='archs of a search')
    parser.add_argument('--population', type=runs.positive, default=50, metavar='N', help='archs of a generation')
    args = parser.parse_args()
    epochs = args.epochs or runs.EPOCHS[args.task]
    trained = [Run(name, args.task, (*SAMPLERS[name], *args.train_flags), seed, epochs)
               for seed in range(args.seeds) for name in args.samplers]
    runs.train(trained, args.output, args.jobs)
    rows = []
    for run in trained:
        folder = run.folder(args.output)
        settings = '-'.join(map(str, [*args.strategies, args.evaluations, args.population]))
        path = folder / f'search-{settings}.json'
        if not path.exists():
            measured = measure(run, folder, args.strategies, args.evaluations, args.population)
            runs.write(path, json.dumps(measured))
        rows += [dict(task=run.task, sampler=run.name, seed=run.seed, epochs=run.epochs, **row)
                 for row in json.loads(path.read_text())]
    runs.write_csv(args.results / f'search_{args.task}.csv', [
        dict(row, top1=round(row['top1'], 3), seconds=round(row['seconds'], 1)) for row in rows])
    text = ''
    for sampler in args.samplers:
        mine = [row for row in rows if row['sampler'] == sampler]
        scores: dict[str, dict[int, list[float]]] = {}
        for row in mine:
            scores.setdefault(row['method'], {}).setdefault(row['seed'], []).append(row['top1'])
        cost = ', '.join(f'{name} {mean(row["seconds"] for row in mine if row["method"] == name):.0f} s'
                         for name in scores if name != 'generator')
        text += (f'{args.task}, supernet {sampler}, {epochs} epochs, {args.evaluations} evaluations '
                 f'({cost} on one core):\n\n{runs.paired_table(scores, "generator")}\n\n')
    runs.write(args.results / f'search_{args.task}.md', text)
    print(text)


if __name__ == '__main__':
    main()
