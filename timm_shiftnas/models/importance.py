"""Sorting an elastic network by importance: the same function, most important units first.

A smaller arch keeps the first channels, heads and hidden units and the layers of `layer_order`. In a pretrained network
their order is arbitrary, so that a subnet would lose units at random. Permuting them changes no output: norms,
attention, MLPs, depthwise convolutions and squeeze-and-excitation do not depend on the order of their units.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..space.families import Masks
from ..space.matrix_mapping import arch_masks
from ._sortable import SortableSupernet

__all__ = ['magnitude_scores', 'sort_by_importance', 'taylor_scores']


def sort_by_importance(
        net: nn.Module,
        loader: Iterable[Any] | None = None,
        *,
        num_batches: int = 16,
        progress: bool = True,
) -> nn.Module:
    """Put the most important channels, heads and hidden units of an elastic network first, and order its layers.

    The function of the network stays the same (up to rounding). Its search space gets the order of the layers, so a
    generator or a task must be created afterwards.

    Args:
        net: A network of `elastic`, changed in place.
        loader: Batches of (images [B, C, H, W], class indices [B]), preprocessed as for the base. If the network does
            not know their classes, batches of images alone: its own predictions are then the labels. Units are scored
            by `taylor_scores`; without a loader by `magnitude_scores`, which was worse than no sorting where we
            measured it (docs/results.md).
        num_batches: Number of batches to score with.
        progress: Show a bar if the standard error stream is a terminal.

    Returns:
        The network.

    Raises:
        ValueError: If `net` is not an elastic pretrained network with a classifier, or has been changed, or the loader
            has no batches or none that can score units.
    """
    inner = unwrap_model(net)
    if not isinstance(inner, SortableSupernet):
        raise ValueError(f'{type(inner).__name__} cannot be sorted; sort_by_importance takes a network of elastic(...)')
    if not inner.num_classes:
        raise ValueError(
            'without a classifier, the channels that are sorted are the outputs; sort before reset_classifier(0)')
    if num_batches < 1:
        raise ValueError(f'num_batches={num_batches} has to be 1 or more')
    if loader is None:
        scores = magnitude_scores(inner)
    else:
        scores = taylor_scores(inner, tqdm(
            islice(loader, num_batches), total=num_batches, desc='scoring units', unit='batch',
            disable=None if progress else True))
    reorder(inner, inner.split_masks(scores))
    return net


@torch.inference_mode(False)
@torch.enable_grad()
def taylor_scores(net: Any, batches: Iterable[Any]) -> Masks:
    """Importance of every unit, in the shapes of the masks: the sum over batches of |d loss / d mask|.

    The derivative with respect to the mask of a unit is the sum of activation times gradient over the batch: the
    first-order estimate of the change of the loss when the unit is removed (Molchanov et al., CVPR 2019, eq. 5 to 8).

    Args:
        net: The network; neither its mode nor its gradients change.
        batches: (images, class indices) pairs, or images alone.

    Raises:
        ValueError: If there are no batches.
    """
    weight = next(net.parameters())
    masks = {label: mask.to(weight).requires_grad_() for label, mask in _largest_masks(net).items()}
    total = {label: torch.zeros_like(mask, requires_grad=False) for label, mask in masks.items()}
    seen, modes = 0, {module: module.training for module in net.modules()}
    net.eval()
    try:
        for batch in batches:
            # clones, because tensors of inference mode have no part in gradients
            images, *labels = [each.clone() for each in _pair(batch)]
            if not len(images):
                continue
            seen += len(images)
            loss = _loss(net(images.to(weight), net.join_masks(masks)), *labels)
            if not loss.isfinite():
                raise ValueError(f'the loss on {len(images)} of the images is {loss.item()}; look at the images')
            for label, gradient in zip(masks, torch.autograd.grad(loss, list(masks.values())), strict=True):
                total[label] += gradient.abs()
    finally:
        for module, training in modes.items():
            module.training = training
    if not seen:
        raise ValueError('the loader has no batches to score units with; give training images')
    return net.join_masks(total)


def _pair(batch: Any) -> list[Tensor]:
    """A batch as [images, class indices], or [images].

    Raises:
        ValueError: If it is something else.
    """
    pair = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, (list, tuple)) else []
    if len(pair) not in (1, 2) or not all(isinstance(each, Tensor) for each in pair):
        raise ValueError(f'a batch has to be (images, class indices), or images alone; the loader gave {type(batch)}')
    return pair


def _loss(outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss by which units are scored: on the targets, or on the network's own predictions.

    Raises:
        ValueError: If a target is none of its classes, or it has no class scores.
    """
    if outputs.dim() != 2:
        raise ValueError(
            f'outputs of the shape {list(outputs.shape)} are no class scores; sort the network with a pooling '
            '(reset_classifier(num_classes, global_pool))')
    if targets is None:
        targets = outputs.detach().argmax(-1)
    if not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[-1]:
        raise ValueError(
            f'the labels go from {int(targets.min())} to {int(targets.max())}, and the network has {outputs.shape[-1]} '
            'classes; give a loader of images alone if they are of other classes')
    targets = targets.to(outputs.device)
    return F.cross_entropy(outputs, targets.long() if targets.dim() == 1 else targets)  # or probabilities


def magnitude_scores(net: Any) -> Masks:
    """Importance of every unit, in the shapes of the masks: the sum of squares of the weights that it owns.

    Vectors (norms and biases) do not count.
    """
    scores = {
        label: torch.zeros(mask.shape, dtype=torch.float64) for label, mask in _largest_masks(net).items()}
    for name, parameter in net.named_parameters():
        if parameter.dim() < 2:
            continue
        squares, layer = parameter.detach().double().cpu().square(), net.layer_of(name)
        for dim, axis in enumerate(net.unit_axes(name)):
            if axis is not None:
                scores[axis.units] += axis.scores(squares.transpose(0, dim).flatten(1).sum(1))
        if layer is not None:
            scores[layer] += squares.sum()
    return net.join_masks(scores)


def _largest_masks(net: Any) -> dict[str, Tensor]:
    """The masks of the largest arch, by label."""
    return net.split_masks(arch_masks(net.space, net.space.one_hot(net.space.largest)))


@torch.no_grad()
def reorder(net: Any, scores: Mapping[str, Tensor]) -> None:
    """Permute the units of a network by falling scores, in place; its space gets the order of the layers."""
    orders = {
        label: score.argsort(descending=True, stable=True) for label, score in scores.items() if score.dim()}
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        for dim, axis in enumerate(net.unit_axes(name)):
            if axis is not None:
                tensor.copy_(tensor.index_select(dim, axis.rows(orders[axis.units]).to(tensor.device)))
    net.unbound_space = net.with_layer_order(scores)
