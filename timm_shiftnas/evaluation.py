"""Accuracy of subnets, and the two ways to pick one for a budget: the generator, or a search over sampled archs.

Several processes evaluate a table by parts of the images and calibrate or search by subnets; all get the same figures,
which are those of one process.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from . import complexity
from .calibration import BatchNormCalibration, has_batch_norm
from .distributed import Ranks
from .generator import ArchitectureGenerator
from .models import Subnet
from .sampling import BudgetGroups, stream
from .space import Arch, SearchSpace
from .task import ClassificationEvaluator, evaluation_sample_limit

__all__ = ['evaluate', 'evaluate_budgets', 'search_archs']

_UNCALIBRATED = (
    'the subnets of this network share the running statistics of BatchNorm, with which their accuracy means nothing: '
    'give calibration=BatchNormCalibration(loader) of training images, or extract one and call calibrate_bn')
Loader = Iterable[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def evaluate(
        model: nn.Module,
        loader: Loader,
        device: torch.device,
        autocast: AbstractContextManager | None = None,
        channels_last: bool = False,
        distributed: bool = False,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a network on (images, class indices); the model's mode is put back.

    Args:
        distributed: The loader gives each process a part of the images, as timm's do.

    Raises:
        ValueError: If `model` is a view of a supernet with BatchNorm, whose running statistics are not the view's own.
    """
    if isinstance(model, Subnet) and has_batch_norm(model):
        raise ValueError(_UNCALIBRATED)
    # the loaders of several processes are filled up with images that others have too
    evaluator = ClassificationEvaluator(device, max_samples=evaluation_sample_limit(loader))
    training = model.training
    model.eval()
    try:
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                logits = model(images)
            evaluator.update(logits, targets)
    finally:
        model.train(training)
    metrics = evaluator.compute(distributed)
    return metrics['top1'], metrics['top5']


def at_arch(net: nn.Module, arch: Arch, calibration: BatchNormCalibration | None) -> nn.Module:
    """A subnet to evaluate: a view of the supernet or, with BatchNorm, the extracted and calibrated network.

    Raises:
        ValueError: If BatchNorm has nothing to be calibrated with.
    """
    if not has_batch_norm(net):
        return Subnet(net, arch)
    if calibration is None:
        raise ValueError(_UNCALIBRATED)
    return calibration(net, arch)


def search_archs(
        space: SearchSpace,
        generator: ArchitectureGenerator,
        groups: BudgetGroups,
        samples: int,
        net: nn.Module,
        loader: Loader,
        device: torch.device,
        seed: int = 0,
        calibration: BatchNormCalibration | None = None,
        ranks: Ranks = Ranks(),
        **kwargs: Any,
) -> list[Arch]:
    """For every group, the best of `samples` archs by accuracy on held-out data: what a uniform supernet needs.

    Candidates are uniform archs that fall into the group. Uniform sampling hardly reaches the ends of the range; what
    is missing there is drawn from the generator for the group's upper edge, whose proposal is always among them. Of
    equally accurate archs, the one with most MACs is taken.

    Args:
        samples: Candidates per group.
        net: The supernet.
        loader: Held-out images and class indices.
        seed: Of the candidates.
        calibration: Gives candidates their BatchNorm statistics, where there is BatchNorm.
        ranks: The processes that share the candidates; each has a loader of all images.
        **kwargs: As for `evaluate`.
    """
    noise = stream(seed, 'search', 0)
    uniform = list(dict.fromkeys(space.sample(noise) for _ in range(100 * samples)))
    macs = complexity.macs(space, uniform).tolist()
    best = []
    for low, high in zip(groups.edges, groups.edges[1:]):
        candidates = {generator.propose(high): None}
        candidates |= {arch: None for arch, count in zip(uniform, macs) if low < count <= high}
        if len(candidates) < samples:
            drawn = generator.sample(torch.full((4 * samples,), high, dtype=torch.float64), noise)
            candidates |= {arch: None for arch in drawn if low < complexity.macs(space, arch) <= high}
        tried = list(candidates)[:samples]
        mine = {arch: evaluate(at_arch(net, arch, calibration), loader, device, **kwargs)[0]
                for arch in ranks.share(tried)}
        top1 = {arch: value for part in ranks.gather(mine) for arch, value in part.items()}
        best.append(max(tried, key=lambda arch: (top1[arch], complexity.macs(space, arch))))
    return best


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
    """Rows of the budget table: the smallest subnet, one subnet for every group, and the largest.

    Args:
        net: The supernet.
        groups: K budget groups.
        archs: The K archs that serve them.
        loader: Images and class indices.
        calibration: Gives subnets their BatchNorm statistics, where there is BatchNorm.
        ranks: The processes that share the images: each has a loader of its part, and calibrates its share of subnets.
        **kwargs: As for `evaluate`.

    Raises:
        ValueError: If the network has BatchNorm and there is no calibration.

    Returns:
        K + 2 dicts with name, budget (MACs, or None), macs, params, top1, top5 (percent) and arch.
    """
    space = net.space
    named = [('smallest', None, space.smallest)]
    named += [(f'group {k + 1}', budget, arch) for k, (budget, arch) in enumerate(zip(groups.budgets, archs))]
    named += [('largest', None, space.largest)]
    if calibration is not None:
        calibration.prepare(net, [arch for _, _, arch in named], ranks)
    accuracies: dict[Arch, tuple[float, float]] = {}
    rows = []
    for name, budget, arch in named:
        if arch not in accuracies:
            accuracies[arch] = evaluate(
                at_arch(net, arch, calibration), loader, device, distributed=ranks.size > 1, **kwargs)
        top1, top5 = accuracies[arch]
        rows.append(dict(
            name=name, budget=budget, macs=complexity.macs(space, arch), params=complexity.params(space, arch),
            top1=top1, top5=top5, arch=arch.to_dict()))
    return rows
