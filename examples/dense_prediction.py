"""Shared code of `segmentation.py` and `detection.py`: elastic backbone, training, and networks for three budgets."""
import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

import timm_shiftnas as tsn
from timm_shiftnas.evaluation import format_table, plot_accuracy, write_budgets_csv
from timm_shiftnas.models import BatchNormCalibration

COLORS = '#e69f00', '#56b4e9', '#f0e442', '#cc79a7', '#009e73', '#d55e00', '#0072b2'  # Okabe & Ito, one for each class


def parse_args(description: str, output: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path)
    parser.add_argument('--model', default='test_shiftmobilenet_supernet')
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    parser.add_argument('--images', type=int, default=2000, help='number of training images without --data-dir')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--fit-steps', type=int, default=1000, help='steps that fit the generator to budgets')
    parser.add_argument('--output', type=Path, default=Path(output))
    return parser.parse_args()


def create_backbone(name: str, size: int) -> nn.Module:
    """The elastic backbone of a supernet of the package, or of 'elastic:NAME', a pretrained network of timm."""
    kind, _, base = name.rpartition(':')
    # tsn.sort_by_importance(net, loader) would put its most important channels first
    net = tsn.elastic(base, pretrained=True) if kind else timm.create_model(name)
    strides = [info['reduction'] for info in net.feature_info]
    maps = [i for i, stride in enumerate(strides) if stride >= 4] if len({*strides}) > 1 else [-1]
    return tsn.ElasticBackbone(net, maps, norm=True, img_size=size)


def train(model: nn.Module, loss: Callable, loader: Iterable, epochs: int, lr: float = 5e-3,
          **settings) -> tsn.ArchitectureGenerator:
    """Train all subnets of a model; returns the generator, which knows the one for a budget."""
    total = epochs * len(loader)
    task = tsn.create_task(model, loss, held_out_loss=loss, total_updates=total, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    for epoch in range(epochs):
        for images, targets in loader:
            result = task(images, targets)
            result['loss'].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        print(f'epoch {epoch + 1} of {epochs}: loss {result["loss"].detach():.3f}')
    return task.generator


def take_networks(
        model: nn.Module, generator: tsn.ArchitectureGenerator, loader: Iterable, metric: str, score: Callable,
        task: str, output: Path) -> tuple[list[nn.Module], float]:
    """Extract networks for three budgets; write their table and picture, and save the model.

    Args:
        model: A trained model.
        generator: Its generator.
        loader: Training images, for BatchNorm.
        metric: What `score(net)` is, in percent.
        score: The measure.
        task: One of the Hub's names of tasks.
        output: Folder of the files.

    Returns:
        The networks, and the budget of the second.
    """
    low, high = model.macs(model.space.smallest), model.macs(model.space.largest)
    calibration, rows, nets = BatchNormCalibration(loader, 500), [], []
    for name, budget in (('small', low + .1 * (high - low)), ('medium', (low + high) / 2), ('large', high)):
        arch = generator.propose(budget)
        nets.append(calibration(model, arch).eval())
        rows.append(dict(
            name=name, budget=budget, macs=model.macs(arch), params=model.params(arch), arch=arch.to_dict(),
            score=score(nets[-1])))
    print(format_table(rows, metric=metric))
    write_budgets_csv(output / 'budgets.csv', rows)
    plot_accuracy(output / 'accuracy.png', rows, metric=metric)
    tsn.save_pretrained(
        output / 'model', model, generator, results=rows, bn_stats=calibration.statistics,
        training=dict(task=task, metric=metric))
    return nets, rows[1]['budget']


def color(label: int) -> str:
    return COLORS[label % len(COLORS)]


def to_pixels(images: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized images as pixels of `size`, [N, 3, size, size], and the same in dark grey, to draw on; uint8."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    pixels = resize(((images - low) / (high - low) * 255).byte(), [size], InterpolationMode.NEAREST)
    return pixels, rgb_to_grayscale(pixels, 3) // 2
