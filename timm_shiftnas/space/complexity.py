"""MACs and parameters of an arch, as pure arithmetic: no network is built and nothing is run.

Both are polynomials in one-hot encodings and use only `+` and `*`, so the same lines give an exact integer for an
`Arch`, a vector for a batch of archs, and a differentiable number for the one-hots of the architecture generator.

**MACs** are multiply-accumulates per image at batch 1, of the convolutions and matrix products that really run
(what papers and timm's tables call FLOPs; `torch.utils.flop_counter.FlopCounterMode` counts two per MAC).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .core import Arch, SearchSpace, expanded_width
from .shiftmobilenet import HEAD_RATIO, block_choices, se_width, width_choices

__all__ = ['macs', 'macs_range', 'params']

HEAD_DIM = 64  # AutoFormer's heads are always 64 channels wide
OneHots = Sequence[torch.Tensor]
CONVENTIONS = ('fused', 'reference')


def macs(
        space: SearchSpace,
        arch: Arch | Sequence[Arch] | OneHots,
        convention: str = 'fused',
) -> int | torch.Tensor:
    """Multiply-accumulates per image of an arch.

    Args:
        space: A bound search space (the `space` of a model).
        arch: An `Arch`; a sequence of N archs; or one-hots, one tensor of shape [..., number of values] per choice.
        convention: 'fused' counts what this package runs. 'reference' counts relative position as AutoFormer's
            published code computes it (with tables of N x N x 64), for comparison with published figures.

    Returns:
        An int for one arch, an int64 tensor [N] for a sequence, a differentiable float64 tensor [...] for one-hots.

    Raises:
        ValueError: If the space is unbound, the arch is not in it, or the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention={convention!r} is unknown; choose one of {CONVENTIONS}')
    if space.family == 'shiftmobilenet':
        return _evaluate(space, arch, _mobilenet_macs)
    return _evaluate(space, arch, lambda space, one_hots: _shiftformer_macs(
        _shiftformer_sizes(space, one_hots), space.geometry, convention))


def params(space: SearchSpace, arch: Arch | Sequence[Arch] | OneHots) -> int | torch.Tensor:
    """Number of parameters of the extracted subnet; arguments, return value and errors as for `macs`."""
    if space.family == 'shiftmobilenet':
        return _evaluate(space, arch, _mobilenet_params)
    return _evaluate(space, arch, lambda space, one_hots: _shiftformer_params(
        _shiftformer_sizes(space, one_hots), space.geometry))


def macs_range(space: SearchSpace) -> tuple[int, int]:
    """MACs of the smallest and of the largest arch."""
    return macs(space, space.smallest), macs(space, space.largest)


def _evaluate(space: SearchSpace, arch: Arch | Sequence, polynomial: Callable[[SearchSpace, OneHots], torch.Tensor]):
    space.geometry  # tells an unbound space
    if isinstance(arch, Sequence) and len(arch) and isinstance(arch[0], torch.Tensor):
        return polynomial(space, arch)
    if isinstance(arch, Sequence):
        return polynomial(space, space.one_hot(arch)).round().long()
    one_hots = space.one_hot_of_indices(torch.tensor(space.encode(arch)))
    return round(polynomial(space, one_hots).item())


# -- ShiftFormer -------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """What the ViT polynomials are written in; `width` is [...], the others are [..., layers]."""
    width: torch.Tensor
    active: torch.Tensor  # 1 where the layer exists
    heads: torch.Tensor
    hidden: torch.Tensor


def _shiftformer_sizes(space: SearchSpace, one_hots: OneHots) -> _Sizes:
    embed, depth, *layers = (one_hot.double() for one_hot in one_hots)
    dims, depths = space.values('embed_dim'), space.values('depth')
    heads, ratios = space.values('num_heads'), space.values('mlp_ratio')

    def constant(data) -> torch.Tensor:
        return torch.tensor(data, dtype=torch.float64, device=embed.device)

    # A hidden width is int(embed_dim * mlp_ratio): it depends on two choices, so it reads their outer product.
    hidden = embed @ constant([[int(dim * ratio) for ratio in ratios] for dim in dims])
    return _Sizes(
        width=embed @ constant(dims),
        active=depth @ constant([[float(layer < value) for layer in range(depths[-1])] for value in depths]),
        heads=torch.stack([one_hot @ constant(heads) for one_hot in layers[0::2]], dim=-1),
        hidden=torch.stack([(one_hot * hidden).sum(-1) for one_hot in layers[1::2]], dim=-1),
    )


def fused_columns(grid_size: tuple[int, int]) -> int:
    """Channels that the fused form of relative position appends to the 64 of a head: the grid's rows and columns and a
    flag for the class token, padded to a multiple of 8 (fused kernels need it)."""
    return (grid_size[0] + grid_size[1] + 1 + 7) // 8 * 8


def _shiftformer_macs(sizes: _Sizes, geometry: dict, convention: str) -> torch.Tensor:
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


def _shiftformer_params(sizes: _Sizes, geometry: dict) -> torch.Tensor:
    _, _, patches, tokens, patch_values = _tokens(geometry)
    positions = tokens if not geometry['no_embed_class'] else patches
    embed = patch_values + 1 + geometry['class_token'] + positions * geometry['pos_embed'] + 2 * geometry['final_norm']
    width, inner, bias = sizes.width[..., None], HEAD_DIM * sizes.heads, geometry['proj_bias']
    tables = 4 * (2 * geometry['max_relative_position'] + 2) * HEAD_DIM if geometry['relative_position'] else 0
    attention = 3 * inner * (width + geometry['qkv_bias']) + tables + inner * width + width * bias
    mlp = 2 * width * sizes.hidden + (sizes.hidden + width) * bias
    layers = (sizes.active * (attention + mlp + 4 * width)).sum(-1)
    head = geometry['num_classes'] * (sizes.width + 1)
    return embed * sizes.width + layers + head


def _tokens(geometry: dict) -> tuple[int, int, int, int, int]:
    """Rows, columns, patches, tokens, and the number of values in one patch."""
    (height, width), (patch_h, patch_w) = geometry['img_size'], geometry['patch_size']
    rows, cols = height // patch_h, width // patch_w
    patches = rows * cols
    return rows, cols, patches, patches + geometry['class_token'], patch_h * patch_w * geometry['in_chans']


# -- ShiftMobileNet ----------------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """What the CNN polynomials are written in: for every block of the deepest network a column, [..., blocks]."""
    active: torch.Tensor  # 1 where the block exists
    expands: torch.Tensor  # 1 where it has an expanding convolution
    width_in: torch.Tensor
    hidden: torch.Tensor
    width_out: torch.Tensor
    kernel_area: torch.Tensor
    se: torch.Tensor
    projects: torch.Tensor  # 1 where its shortcut has a convolution
    pixels_in: torch.Tensor
    pixels_out: torch.Tensor


class _Ends(NamedTuple):
    """Stem and head, each [...]."""
    stem: torch.Tensor
    stem_pixels: torch.Tensor
    stage: torch.Tensor  # width of the last stage
    stage_pixels: torch.Tensor
    last: torch.Tensor


def _mobilenet_sizes(space: SearchSpace, one_hots: OneHots) -> tuple[_Blocks, _Ends]:
    one_hots = [one_hot.double() for one_hot in one_hots]
    fixed, blocks, widths = dict(space.structure), block_choices(space), width_choices(space)

    def constant(data) -> torch.Tensor:
        return torch.tensor(data, dtype=torch.float64, device=one_hots[0].device)

    one = torch.ones_like(one_hots[0][..., 0])
    values = [constant(choice.values) for choice in space.choices]
    chosen = [one_hot @ value for one_hot, value in zip(one_hots, values)]
    sides = [math.ceil(resolution / 2) for resolution in space.values('resolution')]

    def pixels() -> torch.Tensor:
        return one_hots[0] @ constant([side ** 2 for side in sides])

    stem_pixels, columns = pixels(), []
    for block in blocks:
        depth, pixels_in = block.depth, pixels()
        sides = [math.ceil(side / block.stride) for side in sides]
        incoming, leaving = (space.choices[i].values for i in (block.width_in, block.width_out))
        ratios = (1.,) if block.expand_ratio is None else space.choices[block.expand_ratio].values
        hidden = [[expanded_width(width, ratio) if block.expands else width for ratio in ratios] for width in incoming]
        se = [[se_width(width) if block.se else 0 for width in row] for row in hidden]
        # an inner width depends on two choices: it reads their outer product
        ratio = one[..., None] if block.expand_ratio is None else one_hots[block.expand_ratio]
        hidden, se = ((one_hots[block.width_in] @ constant(table) * ratio).sum(-1) for table in (hidden, se))
        equal = one_hots[block.width_in] @ constant([[float(a == b) for b in leaving] for a in incoming])
        projects = one - (equal * one_hots[block.width_out]).sum(-1)
        projection = fixed['shortcut'] == 'projection' and block.position == 0
        columns.append(_Blocks(
            active=one if depth is None else one_hots[depth] @ (values[depth] > block.position).double(),
            expands=one * block.expands, width_in=chosen[block.width_in], hidden=hidden,
            width_out=chosen[block.width_out],
            kernel_area=9 * one if block.kernel_size is None else one_hots[block.kernel_size] @ values[
                block.kernel_size].square(),
            se=se, projects=projects if projection else 0 * one, pixels_in=pixels_in, pixels_out=pixels()))
    ends = _Ends(chosen[widths[0]], stem_pixels, chosen[widths[-2]], pixels(), chosen[widths[-1]])
    return _Blocks(*(torch.stack(column, dim=-1) for column in zip(*columns))), ends


def _mobilenet_macs(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    b, ends = _mobilenet_sizes(space, one_hots)
    geometry, fixed = space.geometry, dict(space.structure)
    expand = b.expands * b.width_in * b.hidden * b.pixels_in
    inner = b.hidden * ((b.kernel_area + b.width_out) * b.pixels_out + 2 * b.se)
    project = b.projects * b.width_in * b.width_out * b.pixels_out
    blocks = (b.active * (expand + inner + project)).sum(-1)
    stem = 9 * geometry['in_chans'] * ends.stem * ends.stem_pixels
    pooled = 1 if geometry['global_pool'] else ends.stage_pixels  # without pooling the head runs on every pixel
    head = geometry['num_classes'] * ends.last * pooled
    if fixed['head'] == 'plain':
        head = head + ends.stage * ends.last * ends.stage_pixels
    else:
        head = head + HEAD_RATIO * ends.stage * (ends.stage * ends.stage_pixels + ends.last * pooled)
    return stem + blocks + head


def _mobilenet_params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    b, ends = _mobilenet_sizes(space, one_hots)
    geometry, fixed = space.geometry, dict(space.structure)
    expand = b.expands * (b.width_in + 2) * b.hidden  # with two parameters of BatchNorm per channel
    inner = b.hidden * (b.kernel_area + 2) + (b.hidden + 2) * b.width_out
    if_se = (b.se > 0).double()
    se = 2 * b.hidden * b.se + b.se + b.hidden * if_se
    blocks = (b.active * (expand + inner + se + b.projects * b.width_in * b.width_out)).sum(-1)
    stem = (9 * geometry['in_chans'] + 2) * ends.stem
    head = geometry['num_classes'] * (ends.last + 1)
    if fixed['head'] == 'plain':
        head = head + (ends.stage + 2) * ends.last
    else:
        head = head + HEAD_RATIO * ends.stage * (ends.stage + 2 + ends.last)
    return stem + blocks + head


# -- budgets -----------------------------------------------------------------------------------------------------------

