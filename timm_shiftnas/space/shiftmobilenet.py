"""The ShiftMobileNet family: its search space, its block table, and what follows from the table.

One space for the weight-entangled CNN supernets of the field: BigNAS (Yu et al., ECCV 2020), AttentiveNAS (Wang et al.,
CVPR 2021) and Once-for-all (Cai et al., ICLR 2020).
"""
from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from timm.layers import make_divisible

from .core import Arch, Choice, OneHots, SearchSpace, ordered_values
from .families import Family, register_family
from .matrix_mapping import Size, nested
from .operators import OperatorTable

__all__ = [
    'Block', 'BlockMasks', 'BlockShape', 'HEAD_RATIO', 'ShiftMobileNetMasks', 'Structure', 'block_shapes',
    'block_table', 'output_side', 'shiftmobilenet_space', 'shiftmobilenet_space_of', 'stock_blocks',
]

HEAD_RATIO = 6  # the 'efficient' head expands the last stage by this before pooling
_FIELDS = ('resolution', 'width', 'depth', 'kernel_size', 'expand_ratio')
_ACTS = {'relu': 're', 'relu6': 'r6', 'hard_swish': 'hs', 'swish': 'sw'}  # in timm's block strings


# -- the search space --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """Fixed properties of the networks of a space; the attributes are arguments of `shiftmobilenet_space`.

    It iterates over its `(name, value)` pairs, so `dict(structure)` are keyword arguments of `shiftmobilenet_space`.
    """
    per_block: bool
    stem_block: bool
    stride: tuple[int, ...]
    se: tuple[bool, ...]
    act: tuple[str, ...]
    head: str
    shortcut: str
    kernel: str

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: what the `structure=` of a static subnet takes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}

    @property
    def total_stride(self) -> int:
        return 2 * math.prod(self.stride)

    @property
    def has_projections(self) -> bool:
        return self.shortcut == 'projection'

    @property
    def has_efficient_head(self) -> bool:
        return self.head == 'efficient'


def shiftmobilenet_space(
        resolution: Sequence[int],
        width: Sequence[Sequence[int]],
        depth: Sequence[int] | Sequence[Sequence[int]],
        kernel_size: Sequence[int] | Sequence[Sequence[int]],
        expand_ratio: Sequence[float] | Sequence[Sequence[float]],
        *,
        per_block: bool = False,
        stem_block: bool = False,
        stride: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        se: bool | Sequence[bool] = True,
        act: str | Sequence[str] = 'swish',
        head: str = 'plain',
        shortcut: str = 'projection',
        kernel: str = 'crop',
) -> SearchSpace:
    """The space of an elastic MobileNet: a stem of stride 2, stages of inverted residual blocks, a last convolution.

    The defaults of what is fixed are those of BigNAS; AttentiveNAS and Once-for-all are other values of the same
    arguments. The arch has the fields `resolution` and per stage `width` (stem, stages and last convolution), `depth`,
    `kernel_size` and `expand_ratio`.

    Args:
        resolution: Input heights and widths, multiples of 4.
        width: Channels of the stem, of each stage's output and of the last convolution, multiples of 8.
        depth: Numbers of blocks, the same in every stage, or for each stage.
        kernel_size: Kernel sizes of the depthwise convolutions, odd; the same in every stage, or for each stage.
        expand_ratio: Width inside a block as a multiple of the incoming width, rounded to a multiple of 8; the same in
            every stage, or for each stage. A stage whose only ratio is 1 has no expanding convolution.
        per_block: Every block has its own kernel size and expand ratio (OFA) instead of its stage's.
        stem_block: One more block after the stem, with fixed depth, kernel size 3, ratio 1 and no SE (OFA); `width`
            then has an entry for it after that of the stem.
        stride: Stride of the first block of each stage.
        se: Squeeze-and-excitation of a quarter of the channels, in all stages or for each.
        act: Activation, everywhere or for each entry of `width`.
        head: 'plain': the last convolution, with BatchNorm, before pooling; 'efficient': as in MobileNetV3, expansion
            by 6 before and the last convolution, without BatchNorm, after pooling.
        shortcut: 'identity': past blocks that keep width and size; 'projection': past all blocks, where needed through
            2x2 average pooling and a 1x1 convolution (AttentiveNAS).
        kernel: 'crop': smaller kernels are the centre of larger ones; 'transform': after a learned matrix (OFA).

    Raises:
        ValueError: If a field is not as described, or if two choices give the same network.
    """
    if not isinstance(stem_block, bool):
        raise ValueError(f'stem_block={stem_block!r} must be True or False')
    stages = len(width) - 2 - stem_block if isinstance(width, Sequence) else 0
    if stages < 1 or not all(isinstance(values, (list, tuple)) for values in width):
        raise ValueError(
            f'width={width!r} must hold the choices of the stem, of each stage and of the last convolution, such as '
            '[[16, 24], [24, 32], [64]] for one stage')
    values = dict(
        resolution=ordered_values('resolution', resolution, int),
        width=_values_of_each('width', width, len(width), int),
        depth=_values_of_each('depth', depth, stages, int),
        kernel_size=_values_of_each('kernel_size', kernel_size, stages, int),
        expand_ratio=_values_of_each('expand_ratio', expand_ratio, stages, float))
    structure = Structure(
        per_block=_fixed('per_block', per_block, 1, (False, True))[0],
        stem_block=stem_block,
        stride=_fixed('stride', stride, stages, (1, 2)),
        se=_fixed('se', se, stages, (False, True)),
        act=_fixed('act', act, len(width), tuple(_ACTS)),
        head=_fixed('head', head, 1, ('plain', 'efficient'))[0],
        shortcut=_fixed('shortcut', shortcut, 1, ('identity', 'projection'))[0],
        kernel=_fixed('kernel', kernel, 1, ('crop', 'transform'))[0])
    if problem := next(_problems(values, structure), None):
        raise ValueError(problem)
    return SearchSpace('shiftmobilenet', tuple(values.items()), tuple(_choices(values, structure)), structure)


def shiftmobilenet_space_of(
        arch: Arch | Mapping[str, Any],
        structure: Mapping[str, Any],
) -> tuple[SearchSpace, Arch]:
    """The space of the values of an arch that comes without one, and the arch in it.

    Args:
        arch: An `Arch` or its dict.
        structure: What is fixed in its network, as in `Structure.to_dict`.

    Raises:
        ValueError: If arch and structure describe no network.
    """
    fields = arch.to_dict() if isinstance(arch, Arch) else dict(arch) if isinstance(arch, Mapping) else {}
    if sorted(fields) != sorted(_FIELDS):
        raise ValueError(f'arch={arch!r} is not a ShiftMobileNet arch; give a dict of {", ".join(_FIELDS)}')
    if not isinstance(structure, Mapping):
        raise ValueError(f'structure={structure!r} must be a dict such as net.space.structure.to_dict()')
    for name in _FIELDS[1:]:
        if not isinstance(fields[name], (list, tuple)):
            raise ValueError(f'arch field {name}={fields[name]!r} must be a list')

    def per_stage(name: str) -> list[list[Any]]:
        values = list(fields[name])
        if not structure.get('per_block'):
            return [[value] for value in values]
        bounds = itertools.pairwise(itertools.accumulate(fields['depth'], initial=0))
        return [sorted(set(values[start:end])) for start, end in bounds]

    try:
        space = shiftmobilenet_space(
            resolution=[fields['resolution']], width=[[value] for value in fields['width']],
            depth=[[value] for value in fields['depth']], kernel_size=per_stage('kernel_size'),
            expand_ratio=per_stage('expand_ratio'), **structure)
    except TypeError as error:
        raise ValueError(f'arch={arch!r} with structure={structure!r} describes no network: {error}') from None
    return space, space.arch(**fields)


def _values_of_each(name: str, values: Any, count: int, kind: type) -> tuple[tuple[Any, ...], ...]:
    """Values of a field for each of `count` stages, given once or for each."""
    if isinstance(values, Sequence) and not any(isinstance(value, Sequence) for value in values):
        values = [values] * count
    if not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f'{name}={values!r} must have choices for each of {count} stages')
    return tuple(ordered_values(name, value, kind) for value in values)


def _fixed(name: str, value: Any, count: int, allowed: Sequence[Any]) -> tuple[Any, ...]:
    """A fixed value for each of `count` places, given once or for each."""
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    if len(value) != count or any(type(v) is not type(allowed[0]) or v not in allowed for v in value):
        raise ValueError(f'{name}={value!r} must be {count} of {tuple(allowed)}')
    return value


def _problems(values: dict[str, Any], structure: Structure) -> Iterator[str]:
    """Error messages about the values of a space."""
    for name, wanted, fits in (
            ('width', 'a multiple of 8', lambda v: v % 8 == 0), ('kernel_size', 'odd', lambda v: v % 2 == 1)):
        if wrong := [v for options in values[name] for v in options if not fits(v)]:
            yield f'{name}={wrong[0]} must be {wanted}'
    if wrong := [v for v in values['expand_ratio'] if v[0] < 1 or v[0] == 1 < len(v)]:
        yield f'expand_ratio={wrong[0]}: ratios are above 1, or 1 alone (no expanding convolution)'
    if structure.act[0] != structure.act[-1]:
        yield f'act={structure.act}: the stem and the last convolution must have the same activation'
    total = structure.total_stride
    if total > 32:
        yield f'stride={structure.stride}: the total stride is {total}; it may be at most 32'
    if wrong := [r for r in values['resolution'] if r % 4 or r < total]:
        nearest = max(round(wrong[0] / 4) * 4, -(-total // 4) * 4)
        yield (
            f'resolution={wrong[0]} cannot be divided by the strides of this network: give a multiple of 4, and at '
            f'least {total}, such as {nearest}')
    # far above any network in use: a downloaded config may ask for anything
    if values['resolution'][-1] > 4096:
        yield f'resolution={values["resolution"][-1]} may be at most 4096'
    if (blocks := sum(depths[-1] for depths in values['depth'])) > 256:
        yield f'depth={values["depth"]} gives {blocks:,} blocks; there may be at most 256'
    for stage, ratios in enumerate(values['expand_ratio'], 1 + structure.stem_block):
        for channels in {*values['width'][stage - 1], *values['width'][stage]}:
            inner = [_expanded_width(channels, ratio) for ratio in ratios]
            if len(set(inner)) < len(inner):
                yield (
                    f'expand_ratio={ratios} gives the widths {inner} at {channels} channels; they must differ: choose '
                    'ratios further apart')


def _choices(values: dict[str, Any], structure: Structure) -> list[Choice]:
    """The decisions in order: resolution and stem, then stage by stage, then the last convolution."""
    choices = [Choice('resolution', values['resolution'])]
    choices += [Choice('width', values['width'][i], i) for i in range(1 + structure.stem_block)]
    block = 0
    for stage, depths in enumerate(values['depth']):
        entry = 1 + structure.stem_block + stage
        choices.append(Choice('width', values['width'][entry], entry))
        choices.append(Choice('depth', depths, stage))
        gate = len(choices) - 1
        inner = [(name, values[name][stage]) for name in ('kernel_size', 'expand_ratio')]
        if not structure.per_block:
            choices += [Choice(name, options, stage) for name, options in inner]
            continue
        for position in range(depths[-1]):
            choices += [Choice(name, options, block, gate, min_depth=position + 1) for name, options in inner]
            block += 1
    choices.append(Choice('width', values['width'][-1], len(values['width']) - 1))
    return choices


# -- the block table ---------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A row of the block table: a block of the deepest network, what is fixed in it, and its elastic sizes.

    Attributes:
        stage: The block is `net.blocks[stage][position]`.
        expands: Whether it has an expanding convolution.
        projects: Whether its shortcut is projected where width or size change.
        active: 1 if the block exists.
        hidden: Channels of the depthwise convolution.
        se: Channels inside squeeze-and-excitation; 0 without it.
        kernel_size, kernel_area: Of the depthwise convolution.
        equal: 1 if as many channels come in as go out.
        pixels_in, pixels_out: Pixels of its input and output.
    """
    stage: int
    position: int
    stride: int
    act: str
    expands: bool
    projects: bool
    active: Size
    width_in: Size
    hidden: Size
    width_out: Size
    kernel_size: Size
    kernel_area: Size
    se: Size
    equal: Size
    pixels_in: Size
    pixels_out: Size


class BlockTable(NamedTuple):
    """All blocks of the deepest network, and the sizes of its stem and head."""
    blocks: tuple[Block, ...]
    stem: Size  # channels
    stem_pixels: Size
    stage: Size  # channels of the last stage
    stage_pixels: Size
    expanded: Size  # channels of the 'efficient' head before pooling
    last: Size  # channels of the last convolution
    resolution: Size


@lru_cache(maxsize=64)
def block_table(space: SearchSpace) -> BlockTable:
    """The one description of the family's networks: shapes, MACs, parameters, masks and supernets are read off it."""
    structure: Structure = space.structure
    index = {(choice.name, choice.layer): i for i, choice in enumerate(space.choices)}
    widths = [i for i, choice in enumerate(space.choices) if choice.name == 'width']
    size = partial(Size.of, space)

    def pixels(stride: int) -> Size:
        return size(lambda resolution: _side(resolution, stride) ** 2, 0)

    def block(entry: int, position: int, stride: int, before: int, se: bool, depth: int | None = None,
              kernel_size: int | None = None, expand_ratio: int | None = None) -> Block:
        """The block from a map of stride `before` to the `entry`-th width; the last three are indices of choices."""
        width_in, width_out = widths[entry - (position == 0)], widths[entry]
        kernels = () if kernel_size is None else (kernel_size,)
        inner = (width_in,) if expand_ratio is None else (width_in, expand_ratio)
        expands = expand_ratio is not None and space.choices[expand_ratio].values != (1.0,)

        def hidden(width: int, ratio: float = 1.) -> int:
            return _expanded_width(width, ratio) if expands else width

        return Block(
            entry - 1, position, stride, structure.act[entry], expands,
            projects=structure.has_projections and position == 0,
            active=size(lambda: 1) if depth is None else size(lambda depth: int(depth > position), depth),
            width_in=size(int, width_in), hidden=size(hidden, *inner), width_out=size(int, width_out),
            kernel_size=size(lambda size=3: size, *kernels), kernel_area=size(lambda size=3: size ** 2, *kernels),
            se=size(lambda *values: _se_width(hidden(*values)) if se else 0, *inner),
            equal=size(lambda a, b: int(a == b), width_in, width_out),
            pixels_in=pixels(before), pixels_out=pixels(before * stride))

    blocks = [block(1, 0, 1, 2, False)] if structure.stem_block else []
    before, number = 2, 0
    for stage, stride in enumerate(structure.stride):
        depth = index['depth', stage]
        for position in range(space.choices[depth].values[-1]):
            layer = number if structure.per_block else stage
            blocks.append(block(
                1 + structure.stem_block + stage, position, stride if position == 0 else 1, before, structure.se[stage],
                depth, index['kernel_size', layer], index['expand_ratio', layer]))
            before, number = before * blocks[-1].stride, number + 1
    return BlockTable(
        tuple(blocks), stem=size(int, widths[0]), stem_pixels=pixels(2), stage=size(int, widths[-2]),
        stage_pixels=pixels(before), expanded=size(lambda width: HEAD_RATIO * width, widths[-2]),
        last=size(int, widths[-1]), resolution=size(int, 0))


def _side(resolution: int, stride: int) -> int:
    """Height and width of a feature map: every layer of stride 2 rounds up."""
    return -(-resolution // stride)


def _expanded_width(channels: int, ratio: float) -> int:
    """Channels inside an inverted residual block."""
    return make_divisible(round(channels * ratio), 8, 8)


def _se_width(hidden: int) -> int:
    """Channels inside squeeze-and-excitation for a number of channels: at least 8 (AttentiveNAS has 9 instead of 8)."""
    return make_divisible(hidden // 4, 8)


def output_side(space: SearchSpace, resolution: int) -> int:
    """Height and width of the last stage's output for images of a resolution."""
    return _side(resolution, space.structure.total_stride)


# -- shapes of an arch -------------------------------------------------------------------------------------------------


class BlockShape(NamedTuple):
    """One block of the network of an arch."""
    stage: int
    position: int
    stride: int
    act: str
    expands: bool
    width_in: int
    hidden: int
    width_out: int
    kernel_size: int
    se: int  # channels inside SE; 0: none


def block_shapes(space: SearchSpace, arch: Arch) -> list[BlockShape]:
    """The blocks of the network of an arch, first to last."""
    indices = space.encode(arch)
    return [
        BlockShape(
            block.stage, block.position, block.stride, block.act, block.expands, block.width_in.at(indices),
            block.hidden.at(indices), block.width_out.at(indices), block.kernel_size.at(indices), block.se.at(indices))
        for block in block_table(space).blocks if block.active.at(indices)]


def stock_blocks(space: SearchSpace, arch: Arch) -> dict[str, Any]:
    """The network of an arch, projected shortcuts aside, in the terms of timm's `EfficientNet` and `MobileNetV3`.

    Returns:
        JSON-able `blocks` (strings for timm's `decode_arch_def`), `stem_size`, `num_features` and `act`.
    """
    structure, shapes = space.structure, block_shapes(space, arch)
    stages: list[list[str]] = [[] for _ in range(shapes[-1].stage + 1)]
    for shape in shapes:
        ratio = shape.hidden / shape.width_in
        # MobileNetV3 takes the SE ratio of the hidden width, EfficientNet of the incoming one
        se = f'_se{0.25 if structure.has_efficient_head else 0.25 * ratio!r}' if shape.se else ''
        stages[shape.stage].append(
            f'{"ir" if shape.expands else "ds"}_r1_k{shape.kernel_size}_s{shape.stride}_e{ratio!r}_c{shape.width_out}'
            f'{se}_n{_ACTS[shape.act]}')
    act = structure.act[-1]
    if structure.has_efficient_head:
        stages.append([f'cn_r1_k1_s1_c{HEAD_RATIO * arch.width[-2]}_n{_ACTS[act]}'])
    return dict(blocks=stages, stem_size=arch.width[0], num_features=arch.width[-1], act=act)


def _stock(space: SearchSpace, arch: Arch) -> dict[str, Any] | None:
    """Arguments with which plain timm builds a subnet; `None` with projected shortcuts, which timm does not have."""
    return None if space.structure.has_projections else stock_blocks(space, arch)


# -- MACs and parameters -----------------------------------------------------------------------------------------------


def _columns(blocks: Sequence[Block], one_hots: OneHots, *names: str) -> list[torch.Tensor]:
    """Columns of the block table, each [..., blocks]; what is fixed in a block is 0 or 1."""
    return [
        torch.stack([
            entry.value(one_hots) if isinstance(entry, Size) else torch.full_like(one_hots[0][..., 0], float(entry))
            for entry in (getattr(block, name) for block in blocks)], dim=-1)
        for name in names]


def _channels(space: SearchSpace, stage: int) -> Size:
    """Channels of a feature map: after the stem (0), a stage of blocks, or the expansion of an 'efficient' head."""
    table = block_table(space)
    widths = [block.width_out for block in table.blocks if block.stage == stage - 1]
    return table.stem if stage == 0 else widths[-1] if widths else table.expanded


def _kept(table: BlockTable, geometry: Mapping[str, Any]) -> tuple[Block, ...]:
    """The blocks of a network; a backbone ends with its last feature map."""
    last = geometry.get('features', (math.inf,))[-1]
    return tuple(block for block in table.blocks if block.stage < last)


def _expands(table: BlockTable, geometry: Mapping[str, Any]) -> bool:
    """Whether the last feature map of a backbone is the expansion of an 'efficient' head."""
    return geometry['features'][-1] > table.blocks[-1].stage + 1


def _macs(space: SearchSpace, one_hots: OneHots, convention: str) -> torch.Tensor:
    geometry, table = space.geometry, block_table(space)
    active, expands, projects, equal, width_in, hidden, width_out, area, se, pixels_in, pixels_out = _columns(
        _kept(table, geometry), one_hots, 'active', 'expands', 'projects', 'equal', 'width_in', 'hidden', 'width_out',
        'kernel_area', 'se', 'pixels_in', 'pixels_out')
    expand = expands * width_in * hidden * pixels_in
    inner = hidden * ((area + width_out) * pixels_out + 2 * se)
    project = projects * (1 - equal) * width_in * width_out * pixels_out
    blocks = (active * (expand + inner + project)).sum(-1)
    stem, stem_pixels, stage, stage_pixels, expanded, last = (size.value(one_hots) for size in table[1:7])
    pooled = 1 if geometry['global_pool'] else stage_pixels  # without pooling the head runs on every pixel
    head = geometry['num_classes'] * last * pooled
    if 'features' in geometry:
        head = _expands(table, geometry) * expanded * stage * stage_pixels
    elif space.structure.has_efficient_head:
        head = head + expanded * (stage * stage_pixels + last * pooled)
    else:
        head = head + stage * last * stage_pixels
    return 9 * geometry['in_chans'] * stem * stem_pixels + blocks + head


def _params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    geometry, table = space.geometry, block_table(space)
    active, expands, projects, equal, width_in, hidden, width_out, area, se = _columns(
        _kept(table, geometry), one_hots, 'active', 'expands', 'projects', 'equal', 'width_in', 'hidden', 'width_out',
        'kernel_area', 'se')
    expand = expands * (width_in + 2) * hidden  # with two parameters of BatchNorm per channel
    inner = hidden * (area + 2) + (hidden + 2) * width_out
    excite = 2 * hidden * se + se + hidden * (se > 0).double()
    project = projects * (1 - equal) * width_in * width_out
    blocks = (active * (expand + inner + excite + project)).sum(-1)
    stem, _, stage, _, expanded, last = (size.value(one_hots) for size in table[1:7])
    head = geometry['num_classes'] * (last + 1)
    if 'features' in geometry:
        head = _expands(table, geometry) * expanded * (stage + 2)
    elif space.structure.has_efficient_head:
        head = head + expanded * (stage + 2 + last)
    else:
        head = head + (stage + 2) * last
    return (9 * geometry['in_chans'] + 2) * stem + blocks + head


# -- operators ---------------------------------------------------------------------------------------------------------


def _operators(space: SearchSpace, one_hots: OneHots) -> OperatorTable:
    g, block_rows, table = space.geometry, block_table(space), OperatorTable(one_hots)
    stem, stem_pixels, stage, stage_pixels, expanded, last = (size.value(one_hots) for size in block_rows[1:7])
    image = g['in_chans'] * block_rows.resolution.value(one_hots) ** 2
    table.add('stem', macs=9 * g['in_chans'] * stem * stem_pixels, writes=stem * stem_pixels,
              matrix=9 * g['in_chans'] * stem, rows=stem)
    table.add('norm', writes=stem * stem_pixels, vectors=2 * stem, statistics=stem,
              live=image + 2 * stem * stem_pixels)
    _add_blocks(table, space, one_hots, image + stem * stem_pixels)
    if 'features' in g and not _expands(block_rows, g):
        return table
    efficient, pooled = space.structure.has_efficient_head, 1 if g['global_pool'] else stage_pixels
    before = expanded if efficient else last  # channels of the last convolution at the size of the last stage
    held = image + (stem * stem_pixels if efficient else 0)
    table.add('pointwise', macs=stage * before * stage_pixels, writes=before * stage_pixels, matrix=stage * before,
              rows=before, live=held + (stage + before) * stage_pixels)
    table.add('norm', writes=before * stage_pixels, vectors=2 * before, statistics=before,
              live=held + (stage * efficient + 2 * before) * stage_pixels)
    if 'features' in g:
        return table
    if efficient:
        table.add('head', macs=expanded * last * pooled, writes=last * pooled, matrix=expanded * last, rows=last)
    classes = g['num_classes']
    table.add('head', macs=classes * last * pooled, writes=classes * pooled, matrix=classes * last, rows=classes,
              vectors=classes)
    return table


def _add_blocks(table: OperatorTable, space: SearchSpace, one_hots: OneHots, held: torch.Tensor) -> None:
    """Add the operators of all blocks.

    Args:
        table: The table.
        space: The space.
        one_hots: Of the archs.
        held: Values that exist throughout: the image, and the output of the stem.
    """
    rows = _kept(block_table(space), space.geometry)
    active, expands, projects, equal, width_in, hidden, width_out, area, se, pixels_in, pixels_out = _columns(
        rows, one_hots, 'active', 'expands', 'projects', 'equal', 'width_in', 'hidden', 'width_out', 'kernel_area',
        'se', 'pixels_in', 'pixels_out')

    def fixed(values: Iterable[bool]) -> torch.Tensor:
        return torch.tensor([float(value) for value in values], dtype=torch.float64).to(active)

    # Each loop over stages and blocks holds its input: the output of the stem, which `held` has already, the input of
    # the stage, and that of the block.
    reads = width_in * pixels_in
    stages = [row.stage for row in rows]
    stage_input = reads[..., [stages.index(stage) for stage in stages]] * fixed(stage > 0 for stage in stages)
    held = held[..., None] + stage_input + reads * fixed(row.position > 0 for row in rows)
    strides = fixed(row.stride > 1 for row in rows)
    projected = projects * (1 - (1 - strides) * equal)  # a projected block keeps more tensors alive
    before, after, out = expands * hidden * pixels_in, hidden * pixels_out, width_out * pixels_out
    table.add('pointwise', active * expands, macs=width_in * before, writes=before, matrix=width_in * hidden,
              rows=hidden)
    table.add('norm', active * expands, writes=before, vectors=2 * hidden, statistics=hidden, live=held + 2 * before)
    table.add('depthwise', active, macs=area * after, writes=after, matrix=area * hidden, rows=hidden,
              live=held + before + after)
    table.add('norm', active, writes=after, vectors=2 * hidden, statistics=hidden,
              live=held + projected * before + 2 * after)
    table.add('se', active * (se > 0), macs=2 * hidden * se, writes=after, matrix=2 * hidden * se, rows=hidden + se,
              vectors=hidden + se, live=held + projected * before + 2 * after + 2 * hidden)
    table.add('pointwise', active, macs=hidden * out, writes=out, matrix=hidden * width_out, rows=width_out,
              live=held + after + out)
    table.add('norm', active, writes=out, vectors=2 * width_out, statistics=width_out,
              live=held + projected * after + 2 * out)
    table.add('shortcut', active * projects * (1 - equal), macs=width_in * out, writes=out,
              matrix=width_in * width_out, rows=width_out)
    table.add('add', active * projected, writes=out, live=held + after + 3 * out)


def _geometry(net: Any) -> dict[str, Any]:
    """Properties that MACs and parameters of a MobileNet, elastic or static, depend on."""
    return dict(in_chans=net.in_chans, num_classes=net.num_classes, global_pool=net.global_pool.pool_type)


# -- masks -------------------------------------------------------------------------------------------------------------


class BlockMasks(NamedTuple):
    """One block of a MobileNet; masks of full width.

    Attributes:
        width_in: [largest incoming width].
        hidden: [largest width inside].
        kernel_size: [number of sizes], 1 for the chosen size and all smaller ones.
        se: [largest width inside squeeze-and-excitation].
        equal: 0-d, 1 if as many channels come in as go out.
        active: 0-d, 1 if the block exists.
    """
    width_in: torch.Tensor
    hidden: torch.Tensor
    kernel_size: torch.Tensor
    se: torch.Tensor
    equal: torch.Tensor
    active: torch.Tensor


class ShiftMobileNetMasks(NamedTuple):
    """An arch as masks of full width: a supernet takes it in place of an `Arch`.

    The resolution is a number, not a mask: the task loss has no gradient with respect to it. A generator learns it from
    the resource term, and through the decisions that follow it.

    Attributes:
        resolution: Input height and width.
        blocks: Masks of every block of the deepest network.
        stage: [largest width of the last stage].
        expanded: [6 times that], of the 'efficient' head.
        last: [largest width of the last convolution].
    """
    resolution: int
    blocks: tuple[BlockMasks, ...]
    stage: torch.Tensor
    expanded: torch.Tensor
    last: torch.Tensor

    def to(self, like: torch.Tensor) -> ShiftMobileNetMasks:
        """The same masks with the dtype and device of a tensor."""
        blocks = tuple(BlockMasks(*(mask.to(like) for mask in block)) for block in self.blocks)
        return ShiftMobileNetMasks(
            self.resolution, blocks, self.stage.to(like), self.expanded.to(like), self.last.to(like))


def _masks(space: SearchSpace, one_hots: OneHots) -> ShiftMobileNetMasks:
    table = block_table(space)
    return ShiftMobileNetMasks(
        resolution=space.choices[0].values[int(one_hots[0].argmax())],
        blocks=tuple(_block_masks(block, one_hots) for block in table.blocks),
        stage=table.stage.mask(one_hots), expanded=table.expanded.mask(one_hots), last=table.last.mask(one_hots))


def _block_masks(block: Block, one_hots: OneHots) -> BlockMasks:
    inner = block.hidden.joint(one_hots)  # what `hidden` and `se` both depend on
    return BlockMasks(
        width_in=block.width_in.mask(one_hots),
        hidden=inner @ nested(block.hidden.values, inner),
        kernel_size=block.kernel_size.rank_mask(one_hots),
        se=inner @ nested(block.se.values, inner),
        equal=block.equal.value(one_hots),
        active=block.active.value(one_hots))


register_family(Family(
    name='shiftmobilenet', space=shiftmobilenet_space, macs=_macs, params=_params, masks=_masks, geometry=_geometry,
    operators=_operators, supernet='shiftmobilenet_supernet', subnet='shiftmobilenet_subnet', stock=_stock,
    resolution=lambda arch: arch.resolution,
    bn_recipe=lambda space: 'ofa' if space.structure.kernel == 'transform' else 'attentivenas', channels=_channels))
