"""Compare ways to train an elastic segmenter or detector, also with training its networks alone.

    python benchmarks/compare_tasks.py --task segmentation
    python benchmarks/compare_tasks.py --task detection

The backbone is timm's `test_efficientnet`, made elastic, at 64 px. 'from scratch' starts from random weights;
'pretrained' from those of a classifier of rendered letters, whose units are sorted. Each trains all subnets with an
even P, a learned P, or uniform sampling. 'alone' takes the archs of the even P for all budgets, and trains each alone
with as many steps as the whole supernet has. Seeds are paired: initial weights, pretrained weights, images and their
order. The images are drawn, not augmented.

Networks are scored at the same budgets, by mean IoU or COCO's mAP. Every run writes one file when it is done, so that
the series can be stopped and started again; tables are written after every seed. Rows that the CSV in `--results`
has from an earlier series are kept.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import runs
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision.transforms import v2

import timm_shiftnas as tsn
from timm_shiftnas.data import Glyphs
from timm_shiftnas.data.scenes import write_scenes
from timm_shiftnas.evaluation import plot_accuracy
from timm_shiftnas.models import BatchNormCalibration
from timm_shiftnas.utils.units import format_count

sys.path.insert(0, str(runs.ROOT / 'examples'))
import detection  # noqa: E402
import segmentation  # noqa: E402
from dense_prediction import train  # noqa: E402

BASE, SIZE, LETTERS = 'test_efficientnet', 64, 4
METHODS = {
    'even': dict(shift='none'),
    'learned': dict(shift='hypergradient', shift_interval=40, shift_lr=.1, shift_images=8),
    'uniform': dict(sampler='uniform', shift='none'),
}
STARTS = ('from scratch', 'pretrained')
BUDGETS = (0., 1 / 2, 1.)  # positions in the range of MACs
METRICS = dict(segmentation='mean IoU', detection='mAP')
MAPS = dict(segmentation=[1, 2, 3, 4], detection=[2, 3, 4])  # strides from 4, and from 8
BATCH_SIZE, LR = 16, 5e-3
Rows = list[dict[str, Any]]
Found = dict[str, dict[int, Rows]]  # by method and seed


class Task:
    """Images, network, loss and score of a task.

    Args:
        name: 'segmentation' or 'detection'.
        args: The arguments of the script.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.module: Any = dict(segmentation=segmentation, detection=detection)[name]
        self.is_detection, self.maps = name == 'detection', MAPS[name]
        folder = write_scenes(args.output / args.task / f'scenes-{args.images}', args.images, pixels=SIZE)
        loader, self.validation = self.module.create_loaders(folder, SIZE)
        loader.dataset.transform = self.validation.dataset.transform
        self.images = in_memory(loader.dataset)

    def loader(self, seed: int) -> DataLoader:
        """Batches of training images in the order of the seed."""
        order = torch.Generator().manual_seed(seed)
        return DataLoader(self.images, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)

    def build(self, backbone: nn.Module) -> nn.Module:
        return detection.Detector(backbone, LETTERS, SIZE) if self.is_detection else segmentation.Segmenter(
            backbone, 1 + LETTERS, width=16)

    def loss(self, network: nn.Module) -> Callable:
        return network.loss if self.is_detection else segmentation.loss

    def score(self, net: nn.Module, network: nn.Module) -> float:
        """The score of a network; `network` turns its output into boxes."""
        if self.is_detection:
            return detection.mean_precision(net, network, self.validation)
        return segmentation.mean_iou(net, self.validation, 1 + LETTERS)


def in_memory(images: Dataset) -> TensorDataset:
    """All items of a set of (image, target); without augmentation, reading them again would give the same."""
    return TensorDataset(*default_collate([*images]))


def pretrained(args: argparse.Namespace, seed: int) -> nn.Module:
    """A sorted elastic network whose base has learned rendered letters; the weights of the base are kept in a file."""
    pixels = v2.Compose([v2.PILToTensor(), *segmentation.PIXELS])
    images = in_memory(Glyphs('train', images=args.pretraining_images, pixels=32, transform=pixels))
    torch.manual_seed(seed)
    loader = DataLoader(images, 64, shuffle=True, drop_last=True)
    net = timm.create_model(BASE, num_classes=52)
    path = args.output / f'base-{args.pretraining_images}-{args.pretraining_epochs}' / f'seed{seed}.pt'
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        total = args.pretraining_epochs * len(loader)
        optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
        for _ in range(args.pretraining_epochs):
            for x, targets in loader:
                nn.functional.cross_entropy(net(x), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        runs.write(path, partial(torch.save, net.state_dict()))
    net = tsn.elastic(net.eval(), img_size=SIZE)
    return tsn.sort_by_importance(net, [next(iter(loader)) for _ in range(8)], progress=False).train()


def create(task: Task, start: str, args: argparse.Namespace, seed: int) -> tsn.ElasticModel:
    """The untrained model of a seed."""
    torch.manual_seed(seed)
    net = tsn.elastic(timm.create_model(BASE, num_classes=52), img_size=SIZE)
    if start == 'pretrained':
        net = pretrained(args, seed)
    torch.manual_seed(seed)
    return tsn.ElasticModel(task.build(tsn.ElasticBackbone(net, task.maps, img_size=SIZE))).train()


def train_supernet(task: Task, start: str, method: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of the subnets at all budgets, and their archs."""
    model, loader, began = create(task, start, args, seed), task.loader(seed), time.time()
    generator = train(
        model, task.loss(model.network), loader, args.epochs, LR, num_groups=8, seed=seed,
        generator_fit_steps=args.fit_steps, **METHODS[method])
    seconds = time.time() - began
    low, high = model.macs(model.space.smallest), model.macs(model.space.largest)
    calibration, rows = BatchNormCalibration(loader, 500), []
    for share in BUDGETS:
        arch = generator.propose(low + share * (high - low))
        rows.append(dict(
            name=f'{share:.2f}', budget=low + share * (high - low), macs=model.macs(arch), params=model.params(arch),
            score=task.score(calibration(model, arch).eval(), model.network), arch=arch.to_dict()))
    return dict(rows=rows, seconds=seconds)


def train_alone(task: Task, start: str, row: dict[str, Any], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The score of the arch of a row, extracted from the untrained model and trained alone."""
    model = create(task, start, args, seed)
    net = tsn.extract(model, model.space.from_dict(row['arch'])).train()
    loss, loader, began = task.loss(net), task.loader(seed), time.time()
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=args.epochs * len(loader))
    for _ in range(args.epochs):
        for images, targets in loader:
            loss(net(images), targets).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    tsn.calibrate_bn(net, loader, 500, progress=False).eval()
    return dict(rows=[dict(row, score=task.score(net, net))], seconds=time.time() - began)


def trained(task: Task, args: argparse.Namespace, seed: int) -> dict[str, Rows]:
    """The rows of all methods for a seed; those that are not finished are run."""
    folder, found = args.output / args.task / f'{args.images}images-{args.epochs}epochs', dict[str, Rows]()

    def finished(name: str, run: Callable[..., dict[str, Any]], start: str, what: Any) -> Rows:
        path = folder / name.replace(' ', '-').replace(',', '') / f'seed{seed}.json'
        if not path.exists():
            print(f'{args.task}: {name}, seed {seed}', file=sys.stderr, flush=True)
            runs.write(path, json.dumps(run(task, start, what, args, seed)))
        return json.loads(path.read_text())['rows']

    for start in args.starts:
        for method in args.methods:
            found[f'{start}, {method}'] = finished(f'{start}, {method}', train_supernet, start, method)
        if args.alone:
            found[f'{start}, alone'] = [
                finished(f'{start}, alone {row["name"]}', train_alone, start, row)[0]
                for row in found[f'{start}, {args.methods[0]}']]
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def table_path(args: argparse.Namespace) -> Path:
    return args.results / f'tasks_{args.task}_{args.epochs}.csv'


def written(path: Path) -> Found:
    """Rows in the CSV of an earlier series, perhaps of runs whose files are gone."""
    found: Found = {}
    for row in runs.read_csv(path) if path.exists() else ():
        found.setdefault(row['method'], {}).setdefault(int(row['seed']), []).append(dict(
            budget=int(row['budget']), macs=int(row['macs']), params=int(row['params']), score=float(row['score']),
            arch=json.loads(row['arch'])))
    return found


def write_tables(args: argparse.Namespace, found: Found) -> None:
    """Write tasks_TASK_EPOCHS.csv, .md and .png."""
    path, order = table_path(args), [f'{start}, {name}' for start in STARTS for name in (*METHODS, 'alone')]
    found = {name: dict(sorted(found[name].items())) for name in order if name in found}
    scores = {name: {seed: [row['score'] for row in rows] for seed, rows in seeds.items()}
              for name, seeds in found.items()}
    table = '\n\n'.join(
        runs.paired_table(own, next(iter(own))) for start in STARTS
        if (own := {name: each for name, each in scores.items() if name.startswith(start)}))
    runs.write(path.with_suffix('.md'), table + '\n')
    runs.write_csv(path, [
        dict(method=name, seed=seed, budget=round(row['budget']), macs=row['macs'], params=row['params'],
             score=round(row['score'], 3), arch=json.dumps(row['arch']))
        for name, seeds in found.items() for seed, rows in seeds.items() for row in rows])
    means = {
        name: [dict(name=format_count(rows[0]['budget']), macs=mean(row['macs'] for row in rows),
                    score=mean(row['score'] for row in rows)) for rows in zip(*seeds.values(), strict=True)]
        for name, seeds in found.items() if name.endswith((args.methods[0], 'alone'))}
    best = [name for name in means if name.endswith(args.methods[0])][-1]  # the pretrained one, if there is one
    plot_accuracy(path.with_suffix('.png'), means.pop(best), means, metric=METRICS[args.task])
    print(table, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=METRICS, required=True)
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=[*METHODS])
    parser.add_argument('--starts', nargs='+', choices=STARTS, default=[*STARTS])
    parser.add_argument('--alone', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--seeds', type=runs.positive, default=3, metavar='N', help='paired seeds 0 ... N - 1')
    parser.add_argument('--epochs', type=runs.positive, default=10)
    parser.add_argument('--images', type=runs.positive, default=2000)
    parser.add_argument('--fit-steps', type=runs.positive, default=300, help='of the generator')
    parser.add_argument('--pretraining-images', type=runs.positive, default=8000)
    parser.add_argument('--pretraining-epochs', type=runs.positive, default=8)
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks'), metavar='DIR', help='of runs')
    parser.add_argument('--results', type=Path, default=Path('docs/results'), metavar='DIR', help='of tables, pictures')
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, found = Task(args.task, args), written(table_path(args))
    for seed in range(args.seeds):
        for name, rows in trained(task, args, seed).items():
            found.setdefault(name, {})[seed] = rows
        write_tables(args, found)


if __name__ == '__main__':
    main()
