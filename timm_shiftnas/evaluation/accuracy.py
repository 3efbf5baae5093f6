"""Accuracy of subnets, and the budget table of a supernet.

Several processes split the images to evaluate and the subnets to calibrate. All of them get the figures that a single
process would get.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..method.groups import BudgetGroups
from ..method.task import ClassificationEvaluator, evaluation_sample_limit
from ..models.calibration import BatchNormCalibration, has_batch_norm, parts
from ..models.subnet import Subnet
from ..space.core import Arch
from ..space.resources import MACS, PARAMS, count_many
from ..utils.distributed import Ranks

__all__ = ['evaluate', 'evaluate_archs', 'evaluate_budgets', 'evaluate_many']

_UNCALIBRATED = (
    'the subnets of this network share the running statistics of BatchNorm, so their accuracy is meaningless: give '
    'calibration=BatchNormCalibration(loader) with training images, or extract a subnet and call calibrate_bn')
Loader = Iterable[tuple[torch.Tensor, torch.Tensor]]


def evaluate(
        model: nn.Module,
        loader: Loader,
        device: torch.device,
        autocast: AbstractContextManager | None = None,
        channels_last: bool = False,
        distributed: bool = False,
) -> tuple[float, float]:
    """Measure the top-1 and top-5 accuracy of a network, in percent. Its training mode is restored.

    Args:
        model: The network.
        loader: Batches of images [B, C, H, W] and class indices [B].
        device: Device of the network.
        autocast: Context of the forward passes.
        channels_last: Convert images to the channels-last format.
        distributed: Whether each process has a loader of its part of the images, as timm's loaders do.

    Raises:
        ValueError: If `model` is a view of a supernet with BatchNorm, which has no running statistics of its own, or if
            the loader gives no images.
    """
    return evaluate_many([model], loader, device, autocast, channels_last, distributed)[0]


@torch.inference_mode()
def evaluate_many(
        models: Sequence[nn.Module],
        loader: Loader,
        device: torch.device,
        autocast: AbstractContextManager | None = None,
        channels_last: bool = False,
        distributed: bool = False,
) -> list[tuple[float, float]]:
    """`evaluate` for several networks, with the same results: the images are read once for all of them."""
    if any(isinstance(model, Subnet) and has_batch_norm(model) for model in models):
        raise ValueError(_UNCALIBRATED)
    # distributed loaders repeat some images to give every process the same number
    limit = evaluation_sample_limit(loader)
    evaluators = [ClassificationEvaluator(device, max_samples=limit) for _ in models]
    modes, read = [model.training for model in models], 0
    for model in models:
        model.eval()
    try:
        for images, targets in loader:
            read += len(images)
            images, targets = images.to(device), targets.to(device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            for model, evaluator in zip(models, evaluators):
                with autocast or nullcontext():
                    logits = model(images)
                evaluator.update(logits, targets)
    finally:
        for model, training in zip(models, modes):
            model.train(training)
    if not read and not distributed:  # one of several processes may have none of a stream's images
        raise ValueError('the loader gave no images; give one that can be read again each time, such as a DataLoader')
    metrics = [evaluator.compute(distributed) for evaluator in evaluators]
    return [(each['top1'], each['top5']) for each in metrics]


def evaluate_archs(
        net: nn.Module,
        archs: Sequence[Arch],
        loader: Loader,
        device: torch.device,
        calibration: BatchNormCalibration | None = None,
        **kwargs: Any,
) -> Iterator[tuple[float, float]]:
    """Accuracies of subnets: of views of the supernet or, with BatchNorm, of extracted and calibrated subnets.

    Args:
        net: The supernet.
        archs: The archs.
        loader: Batches of images and class indices; read once for each of `parts`.
        device: Device of the network.
        calibration: Computes the BatchNorm statistics of subnets, if there is BatchNorm.
        **kwargs: As for `evaluate`.

    Raises:
        ValueError: If the network has BatchNorm and there is no calibration.
    """
    for part in parts(net, archs):
        yield from evaluate_many(_subnets(net, part, calibration), loader, device, **kwargs)


def _subnets(net: nn.Module, archs: Sequence[Arch], calibration: BatchNormCalibration | None) -> list[nn.Module]:
    if not has_batch_norm(net):
        return [Subnet(net, arch) for arch in archs]
    if calibration is None:
        raise ValueError(_UNCALIBRATED)
    return calibration.subnets(net, archs)


def evaluate_budgets(
        net: nn.Module,
        groups: BudgetGroups,
        archs: Sequence[Arch],
        loader: Loader,
        device: torch.device,
        calibration: BatchNormCalibration | None = None,
        ranks: Ranks = Ranks(),
        **kwargs: Any,
) -> list[dict[str, Any]]:
    """Evaluate the rows of the budget table: the smallest subnet, one for each group, and the largest.

    Args:
        net: The supernet.
        groups: K budget groups.
        archs: The K archs, one for each group.
        loader: Batches of images and class indices.
        device: Device of the network.
        calibration: Computes the BatchNorm statistics of subnets, if there is BatchNorm.
        ranks: The processes that split the work; each has a loader of its part of the images.
        **kwargs: As for `evaluate`.

    Raises:
        ValueError: If the network has BatchNorm and there is no calibration.

    Returns:
        K + 2 dicts with name, budget (in the unit of the groups, or None), macs, params, top1, top5 (percent) and arch;
        groups of another resource add it by its name.
    """
    space = net.space
    named = [('smallest', None, space.smallest)]
    named += [(f'group {k + 1}', budget, arch) for k, (budget, arch) in enumerate(zip(groups.budgets, archs))]
    named += [('largest', None, space.largest)]
    if calibration is not None:
        calibration.prepare(net, [arch for _, _, arch in named], ranks)
    archs = list(dict.fromkeys(arch for _, _, arch in named))
    accuracies = dict(zip(archs, evaluate_archs(
        net, archs, loader, device, calibration, distributed=ranks.size > 1, **kwargs)))
    rows = []
    for name, budget, arch in named:
        top1, top5 = accuracies[arch]
        counts = count_many(space, [arch], list(dict.fromkeys((MACS, PARAMS, groups.resource))))[0]
        rows.append(dict(name=name, budget=budget, **counts, top1=top1, top5=top5, arch=arch.to_dict()))
    return rows
