"""The ShiftFormer family: its search space, MACs, parameters, operators and masks.

The networks are the ViTs of AutoFormer (Chen et al., ICCV 2021).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from .core import Arch, Choice, OneHots, SearchSpace, ordered_values
from .families import Family, register_family
from .matrix_mapping import Size, nested
from .operators import OperatorTable

__all__ = [
    'HEAD_DIM', 'ShiftFormerMasks', 'ViTSizes', 'add_vit_layers', 'fused_columns', 'shiftformer_space',
    'shiftformer_space_of', 'vit_channels', 'vit_choices', 'vit_hiddens', 'vit_masks', 'vit_sizes', 'vit_space_of',
    'vit_values',
]

HEAD_DIM = 64  # AutoFormer's heads are always 64 channels wide
_FIELDS = ('embed_dim', 'depth', 'num_heads', 'mlp_ratio')


def shiftformer_space(
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
) -> SearchSpace:
    """The space of an elastic ViT: token width and depth, and per layer the number of heads and the MLP width.

    Args:
        embed_dim: Token widths.
        depth: Numbers of layers.
        num_heads: Attention heads of a layer, each 64 channels wide.
        mlp_ratio: MLP hidden width of a layer, as a multiple of `embed_dim`: `int(embed_dim * mlp_ratio)`.

    Raises:
        ValueError: If a field is empty, not positive or not increasing, or if two choices give the same network.
    """
    values = vit_values(embed_dim, depth, num_heads, mlp_ratio, _hidden_width)
    return SearchSpace('shiftformer', tuple(values.items()), vit_choices(values, range(values['depth'][-1])))


def _hidden_width(embed_dim: int, mlp_ratio: float) -> int:
    return int(embed_dim * mlp_ratio)


def shiftformer_space_of(arch: Arch | Mapping[str, Any]) -> tuple[SearchSpace, Arch]:
    """`vit_space_of` for a ShiftFormer."""
    return vit_space_of(arch, shiftformer_space, 'a ShiftFormer arch')


# -- what both families of ViTs share ----------------------------------------------------------------------------------


HiddenWidth = Callable[[int, float], int]  # of an MLP, from the token width and the ratio


def vit_values(
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
        hidden_width: HiddenWidth,
) -> dict[str, tuple]:
    """The checked fields of a space of ViTs; raises as `shiftformer_space` does."""
    values = dict(
        embed_dim=ordered_values('embed_dim', embed_dim, int),
        depth=ordered_values('depth', depth, int),
        num_heads=ordered_values('num_heads', num_heads, int),
        mlp_ratio=ordered_values('mlp_ratio', mlp_ratio, float))
    for dim in values['embed_dim']:
        hidden = [hidden_width(dim, ratio) for ratio in values['mlp_ratio']]
        if len(set(hidden)) < len(hidden) or hidden[0] < 1:
            raise ValueError(
                f'mlp_ratio={values["mlp_ratio"]} gives the hidden widths {hidden} at embed_dim={dim}; '
                'they must be positive and differ: choose ratios further apart')
    return values


def vit_choices(values: Mapping[str, tuple], order: Sequence[int]) -> tuple[Choice, ...]:
    """The choices of a space of ViTs, in which an arch of depth d consists of the first d layers of `order`."""
    choices = [Choice('embed_dim', values['embed_dim']), Choice('depth', values['depth'])]
    for layer in range(len(order)):
        needed = order.index(layer) + 1  # the least depth that keeps this layer
        choices += [Choice(name, values[name], layer, gate=1, min_depth=needed) for name in ('num_heads', 'mlp_ratio')]
    return tuple(choices)


def _layer_table(space: SearchSpace) -> list[list[float]]:
    """1 where a layer exists, by depth."""
    depths = space.values('depth')
    order = dict(space.structure).get('layer_order', range(depths[-1]))
    return [[float(order.index(layer) < depth) for layer in range(depths[-1])] for depth in depths]


def vit_space_of(
        arch: Arch | Mapping[str, Any], build: Callable[..., SearchSpace], kind: str) -> tuple[SearchSpace, Arch]:
    """The space of the values of an arch that comes without one, and the arch in it.

    Args:
        arch: An `Arch` or its dict.
        build: Builder of the spaces of its family.
        kind: What the arch has to be, for the error message.

    Raises:
        ValueError: If it is not an arch of the family.
    """
    fields = arch.to_dict() if isinstance(arch, Arch) else dict(arch) if isinstance(arch, Mapping) else {}
    if sorted(fields) != sorted(_FIELDS):
        raise ValueError(f'arch={arch!r} is not {kind}; give a dict of {", ".join(_FIELDS)}')
    try:
        values = {
            name: sorted(set(value)) if isinstance(value, (list, tuple)) else [value] for name, value in fields.items()}
    except TypeError:
        raise ValueError(f'arch={arch!r}: every field must be a number or a list of numbers') from None
    space = build(**values)
    return space, space.arch(**fields)


def fused_columns(grid_size: tuple[int, int]) -> int:
    """Channels that the fused form of relative position appends to the 64 of a head.

    These are the grid's rows and columns and a flag for the class token, padded to a multiple of 8 (fused kernels need
    it).
    """
    return (grid_size[0] + grid_size[1] + 1 + 7) // 8 * 8


# -- MACs and parameters -----------------------------------------------------------------------------------------------


class ViTSizes(NamedTuple):
    """Sizes in which the polynomials are written; `width` is [...], the others are [..., layers]."""
    width: torch.Tensor
    active: torch.Tensor  # 1 where the layer exists
    heads: torch.Tensor
    hidden: torch.Tensor


class _Tokens(NamedTuple):
    rows: int
    cols: int
    patches: int
    tokens: int  # patches and the class token
    patch_values: int  # numbers in one patch


def vit_sizes(space: SearchSpace, one_hots: OneHots, hidden_width: HiddenWidth) -> ViTSizes:
    """The sizes of archs of a space of ViTs, given as one-hots."""
    embed, depth, *layers = one_hots
    dims, heads, ratios = (space.values(name) for name in ('embed_dim', 'num_heads', 'mlp_ratio'))

    def constant(data: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=torch.float64, device=embed.device)

    # a hidden width depends on two choices, so it reads the outer product of their one-hots
    hidden = embed @ constant([[hidden_width(dim, ratio) for ratio in ratios] for dim in dims])
    return ViTSizes(
        width=embed @ constant(dims),
        active=depth @ constant(_layer_table(space)),
        heads=torch.stack([one_hot @ constant(heads) for one_hot in layers[0::2]], dim=-1),
        hidden=torch.stack([(one_hot * hidden).sum(-1) for one_hot in layers[1::2]], dim=-1),
    )


def vit_channels(space: SearchSpace, stage: int) -> Size:
    """Channels of a feature map: the token width, after every layer."""
    return Size.of(space, int, 0)


def _tokens(geometry: dict[str, Any]) -> _Tokens:
    (height, width), (patch_h, patch_w) = geometry['img_size'], geometry['patch_size']
    rows, cols = height // patch_h, width // patch_w
    return _Tokens(
        rows, cols, rows * cols, rows * cols + geometry['class_token'], patch_h * patch_w * geometry['in_chans'])


def _macs(space: SearchSpace, one_hots: OneHots, convention: str) -> torch.Tensor:
    geometry = space.geometry
    sizes = vit_sizes(space, one_hots, _hidden_width)
    rows, cols, patches, tokens, patch_values = _tokens(geometry)
    embed = patches * patch_values * sizes.width
    qkv_proj = 4 * HEAD_DIM * tokens * sizes.heads * sizes.width[..., None]
    mlp = 2 * tokens * sizes.width[..., None] * sizes.hidden
    if not geometry['relative_position']:
        attention = 2 * tokens ** 2 * HEAD_DIM * sizes.heads
    elif convention == 'reference':
        attention = 4 * tokens ** 2 * HEAD_DIM * sizes.heads
    else:
        # one attention of wider heads, and the products of queries, and of attention masses, with the tables
        tables = 2 * patches * HEAD_DIM * (rows + cols)
        attention = (2 * tokens ** 2 * (HEAD_DIM + fused_columns((rows, cols))) + tables) * sizes.heads
    layers = (sizes.active * (qkv_proj + attention + mlp)).sum(-1)
    classified = tokens if geometry['global_pool'] == '' else 1  # without pooling the head runs on every token
    return embed + layers + classified * geometry['num_classes'] * sizes.width


def _params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    geometry = space.geometry
    sizes, (_, _, patches, tokens, patch_values) = vit_sizes(space, one_hots, _hidden_width), _tokens(geometry)
    positions = patches if geometry['no_embed_class'] else tokens
    embed = patch_values + 1 + geometry['class_token'] + positions * geometry['pos_embed'] + 2 * geometry['final_norm']
    width, inner, bias = sizes.width[..., None], HEAD_DIM * sizes.heads, geometry['proj_bias']
    tables = 4 * (2 * geometry['max_relative_position'] + 2) * HEAD_DIM if geometry['relative_position'] else 0
    attention = 3 * inner * (width + geometry['qkv_bias']) + tables + inner * width + width * bias
    mlp = 2 * width * sizes.hidden + (sizes.hidden + width) * bias
    layers = (sizes.active * (attention + mlp + 4 * width)).sum(-1)
    return embed * sizes.width + layers + geometry['num_classes'] * (sizes.width + 1)


def _geometry(net: Any) -> dict[str, Any]:
    """Properties that MACs and parameters of a ShiftFormer, elastic or static, depend on."""
    args = net.model_args
    return dict(
        img_size=net.patch_embed.img_size, patch_size=net.patch_embed.patch_size, in_chans=net.in_chans,
        num_classes=net.num_classes, global_pool=net.global_pool, class_token=net.has_class_token,
        no_embed_class=net.no_embed_class, pos_embed=net.pos_embed is not None,
        final_norm=args.get('final_norm', True), qkv_bias=args['qkv_bias'], proj_bias=args.get('proj_bias', True),
        relative_position=args['relative_position'], max_relative_position=args['max_relative_position'],
        **({} if vit_hiddens(net) == 2 else dict(hiddens=vit_hiddens(net))))


# -- operators ---------------------------------------------------------------------------------------------------------


def add_vit_layers(
        table: OperatorTable, sizes: ViTSizes, tokens: int, head_dim: int, held: torch.Tensor | float, bias: float,
        qkv_bias: float, hiddens: int, projected: torch.Tensor | float = 0.) -> None:
    """Add the operators that the layers of all ViTs share: norms, projections and MLPs.

    Args:
        table: The table.
        sizes: Of the archs.
        tokens: Of an image.
        head_dim: Channels of a head.
        held: Values that exist throughout a layer, [...] or [..., layers], its own input aside.
        bias: 1 if the projection of the heads and the layers of the MLP have a bias.
        qkv_bias: 1 if queries, keys and values have one.
        hiddens: Tensors of hidden width that exist in the activation; see `vit_hiddens`.
        projected: Values that exist after the projection of the heads.
    """
    active, width, inner, hidden = sizes.active, sizes.width[..., None], head_dim * sizes.heads, sizes.hidden
    table.add('norm', active, writes=tokens * width, vectors=2 * width)
    table.add('norm', active, writes=tokens * width, vectors=2 * width)
    table.add('qkv', active, macs=3 * tokens * width * inner, writes=3 * tokens * inner, matrix=3 * width * inner,
              rows=3 * inner, vectors=3 * qkv_bias * inner)
    table.add('proj', active, macs=tokens * width * inner, writes=tokens * width, matrix=width * inner, rows=width,
              vectors=bias * width, live=projected)
    table.add('fc1', active, macs=tokens * width * hidden, writes=tokens * hidden, matrix=width * hidden, rows=hidden,
              vectors=bias * hidden)
    # the input of the block, that of the MLP, its norm, and the hidden values
    table.add('act', active, writes=tokens * hidden, live=held + tokens * (3 * width + hiddens * hidden))
    table.add('fc2', active, macs=tokens * width * hidden, writes=tokens * width, matrix=width * hidden, rows=width,
              vectors=bias * width)


def vit_hiddens(net: Any) -> int:
    """Number of tensors of hidden width in an MLP's activation: input, output, and for quick GELU a factor."""
    return 2 + (type(net.blocks[0].mlp.act).__name__ == 'QuickGELU')


def _operators(space: SearchSpace, one_hots: OneHots) -> OperatorTable:
    g, sizes, table = space.geometry, vit_sizes(space, one_hots, _hidden_width), OperatorTable(one_hots)
    rows, cols, patches, tokens, patch_values = _tokens(g)
    width, heads, active = sizes.width[..., None], sizes.heads, sizes.active
    positions = patches if g['no_embed_class'] else tokens
    image = math.prod(g['img_size']) * g['in_chans']
    table.add('embed', macs=patches * patch_values * sizes.width, writes=patches * sizes.width,
              matrix=patch_values * sizes.width, rows=sizes.width,
              vectors=(1 + g['class_token'] + positions * g['pos_embed']) * sizes.width)
    extra = 0
    if g['relative_position']:
        # of all layers: one-hot columns, and two tables of indices of 8 bytes
        extra = fused_columns((rows, cols))
        image += tokens * extra + 2 * (rows ** 2 + cols ** 2)
        grids = HEAD_DIM * (rows ** 2 + cols ** 2 + 1)
        table.add('position', active, macs=2 * patches * HEAD_DIM * (rows + cols) * heads,
                  writes=patches * (2 * extra + HEAD_DIM) * heads,
                  vectors=4 * (2 * g['max_relative_position'] + 2) * HEAD_DIM)
        # x, its norm, queries, keys and values, the same with their columns, those of queries, tables, the output
        live = grids + heads * tokens * (7 * HEAD_DIM + 5 * extra + 1)
    else:
        live = heads * tokens * (4 * HEAD_DIM + 1)
    table.add('attention', active, macs=2 * tokens ** 2 * (HEAD_DIM + extra) * heads,
              writes=tokens * (HEAD_DIM + extra) * heads, live=image + 2 * tokens * width + live)
    add_vit_layers(table, sizes, tokens, HEAD_DIM, image, g['proj_bias'], g['qkv_bias'], g.get('hiddens', 2))
    classified = tokens if g['global_pool'] == '' else 1
    table.add('head', macs=classified * g['num_classes'] * sizes.width, writes=classified * g['num_classes'],
              matrix=g['num_classes'] * sizes.width, rows=g['num_classes'],
              vectors=g['num_classes'] + 2 * g['final_norm'] * sizes.width)
    return table


# -- masks -------------------------------------------------------------------------------------------------------------


class ShiftFormerMasks(NamedTuple):
    """An arch as masks of full width: a supernet takes it in place of an `Arch`.

    Attributes:
        embed_dim: [largest embed_dim].
        depth: [largest depth], 1 for layers that exist.
        num_heads: [largest depth, largest num_heads].
        hidden: [largest depth, int(largest embed_dim * largest mlp_ratio)].
    """
    embed_dim: torch.Tensor
    depth: torch.Tensor
    num_heads: torch.Tensor
    hidden: torch.Tensor

    def to(self, like: torch.Tensor) -> ShiftFormerMasks:
        """The same masks with the dtype and device of a tensor."""
        return ShiftFormerMasks(*(mask.to(like) for mask in self))


def vit_masks(space: SearchSpace, one_hots: OneHots, hidden_width: HiddenWidth) -> ShiftFormerMasks:
    """The masks of one arch of a space of ViTs, given as one-hots."""
    embed, depth, *layers = one_hots
    dims, ratios = space.values('embed_dim'), space.values('mlp_ratio')
    hidden = nested([hidden_width(dim, ratio) for dim in dims for ratio in ratios], embed)
    return ShiftFormerMasks(
        embed_dim=embed @ nested(dims, embed),
        depth=depth @ torch.tensor(_layer_table(space), dtype=embed.dtype, device=embed.device),
        num_heads=torch.stack(layers[0::2]) @ nested(space.values('num_heads'), embed),
        hidden=torch.stack([torch.outer(embed, ratio).flatten() for ratio in layers[1::2]]) @ hidden,
    )


register_family(Family(
    name='shiftformer', space=shiftformer_space, macs=_macs, params=_params,
    masks=partial(vit_masks, hidden_width=_hidden_width), geometry=_geometry, operators=_operators,
    supernet='shiftformer_supernet', subnet='shiftformer_subnet', channels=vit_channels))
