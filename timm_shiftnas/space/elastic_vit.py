"""The family of elastic pretrained ViTs: its search space, MACs, parameters, operators and masks.

The networks are timm's `VisionTransformer` with most of its options: LayerScale, register tokens, normalised queries
and keys, a norm before the blocks, attention pooling, heads of any width.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .core import Arch, OneHots, SearchSpace
from .families import Family, register_family
from .operators import OperatorTable
from .shiftformer import (
    add_vit_layers,
    vit_channels,
    vit_choices,
    vit_hiddens,
    vit_masks,
    vit_sizes,
    vit_space_of,
    vit_values,
)

__all__ = ['elastic_vit_space', 'elastic_vit_space_of', 'hidden_width', 'kept_layers', 'parameter_axes']

# Which size every dimension of a parameter follows; `None` is fixed. 'qkv' is three times 'heads': rows q | k | v.
_AXES = (
    (r'(cls_token|reg_token|pos_embed|attn_pool\.latent)', (None, None, 'embed')),
    (r'patch_embed\.proj\.weight', ('embed', None, None, None)),
    (r'head\.weight|attn_pool\.(q|kv|mlp\.fc1)\.weight', (None, 'embed')),
    (r'head\.bias|attn_pool\.(q|kv|mlp\.fc1)\.bias', (None,)),
    (r'attn_pool\.(proj|mlp\.fc2)\.weight', ('embed', None)),
    (r'blocks\.\d+\.attn\.qkv\.weight', ('qkv', 'embed')),
    (r'blocks\.\d+\.attn\.qkv\.bias', ('qkv',)),
    (r'blocks\.\d+\.attn\.[qk]_norm\.(weight|bias)', (None,)),
    (r'blocks\.\d+\.attn\.proj\.weight', ('embed', 'heads')),
    (r'blocks\.\d+\.mlp\.fc1\.weight', ('hidden', 'embed')),
    (r'blocks\.\d+\.mlp\.fc1\.bias', ('hidden',)),
    (r'blocks\.\d+\.mlp\.fc2\.weight', ('embed', 'hidden')),
    (r'.*\.(weight|bias|gamma)', ('embed',)),  # norms, LayerScale and the biases of what is added to the stream
)


def parameter_axes(name: str) -> tuple[str | None, ...]:
    """The size that every dimension of a parameter of a ViT follows: 'embed', 'heads', 'qkv', 'hidden', or `None`.

    Args:
        name: Its name in the state_dict.
    """
    return next(axes for pattern, axes in _AXES if re.fullmatch(pattern, name))


def hidden_width(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden width of an MLP. Rounding gives back the width of the base, whose ratio is a quotient of two widths."""
    return round(embed_dim * mlp_ratio)


def elastic_vit_space(
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        *,
        layer_order: Sequence[int] | None = None,
) -> SearchSpace:
    """The space of an elastic pretrained ViT: token width and depth, and per layer the heads and the MLP width.

    Args:
        embed_dim: Token widths.
        depth: Numbers of layers.
        num_heads: Attention heads of a layer; the base gives the width of a head.
        mlp_ratio: MLP hidden width of a layer as a multiple of `embed_dim`, rounded to the nearest int.
        layer_order: The layers, the most important one first; default is their order in the network. An arch of depth d
            consists of the first d of them, in their order in the network.

    Raises:
        ValueError: If a field is empty, not positive or not increasing, if two choices give the same network, or if
            `layer_order` is not a permutation of the layers.
    """
    values = vit_values(embed_dim, depth, num_heads, mlp_ratio, hidden_width)
    layers = values['depth'][-1]
    order = tuple(range(layers)) if layer_order is None else tuple(layer_order)
    if sorted(order) != list(range(layers)):
        raise ValueError(f'layer_order={order!r} must hold each of 0 to {layers - 1} once')
    return SearchSpace('elastic_vit', tuple(values.items()), vit_choices(values, order), (('layer_order', order),))


def elastic_vit_space_of(arch: Arch | Mapping[str, Any]) -> tuple[SearchSpace, Arch]:
    """`vit_space_of` for a static network of this family."""
    return vit_space_of(arch, elastic_vit_space, 'an arch of an elastic ViT')


def kept_layers(space: SearchSpace, depth: int) -> list[int]:
    """The layers of an arch of this depth, in their order in the network."""
    return sorted(dict(space.structure)['layer_order'][:depth])


# -- MACs and parameters -----------------------------------------------------------------------------------------------


def _geometry(net: Any) -> dict[str, Any]:
    """Properties that MACs and parameters of a ViT of this family, elastic or static, depend on.

    Parameters are counted by what they grow with: `stem` and `block` are the vectors of token width outside the blocks
    and in one of them, `pool` the rows of token width in the attention pooling.
    """
    counts = dict(stem=0, block=0, pool=0, pool_fixed=0, head_norm=0, qkv_bias=0, mlp_bias=0)
    for name, parameter in net.named_parameters():
        axes = parameter_axes(name)
        fixed = math.prod(size for size, axis in zip(parameter.shape, axes, strict=True) if axis is None)
        if name.startswith('attn_pool.'):
            counts['pool' if 'embed' in axes else 'pool_fixed'] += fixed
        elif name.startswith('blocks.0.') and len(axes) == 1:
            counts[{'embed': 'block', 'qkv': 'qkv_bias', 'hidden': 'mlp_bias', None: 'head_norm'}[axes[0]]] += fixed
        elif not name.startswith(('blocks.', 'head.')):
            counts['stem'] += fixed
    pool = net.attn_pool
    return dict(
        counts, img_size=net.patch_embed.img_size, patch_size=net.patch_embed.patch_size, in_chans=net.in_chans,
        num_classes=net.num_classes, global_pool=net.global_pool, prefix=net.num_prefix_tokens,
        head_dim=net.blocks[0].attn.head_dim, pool_inner=0 if pool is None else pool.q.out_features,
        pool_hidden=0 if pool is None else pool.mlp.fc1.out_features,
        **(dict(pool_prefix=net.num_prefix_tokens) if pool is not None and net.pool_include_prefix else {}),
        **({} if vit_hiddens(net) == 2 else dict(hiddens=vit_hiddens(net))))


def _macs(space: SearchSpace, one_hots: OneHots, convention: str) -> torch.Tensor:
    g = space.geometry
    sizes = vit_sizes(space, one_hots, hidden_width)
    width, heads = sizes.width[..., None], sizes.heads * g['head_dim']
    (height, breadth), (patch_h, patch_w) = g['img_size'], g['patch_size']
    patches = (height // patch_h) * (breadth // patch_w)
    tokens, pooled = patches + g['prefix'], patches + g.get('pool_prefix', 0)
    block = 4 * tokens * heads * width + 2 * tokens ** 2 * heads + 2 * tokens * width * sizes.hidden
    embed = patches * patch_h * patch_w * g['in_chans'] * sizes.width
    inner, hidden = g['pool_inner'], g['pool_hidden']
    pool = 2 * ((pooled + 1) * inner + hidden) * sizes.width + 2 * pooled * inner
    classified = tokens if g['global_pool'] == '' else 1  # without pooling the head runs on every token
    return embed + (sizes.active * block).sum(-1) + pool + classified * g['num_classes'] * sizes.width


def _params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    g = space.geometry
    sizes = vit_sizes(space, one_hots, hidden_width)
    width, heads, bias = sizes.width[..., None], sizes.heads * g['head_dim'], g['mlp_bias']
    block = (
        g['block'] * width + g['head_norm'] + (4 * width + 3 * g['qkv_bias']) * heads
        + (2 * width + bias) * sizes.hidden)
    outside = g['stem'] + g['pool'] + g['num_classes']
    return outside * sizes.width + (sizes.active * block).sum(-1) + g['pool_fixed'] + g['num_classes']


# -- operators ---------------------------------------------------------------------------------------------------------


def _first_layer(space: SearchSpace) -> list[list[float]]:
    """1 for the first layer of the network, by depth."""
    firsts = [kept_layers(space, depth)[0] for depth in space.values('depth')]
    return [[float(layer == first) for layer in range(space.values('depth')[-1])] for first in firsts]


def _operators(space: SearchSpace, one_hots: OneHots) -> OperatorTable:
    g, sizes, table = space.geometry, vit_sizes(space, one_hots, hidden_width), OperatorTable(one_hots)
    width, inner, active = sizes.width[..., None], sizes.heads * g['head_dim'], sizes.active
    (height, breadth), (patch_h, patch_w) = g['img_size'], g['patch_size']
    patches, values = (height // patch_h) * (breadth // patch_w), patch_h * patch_w * g['in_chans']
    tokens = patches + g['prefix']
    table.add('embed', macs=patches * values * sizes.width, writes=patches * sizes.width, matrix=values * sizes.width,
              rows=sizes.width, vectors=(g['stem'] - values) * sizes.width)
    # The sequence of blocks holds its input, which is that of the first block, to the end.
    first = one_hots[1] @ torch.tensor(_first_layer(space), dtype=torch.float64).to(one_hots[1])
    image = height * breadth * g['in_chans']
    held = image + (1 - first) * tokens * width
    # x, its norm, queries, keys and values, and the output of attention; norms copy queries and keys, whose layout then
    # makes the output be copied, too
    normed = g['head_norm'] > 0
    attended = (7 if normed else 4) * inner + (not normed) * sizes.heads
    table.add('attention', active, macs=2 * tokens ** 2 * inner, writes=tokens * inner,
              live=held + tokens * (2 * width + attended))
    add_vit_layers(table, sizes, tokens, g['head_dim'], held, g['mlp_bias'], g['qkv_bias'], g.get('hiddens', 2),
                   projected=held + tokens * (3 * width + (6 if normed else 4) * inner))
    # LayerScale and the norms of queries and keys; norms of the stream and biases are counted above
    table.add('scale', active, vectors=(g['block'] - 4 - 2 * g['mlp_bias']) * width + g['head_norm'])
    inner, hidden, classes = g['pool_inner'], g['pool_hidden'], g['num_classes']
    if inner:
        matrix, pooled = (4 * inner + 2 * hidden) * sizes.width, patches + g.get('pool_prefix', 0)
        table.add('pool', macs=2 * ((pooled + 1) * inner + hidden) * sizes.width + 2 * pooled * inner,
                  writes=2 * pooled * inner,
                  live=image + (tokens + 2) * sizes.width + (2 * pooled + 1) * inner + g.get('hiddens', 2) * hidden,
                  matrix=matrix, rows=3 * inner + hidden + 2 * sizes.width,
                  vectors=g['pool'] * sizes.width - matrix + g['pool_fixed'])
    classified = tokens if g['global_pool'] == '' else 1
    table.add('head', macs=classified * classes * sizes.width, writes=classified * classes,
              matrix=classes * sizes.width, rows=classes, vectors=classes)
    return table


register_family(Family(
    name='elastic_vit', space=elastic_vit_space, macs=_macs, params=_params,
    masks=partial(vit_masks, hidden_width=hidden_width), geometry=_geometry, operators=_operators,
    supernet='elastic_supernet', subnet='elastic_vit_subnet', channels=vit_channels))
