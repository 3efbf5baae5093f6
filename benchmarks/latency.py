"""Are subnets that are chosen for a latency as fast as that, and better than subnets that are chosen by MACs?

    python benchmarks/latency.py output/NAME/model --device-file eager --dataset sklearn/digits

For budgets over the range of a device file of `timm-shiftnas measure`, the subnet for that latency is measured on this
machine, next to the subnet that a choice by MACs gives: the one of most MACs whose latency is predicted to fit, among
the proposals for budgets of MACs. With images, both are evaluated. Writes `latency_NAME.csv` and a table `.md`.

Two columns answer the questions: `used` is the measured latency divided by the budget (above 1 + spread: missed), and
`top-1, by MACs` is the accuracy at equal latency of the other choice. Run it on a quiet machine, soon after `measure`:
times are those of today.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import runs


def chosen_by_macs(generator: Any, latency: Any, space: Any, budgets: list[float]) -> list[Any]:
    """For each latency, the proposal for MACs that has the most of them and fits."""
    import torch

    from timm_shiftnas.method import ArchitectureGenerator
    from timm_shiftnas.space import MACS
    if generator.resource != MACS:
        generator = ArchitectureGenerator(space).fit()
    grid = torch.linspace(generator.budget_min, generator.budget_max, 256, dtype=torch.float64).tolist()
    archs = list(dict.fromkeys(generator.propose_many(grid)))
    seconds = latency.count(space, archs).tolist()
    counts = MACS.count(space, archs).tolist()
    return [archs[max((count, i) for i, (count, time) in enumerate(zip(counts, seconds)) if time <= budget)[1]]
            for budget in budgets]


def evaluated(net: Any, archs: list[Any], args: argparse.Namespace) -> dict[Any, float]:
    """Top-1 of subnets on the validation images; BatchNorm statistics come from training images."""
    import torch
    from timm.data import create_loader, resolve_data_config

    from timm_shiftnas.data import create_dataset
    from timm_shiftnas.data.shift_batches import preprocessing
    from timm_shiftnas.evaluation.accuracy import at_arch, evaluate
    from timm_shiftnas.models import BatchNormCalibration, has_batch_norm
    options = preprocessing(resolve_data_config(model=net))

    def loader(split: str) -> Any:
        images = create_dataset(args.dataset, args.data_dir, split=split, is_training=False)
        return create_loader(images, batch_size=args.images, use_prefetcher=False, num_workers=0, **options)

    calibration = BatchNormCalibration(loader('train')) if has_batch_norm(net) else None
    images = loader('validation')
    return {arch: evaluate(at_arch(net, arch, calibration), images, torch.device('cpu'))[0]
            for arch in dict.fromkeys(archs)}


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    import timm_shiftnas
    from timm_shiftnas.evaluation.latency import Setup, measure_archs
    from timm_shiftnas.hub.load import SavedModel
    saved = SavedModel(args.directory)
    device = saved.find_device(args.device_file)
    net, generator = timm_shiftnas.load_supernet(args.directory)
    latency = device.resource(net.space)
    low, high = latency.range(net.space)
    budgets = [low + (high - low) * (k + .5) / args.budgets for k in range(args.budgets)]
    by_latency = [generator.propose_within({latency: budget}) for budget in budgets]
    by_macs = chosen_by_macs(generator, latency, net.space, budgets)
    archs = list(dict.fromkeys([net.space.smallest, *by_latency, *by_macs]))
    setup = Setup(device.backend, device.device, device.threads, device.batch_size)
    partial = args.output / f'latency_{device.name}.partial'
    timings = dict(zip(archs, measure_archs(net, archs, setup, partial, args.max_spread)))
    reference = statistics.median(timing.reference for timing in timings.values())
    top1 = evaluated(net, archs, args) if args.dataset or args.data_dir else {}
    partial.unlink()
    return [dict(
        budget=budget, predicted=latency.count(net.space, arch), measured=timings[arch].ratio * reference,
        used=timings[arch].ratio * reference / budget, spread=timings[arch].spread, macs=net.macs(arch),
        top1=top1.get(arch, ''), used_by_macs=timings[other].ratio * reference / budget, macs_by_macs=net.macs(other),
        top1_by_macs=top1.get(other, '')) for budget, arch, other in zip(budgets, by_latency, by_macs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('directory', type=Path, metavar='DIR', help='supernet with a device file')
    parser.add_argument('--device-file', metavar='NAME', help='its device file (default: the only one)')
    parser.add_argument('--budgets', type=runs.positive, default=20, metavar='N')
    parser.add_argument('--max-spread', type=float, default=.05, metavar='X')
    parser.add_argument('--dataset', default='', metavar='NAME')
    parser.add_argument('--data-dir', metavar='DIR')
    parser.add_argument('--images', type=runs.positive, default=128, metavar='N', help='images in a batch')
    parser.add_argument('--output', type=Path, default=Path('output'), metavar='DIR')
    args = parser.parse_args()
    sys.path.insert(0, str(runs.ROOT))
    args.output.mkdir(parents=True, exist_ok=True)
    rows = rows_of(args)
    name = args.directory.parent.name if args.directory.name == 'model' else args.directory.name
    runs.write_csv(args.output / f'latency_{name}.csv', rows)
    missed = sum(row['used'] > 1 + row['spread'] for row in rows)
    mean = statistics.mean(row['used'] for row in rows)
    lines = [[f'{row["budget"] * 1e3:.3f}', f'{row["measured"] * 1e3:.3f}', f'{row["used"]:.3f}',
              f'{row["spread"]:.3f}',
              *(f'{value:.2f}' if value != '' else '' for value in (row['top1'], row['top1_by_macs']))] for row in rows]
    table = runs.markdown_table(
        ['budget (ms)', 'measured (ms)', 'used', 'spread', 'top-1', 'top-1, by MACs'], lines)
    summary = f'{missed} of {len(rows)} budgets are missed by more than the spread; mean use {mean:.3f}.'
    runs.write(args.output / f'latency_{name}.md', f'{table}\n{summary}\n')
    print(table, summary, sep='\n')


if __name__ == '__main__':
    main()
