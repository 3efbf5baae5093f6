"""Sorting an elastic network by importance: the same function, most important units first.

A smaller arch keeps the first channels, heads and hidden units and the layers of `layer_order`. In a pretrained network
their order means nothing, so that a subnet would lose units at random. Permuting them changes no output: LayerNorm,
attention and MLPs do not depend on the order of their units.
"""
from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..space.elastic_vit import elastic_vit_space, parameter_axes
from ..space.matrix_mapping import arch_masks
from ..space.shiftformer import ShiftFormerMasks
from .elastic_vit import ElasticVisionTransformer

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
        loader: Batches of (images [B, C, H, W], class indices [B]), preprocessed as for the base; of images alone, if
            the network does not know their classes, whose labels are then its own predictions. Units are scored by
            `taylor_scores`; without a loader by `magnitude_scores`.
        num_batches: How many batches to score with.
        progress: Show a bar if the standard error stream is a terminal.

    Returns:
        The network.

    Raises:
        ValueError: If `net` is not an elastic pretrained network, or the loader is empty.
    """
    inner = unwrap_model(net)
    if not isinstance(inner, ElasticVisionTransformer):
        raise ValueError(f'{type(inner).__name__} cannot be sorted; sort_by_importance takes a network of elastic(...)')
    if loader is None:
        scores = magnitude_scores(inner)
    else:
        scores = taylor_scores(inner, tqdm(
            islice(loader, num_batches), total=num_batches, desc='scoring units', unit='batch',
            disable=None if progress else True))
    reorder(inner, scores)
    return net


def taylor_scores(net: ElasticVisionTransformer, batches: Iterable[Any]) -> ShiftFormerMasks:
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
    one_hots = net.space.one_hot(net.space.largest)
    masks = ShiftFormerMasks(*(
        mask.to(weight).requires_grad_() for mask in arch_masks(net.space, one_hots)))
    total: list[Tensor] = []
    training = net.training
    net.eval()
    try:
        for batch in batches:
            images, targets = (batch, None) if isinstance(batch, Tensor) else batch
            gradients = torch.autograd.grad(_loss(net(images.to(weight), masks), targets), masks)
            scores = [gradient.abs() for gradient in gradients]
            total = scores if not total else [a + b for a, b in zip(total, scores, strict=True)]
    finally:
        net.train(training)
    if not total:
        raise ValueError('the loader has no batches to score units with; give training images')
    return ShiftFormerMasks(*total)


def _loss(outputs: Tensor, targets: Tensor | None) -> Tensor:
    """What units are scored by: the loss on the targets, or on what the network itself predicts."""
    if targets is None:
        targets = outputs.argmax(-1)
    return F.cross_entropy(outputs, targets.to(outputs.device))


def magnitude_scores(net: ElasticVisionTransformer) -> ShiftFormerMasks:
    """Importance of every unit, in the shapes of the masks: the sum of squares of the weights that it owns."""
    layers, heads = len(net.blocks), net.blocks[0].attn.num_heads
    scores = ShiftFormerMasks(
        *(torch.zeros(size, dtype=torch.float64) for size in (
            net.embed_dim, layers, (layers, heads), (layers, net.blocks[0].mlp.fc1.out_features))))
    for name, parameter in net.named_parameters():
        axes, squares = parameter_axes(name), parameter.detach().double().cpu().square()
        layer = int(name.split('.')[1]) if name.startswith('blocks.') else None
        if len(axes) < 2 and 'hidden' not in axes and 'qkv' not in axes:
            continue  # norms and biases of the stream say little about a channel
        for dim, axis in enumerate(axes):
            each = squares.transpose(0, dim).flatten(1).sum(1) if squares.dim() > 1 else squares
            if axis == 'embed':
                scores.embed_dim.add_(each)
            elif axis == 'hidden':
                scores.hidden[layer] += each
            elif axis in ('qkv', 'heads'):
                roles = 3 if axis == 'qkv' else 1
                scores.num_heads[layer] += each.view(roles, heads, -1).sum((0, 2))
        if layer is not None:
            scores.depth[layer] += squares.sum()
    return scores


@torch.no_grad()
def reorder(net: ElasticVisionTransformer, scores: ShiftFormerMasks) -> None:
    """Permute the units of a network by falling scores, in place; its space gets the order of the layers."""
    head_dim = net.blocks[0].attn.head_dim
    embed = scores.embed_dim.argsort(descending=True, stable=True)
    for name, parameter in net.named_parameters():
        order = dict(embed=embed)
        if name.startswith('blocks.'):
            layer = int(name.split('.')[1])
            heads = scores.num_heads[layer].argsort(descending=True, stable=True)
            rows = torch.arange(len(heads) * head_dim, device=heads.device).view(-1, head_dim)[heads].flatten()
            order['heads'] = rows
            order['qkv'] = torch.cat([rows + role * len(rows) for role in range(3)])
            order['hidden'] = scores.hidden[layer].argsort(descending=True, stable=True)
        for dim, axis in enumerate(parameter_axes(name)):
            if axis in order:
                parameter.copy_(parameter.index_select(dim, order[axis].to(parameter.device)))
    layers = scores.depth.argsort(descending=True, stable=True).tolist()
    net.unbound_space = elastic_vit_space(**dict(net.unbound_space.fields), layer_order=layers)
