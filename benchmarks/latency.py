"""Compare subnets that are chosen for a latency with that latency, and with subnets that are chosen by MACs.

    python benchmarks/latency.py output/NAME/model --device-file eager --dataset sklearn/digits

For budgets over the range of a device file of `timm-shiftnas measure`, three subnets are measured on this machine, and
evaluated if there are images:

* by the prediction alone, which is right in the median;
* as served: the one that `from_pretrained(latency=...)` loads, whose prediction fits with a margin for its error;
* by MACs: the one of most MACs whose latency is predicted to fit, among the proposals for budgets of MACs. They come
  from the generator of --by-macs, or from that of the model if it is for MACs, or else from one that saw no images.

Writes `latency_NAME_DEVICE.csv` and a table `.md`. `used` is the measured latency divided by the budget: above 1 +
spread, the budget is missed. Times are those of today, so run it on a quiet machine, soon after `measure`: the last
line says by how much the smallest arch has changed since, and budgets are also counted as if it had not: all times
divided by that. Measurements of an interrupted call are kept.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import runs

CHOICES = ('', '_served', '_by_macs')  # ends of the names of columns


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


def evaluated(net: Any, archs: Sequence[Any], args: argparse.Namespace) -> dict[Any, float]:
    """Top-1 of subnets on the validation images; BatchNorm statistics come from training images."""
    import torch
    from timm.data import create_loader, resolve_data_config

    from timm_shiftnas.data import create_dataset
    from timm_shiftnas.data.shift_batches import preprocessing
    from timm_shiftnas.evaluation.accuracy import evaluate_archs
    from timm_shiftnas.models import BatchNormCalibration, has_batch_norm
    options = preprocessing(resolve_data_config(model=net))

    def loader(split: str) -> Any:
        images = create_dataset(
            args.dataset, args.data_dir, split=split, is_training=False, input_img_mode=net.image_mode)
        return create_loader(images, batch_size=args.images, use_prefetcher=False, num_workers=0, **options)

    calibration = BatchNormCalibration(loader('train')) if has_batch_norm(net) else None
    images = loader('validation')
    accuracies = evaluate_archs(net, archs, images, torch.device('cpu'), calibration)
    return {arch: top1 for arch, (top1, _) in zip(archs, accuracies)}


def rows_of(args: argparse.Namespace, device: Any, partial: Path) -> tuple[list[dict[str, Any]], float]:
    """A row for each budget, and the share by which the smallest arch is slower than the device file says."""
    import timm_shiftnas
    from timm_shiftnas.evaluation.latency import Setup, measure_archs
    net, generator = timm_shiftnas.load_supernet(args.directory)
    space, served = net.space, device.resource(net.space)
    latency = replace(served, measure=device.predict)
    low, high = served.range(space)[0], latency.range(space)[1]  # from where both have a subnet that fits
    budgets = [low + (high - low) * (k + .5) / args.budgets for k in range(args.budgets)]
    other = timm_shiftnas.load_supernet(args.by_macs)[1] if args.by_macs else generator
    chosen = list(zip(
        (generator.propose_within({latency: budget}) for budget in budgets),
        (generator.propose_within({served: budget}) for budget in budgets),
        chosen_by_macs(other, latency, space, budgets)))
    archs = list(dict.fromkeys([space.smallest, *(arch for each in chosen for arch in each)]))
    top1 = evaluated(net, archs, args) if args.dataset or args.data_dir else {}
    setup = Setup(device.backend, device.device, device.threads, device.batch_size)
    timings = dict(zip(archs, measure_archs(net, archs, setup, partial, args.max_spread)))
    reference = statistics.median(timing.reference for timing in timings.values())
    rows = []
    for budget, each in zip(budgets, chosen):
        row = dict(budget=budget)
        for end, arch in zip(CHOICES, each):
            measured = timings[arch].ratio * reference
            row |= {
                f'predicted{end}': latency.count(space, arch), f'measured{end}': measured,
                f'used{end}': measured / budget, f'spread{end}': timings[arch].spread, f'macs{end}': net.macs(arch),
                f'top1{end}': top1.get(arch, '')}
        rows.append(row)
    slower = timings[space.smallest].ratio * reference / latency.range(space)[0] - 1
    return rows, slower


def summary(rows: Sequence[dict[str, Any]], slower: float) -> list[str]:
    """Sentences that sum up the rows."""
    lines = []
    for end, title in zip(CHOICES, ('By the prediction alone', 'As served', 'Chosen by MACs')):
        found = []
        for speed in (1, 1 + slower):
            used = [row[f'used{end}'] / speed for row in rows]
            over = [use - 1 for use, row in zip(used, rows) if use > 1 + row[f'spread{end}']]
            most = f' by {max(over):.1%} at most' if over else ''
            found.append(f'{len(over)} missed{most}, mean use {statistics.mean(used):.3f}')
        lines.append(f'{title}: of {len(rows)} budgets {found[0]}; at the speed of the device file: {found[1]}.')
    same = sum(row['predicted'] == row['predicted_by_macs'] and row['macs'] == row['macs_by_macs'] for row in rows)
    lines.append(f'For {same} of {len(rows)} budgets, latency and MACs choose the same subnet.')
    if rows[0]['top1'] != '':
        difference = runs.difference([row['top1'] - row['top1_by_macs'] for row in rows])
        lines.append(f'Top-1 at equal latency, minus that of the choice by MACs: {difference} (mean over budgets, 95% '
                     'interval).')
    spread = statistics.median(row['spread'] for row in rows)
    return [*lines, f'The median spread is {spread:.1%}; the smallest arch is slower than the device file says by '
                    f'{slower:+.1%}.']


def markdown(rows: Sequence[dict[str, Any]], slower: float) -> str:
    """The table and its summary."""
    lines = [[f'{row["budget"] * 1e3:.3f}', f'{row["measured"] * 1e3:.3f}', f'{row["spread"]:.3f}',
              *(f'{row[f"used{end}"]:.3f}' for end in CHOICES),
              *('' if row[f'top1{end}'] == '' else f'{row[f"top1{end}"]:.2f}' for end in CHOICES)] for row in rows]
    return '\n'.join([runs.markdown_table([
        'budget (ms)', 'measured (ms)', 'spread', 'used', 'used, as served', 'used, by MACs', 'top-1',
        'top-1, as served', 'top-1, by MACs'], lines), '', *summary(rows, slower)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('directory', type=Path, metavar='DIR', help='supernet with a device file')
    parser.add_argument('--device-file', metavar='NAME', help='its device file, or a path (default: the only one)')
    parser.add_argument(
        '--by-macs', type=Path, metavar='DIR', help='supernet whose generator chooses by MACs (default: see above)')
    parser.add_argument('--budgets', type=runs.positive, default=20, metavar='N')
    parser.add_argument('--max-spread', type=float, default=.05, metavar='X')
    parser.add_argument('--dataset', default='', metavar='NAME')
    parser.add_argument('--data-dir', metavar='DIR')
    parser.add_argument('--images', type=runs.positive, default=128, metavar='N', help='images in a batch')
    parser.add_argument('--output', type=Path, default=Path('output'), metavar='DIR')
    args = parser.parse_args()
    sys.path.insert(0, str(runs.ROOT))
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.directory.resolve()
    name = f'latency_{folder.parent.name if folder.name == "model" else folder.name}'
    from timm_shiftnas.hub.load import SavedModel
    device = SavedModel(args.directory).find_device(args.device_file)
    table, text, partial = (args.output / f'{name}_{device.name}.{kind}' for kind in ('csv', 'md', 'partial'))
    rows, slower = rows_of(args, device, partial)
    runs.write_csv(table, rows)
    runs.write(text, f'{markdown(rows, slower)}\n')
    partial.unlink()
    print(text.read_text(), end='')


if __name__ == '__main__':
    main()
