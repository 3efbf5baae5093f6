"""The family of elastic pretrained CNNs: its search space, the table of its weights, and what follows from the table.

The networks are timm's `EfficientNet` and `MobileNetV3` made of inverted residuals, depthwise separable convolutions,
edge residuals, plain convolutions, and the universal inverted residuals of MobileNetV4.

Channels that a shortcut adds up have one width: they form a *group*. A space has a width for each group, among them the
stem and the last convolution. Every size depends on one choice, and MACs, parameters, masks, slices and permutations
are all read off one table: which sizes the dimensions of each weight have.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from .core import Arch, Choice, OneHots, SearchSpace, ordered_values
from .families import Family, register_family
from .matrix_mapping import Size
from .operators import OperatorTable

__all__ = [
    'CnnBlock', 'CnnMasks', 'CnnStructure', 'CnnTable', 'Weight', 'cnn_table', 'elastic_cnn_space',
    'elastic_cnn_space_of', 'kept_blocks', 'kept_structure', 'output_side', 'se_width',
]

HEADS = ('plain', 'efficient', 'efficient_norm', 'none')
KINDS = ('ir', 'ds', 'er', 'cn', 'uir')  # as in timm's block strings
POOLS = ('', 'avg', 'blur')
_FIELDS = ('resolution', 'width', 'depth', 'kernel_size', 'mid_width')


# -- the search space --------------------------------------------------------------------------------------------------


class CnnBlock(NamedTuple):
    """Fixed properties of a block of the base, `net.blocks[stage][position]`.

    Attributes:
        stage: Number of its stage.
        kind: 'ir': inverted residual; 'ds': depthwise separable; 'er': edge residual; 'cn': convolution; 'uir':
            universal inverted residual.
        stride: 1 or 2.
        width: The group of channels that its output belongs to.
        se: Channels inside squeeze-and-excitation of the base; 0 without it.
        inner: Channels that squeeze-and-excitation of the base scales.
        pool: '', or the pooling that reduces the size in place of the convolution: 'avg' or 'blur'.
        groups: Groups of the spatial convolution of an edge residual. Above 1, its channels are not elastic.
        start, end: Kernel sizes of the depthwise convolutions before and after an 'uir'; 0 without them.
        middle: Whether an 'uir' has a depthwise convolution inside.
        scale: Whether its output is scaled (LayerScale).
    """
    stage: int
    kind: str
    stride: int
    width: int
    se: int = 0
    inner: int = 0
    pool: str = ''
    groups: int = 1
    start: int = 0
    end: int = 0
    middle: bool = True
    scale: bool = False

    @property
    def has_kernel(self) -> bool:
        """Whether it has a spatial convolution."""
        return self.kind != 'uir' or self.middle or self.start > 0

    @property
    def expands(self) -> bool:
        return self.kind in ('ir', 'er', 'uir')


@dataclass(frozen=True)
class CnnStructure:
    """Fixed properties of the networks of a space; it iterates over its `(name, value)` pairs.

    Attributes:
        blocks: All blocks of the base.
        stem_kernel: Kernel size of the stem.
        head: 'plain': the last convolution before pooling, with BatchNorm; 'efficient': after pooling, without;
            'efficient_norm': after pooling, with; 'none': no last convolution.
        head_bias: Whether the last convolution has a bias.
        layer_order: For each stage its positions, the most important one first.
    """
    blocks: tuple[CnnBlock, ...]
    stem_kernel: int
    head: str
    head_bias: bool
    layer_order: tuple[tuple[int, ...], ...]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))

    @property
    def has_head(self) -> bool:
        return self.head != 'none'

    @cached_property
    def stages(self) -> list[list[CnnBlock]]:
        return [list(blocks) for _, blocks in itertools.groupby(self.blocks, key=lambda block: block.stage)]

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Stage and position of every block."""
        return [(stage, position) for stage, blocks in enumerate(self.stages) for position in range(len(blocks))]

    @cached_property
    def inputs(self) -> list[int]:
        """The group of channels that every block reads."""
        return [0, *(block.width for block in self.blocks[:-1])]

    @cached_property
    def fixed(self) -> list[list[int]]:
        """For each stage the positions that are in every arch: the first, and where width or size change."""
        inputs, fixed = iter(self.inputs), []
        for blocks in self.stages:
            changes = [block.width != width or block.stride > 1 for block, width in zip(blocks, inputs, strict=False)]
            fixed.append([position for position, change in enumerate(changes) if change or position == 0])
        return fixed


def elastic_cnn_space(
        resolution: Sequence[int],
        width: Sequence[Sequence[int]],
        depth: Sequence[Sequence[int]],
        kernel_size: Sequence[Sequence[int]],
        mid_width: Sequence[Sequence[int]],
        *,
        blocks: Sequence[Sequence[Any]],
        stem_kernel: int = 3,
        head: str = 'plain',
        head_bias: bool = False,
        layer_order: Sequence[Sequence[int]] | None = None,
) -> SearchSpace:
    """The space of an elastic pretrained CNN.

    Args:
        resolution: Input heights and widths.
        width: Channels of each group: stem, stages, last convolution.
        depth: Numbers of blocks of each stage.
        kernel_size: Kernel sizes of each block, odd: of its depthwise convolution, or of its only spatial one.
        mid_width: Channels inside each block that expands, first to last.
        blocks, stem_kernel, head, head_bias: What is fixed in the base; see `CnnStructure`.
        layer_order: For each stage its positions, the most important one first; default is their order in the network.
            An arch of depth d has the first d of them, in their order in the network.

    Raises:
        ValueError: If a field is not as described.
    """
    structure = _structure(blocks, stem_kernel, head, head_bias, layer_order)
    counts = dict(
        width=max(block.width for block in structure.blocks) + 1 + structure.has_head, depth=len(structure.stages),
        kernel_size=len(structure.blocks), mid_width=sum(block.expands for block in structure.blocks))
    values: dict[str, tuple[Any, ...]] = dict(resolution=ordered_values('resolution', resolution, int))
    if values['resolution'][-1] > 4096:
        raise ValueError(f'resolution={values["resolution"][-1]} may be at most 4096')
    given = dict(width=width, depth=depth, kernel_size=kernel_size, mid_width=mid_width)
    for name, count in counts.items():
        options = given[name]
        if not isinstance(options, Sequence) or len(options) != count:
            raise ValueError(f'{name}={options!r} must have choices for each of {count}; copy net.space.to_dict()')
        values[name] = tuple(ordered_values(name, each, int) for each in options)
    if wrong := [size for sizes in values['kernel_size'] for size in sizes if size % 2 == 0]:
        raise ValueError(f'kernel_size={wrong[0]} must be odd')
    if not side_before(structure, values['resolution'][0], len(structure.blocks)):
        raise ValueError(f'resolution={values["resolution"][0]} is too small for the strides of this network')
    mids = iter(values['mid_width'])
    for block, incoming in zip(structure.blocks, structure.inputs, strict=True):
        inner = next(mids) if block.expands else ()
        if block.groups > 1 and len(inner) + len(values['width'][incoming]) > 2:
            raise ValueError(
                f'mid_width={inner} and width={values["width"][incoming]} of a block with {block.groups} groups of '
                'channels may have one value each')
    for stage, (depths, fixed) in enumerate(zip(values['depth'], structure.fixed, strict=True)):
        layers = len(structure.stages[stage])
        if depths[0] < len(fixed) or depths[-1] != layers:
            raise ValueError(f'depth={depths} of stage {stage} must lie in {len(fixed)} to {layers}, and end with this')
    return SearchSpace('elastic_cnn', tuple(values.items()), tuple(_choices(values, structure)), structure)


def _structure(blocks: Any, stem_kernel: int, head: str, head_bias: bool, layer_order: Any) -> CnnStructure:
    try:
        rows = tuple(CnnBlock(*row) for row in blocks)
        numbers = all(type(value) is int and value >= 0 for row in rows for value in (
            row.stage, row.stride, row.width, row.se, row.inner, row.groups - 1, row.start, row.end))
        steps = [b.stage - a.stage for a, b in itertools.pairwise(rows)]
        if not (0 < len(rows) <= 256 and numbers and rows[0].stage == 0 and {*steps} <= {0, 1}):
            raise ValueError
        if any(row.kind not in KINDS or row.stride not in (1, 2) or row.width > len(rows) or row.pool not in POOLS
               for row in rows):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'blocks={blocks!r} does not describe the blocks of a CNN; copy net.space.to_dict()') from None
    if type(stem_kernel) is not int or head not in HEADS or type(head_bias) is not bool:
        raise ValueError(
            f'stem_kernel={stem_kernel!r}, head={head!r}, head_bias={head_bias!r} must be an int, one of '
            f'{HEADS}, and True or False')
    structure = CnnStructure(rows, stem_kernel, head, head_bias, ())
    if layer_order is None:
        order = tuple(
            (*fixed, *(position for position in range(len(stage)) if position not in fixed))
            for stage, fixed in zip(structure.stages, structure.fixed, strict=True))
    else:
        order = tuple(map(tuple, layer_order))
    for number, (stage, fixed) in enumerate(zip(structure.stages, structure.fixed, strict=True)):
        positions = order[number] if number < len(order) else ()
        if sorted(positions) != list(range(len(stage))) or sorted(positions[:len(fixed)]) != fixed:
            raise ValueError(
                f'layer_order={positions} of stage {number} must hold each of 0 to {len(stage) - 1} once, and begin '
                f'with {fixed}, which every arch has')
    return dataclasses.replace(structure, layer_order=order)


def _choices(values: Mapping[str, Any], structure: CnnStructure) -> list[Choice]:
    """The decisions in order: resolution and stem, then stage by stage, then the last convolution."""
    choices = [Choice('resolution', values['resolution']), Choice('width', values['width'][0], 0)]
    group = block = mid = 0
    for stage, rows in enumerate(structure.stages):
        for entry in range(group + 1, max(group, *(row.width for row in rows)) + 1):
            choices.append(Choice('width', values['width'][entry], entry))
            group = entry
        gate = len(choices)
        choices.append(Choice('depth', values['depth'][stage], stage))
        for position, row in enumerate(rows):
            needed = structure.layer_order[stage].index(position) + 1  # the least depth that keeps this block
            choices.append(Choice('kernel_size', values['kernel_size'][block], block, gate, needed))
            block += 1
            if row.expands:
                choices.append(Choice('mid_width', values['mid_width'][mid], mid, gate, needed))
                mid += 1
    if structure.has_head:
        choices.append(Choice('width', values['width'][-1], len(values['width']) - 1))
    return choices


def kept_blocks(space: SearchSpace, arch: Arch) -> list[int]:
    """Numbers of the blocks of an arch, in their order in the network."""
    order = space.structure.layer_order
    return [
        number for number, (stage, position) in enumerate(space.structure.places)
        if order[stage].index(position) < arch.depth[stage]]


def kept_structure(structure: CnnStructure, depth: Sequence[int]) -> CnnStructure:
    """The structure of a network that has only the first `depth` blocks of every stage's order."""
    kept = [
        block for block, (stage, position) in zip(structure.blocks, structure.places, strict=True)
        if structure.layer_order[stage].index(position) < depth[stage]]
    return _structure(kept, structure.stem_kernel, structure.head, structure.head_bias, None)


def elastic_cnn_space_of(arch: Arch | Mapping[str, Any], structure: CnnStructure) -> tuple[SearchSpace, Arch]:
    """The space of the values of an arch that comes without one, and the arch in it.

    Args:
        arch: An `Arch` or its dict.
        structure: That of the base, in which `layer_order` decides which blocks the arch has.

    Raises:
        ValueError: If the arch describes no network.
    """
    given = arch.to_dict() if isinstance(arch, Arch) else dict(arch) if isinstance(arch, Mapping) else {}
    fields = dict(mid_width=[]) | given  # a network without expanding blocks does not have this field
    if sorted(fields) != sorted(_FIELDS) or not all(isinstance(fields[name], (list, tuple)) for name in _FIELDS[1:]):
        raise ValueError(f'arch={arch!r} is not an arch of an elastic CNN; give a dict of {", ".join(_FIELDS)}')
    stages = [len(stage) for stage in structure.stages]
    if len(fields['depth']) != len(stages) or not all(
            type(depth) is int and 0 < depth <= most for depth, most in zip(fields['depth'], stages, strict=True)):
        raise ValueError(f'depth={fields["depth"]!r} of the arch must hold whole numbers of at most {stages}')
    values: dict[str, Any] = {name: [[value] for value in fields[name]] for name in _FIELDS[1:]}
    kept = dict(kept_structure(structure, fields['depth']))
    space = elastic_cnn_space([fields['resolution']], **values, **kept)
    return space, space.arch(**given)


def se_width(block: CnnBlock, inner: int) -> int:
    """Channels inside squeeze-and-excitation of `inner` channels: the same share of them as in the base."""
    return max(round(block.se * inner / block.inner), 1) if block.se else 0


def output_side(space: SearchSpace, resolution: int) -> int:
    """Height and width of the last block's output for images of a resolution."""
    return side_before(space.structure, resolution, len(space.structure.blocks))


def side_before(structure: CnnStructure, resolution: int, block: int) -> int:
    """Height and width of the input of a block: layers of stride 2 round up, average pooling rounds down."""
    side = -(-resolution // 2)
    for row in structure.blocks[:block]:
        side = side // row.stride if row.pool == 'avg' else -(-side // row.stride)
    return side


# -- the table of weights ----------------------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A convolution, BatchNorm or linear layer: the sizes of its weight, by their labels; see `CnnTable`.

    Attributes:
        name: Its name in the base.
        rows, columns: Of its weight: outputs and inputs; norms and depthwise convolutions have no columns.
        kernel: Label of its kernel size, or `None` for a fixed one.
        area: Label of the square of the kernel size.
        pixels: Label of how often it is applied to an image.
        block: Number of its block, or `None` for stem and head.
        vectors: How many further parameters it has for every row: its bias, or weight and bias of a norm.
        matrix: Whether it has a matrix or kernels, and not only these vectors.
        trained: Whether these are parameters.
        kind: Kind of its operator.
        live: Tensors that exist when it has run, each by the labels of its channels and pixels, beside those that exist
            throughout the block.
    """
    name: str
    rows: str
    columns: str | None = None
    kernel: str | None = None
    area: str = 'one'
    pixels: str = 'one'
    block: int | None = None
    vectors: int = 0
    matrix: bool = True
    trained: bool = True
    kind: str = 'pointwise'
    live: tuple[tuple[str, str], ...] = ()


class CnnTable(NamedTuple):
    """All sizes and weights of the deepest network.

    Attributes:
        sizes: By label. 'width.G' of group G; 'mid.B', 'se.B', 'kernel.B', 'area.B', 'active.B' of block B; 'pixels.B'
            of its input. 'in_chans', 'num_classes', 'one' and 'unpooled' are the geometry's.
        weights: In the order of the network.
        inner: Label of the channels inside each block; `None` for a plain convolution.
        frozen: Labels of channels that must keep their order: those of convolutions with several groups.
        padded: Pixels, by label, of the copy that a convolution of stride 2 with 'same' padding takes of its input.
    """
    sizes: dict[str, Size]
    weights: tuple[Weight, ...]
    inner: tuple[str | None, ...]
    frozen: frozenset[str]
    padded: dict[str, Size]

    def at(self, space: SearchSpace, arch: Arch) -> dict[str, int]:
        """All sizes of an arch by label; those of blocks that it does not have are meaningless."""
        indices = space.encode(arch)
        return {label: size.at(indices) for label, size in self.sizes.items()}


@lru_cache(maxsize=64)
def cnn_table(space: SearchSpace) -> CnnTable:
    """The one description of the family's networks; it does not depend on the geometry."""
    structure: CnnStructure = space.structure
    index = {(choice.name, choice.layer): i for i, choice in enumerate(space.choices)}
    groups = len(space.values('width'))
    sizes = {f'width.{group}': Size.of(space, int, index['width', group]) for group in range(groups)}

    def pixels(block: int) -> str:
        """The pixels of the input of a block."""
        sizes[f'pixels.{block}'] = Size.of(space, lambda resolution: side_before(structure, resolution, block) ** 2, 0)
        return f'pixels.{block}'

    def constant(label: str, value: int) -> str:
        sizes[label] = Size.of(space, lambda resolution: value, 0)
        return label

    def padding(block: int, *kernel: int) -> Size:
        """Pixels of the padded input of a block, or of the stem, -1."""
        def area(resolution: int, size: int = structure.stem_kernel) -> int:
            side = resolution if block < 0 else side_before(structure, resolution, block)
            missing = max((-(-side // 2) - 1) * 2 + size - side, 0)
            return (side + missing) ** 2 if missing else 0

        return Size.of(space, area, 0, *kernel)

    mids = itertools.count()
    padded = {'padded.stem': padding(-1)}
    stem = ('width.0', pixels(0))
    weights = [
        Weight('conv_stem', 'width.0', 'in_chans', area=constant('stem', structure.stem_kernel ** 2), pixels=stem[1],
               kind='stem', live=(stem, ('in_chans', 'padded.stem'))),
        Weight('bn1', 'width.0', pixels=stem[1], vectors=2, matrix=False, kind='norm_act', live=(stem, stem))]
    inner: list[str | None] = []
    frozen: set[str] = set()
    for number, (block, (stage, position)) in enumerate(zip(structure.blocks, structure.places, strict=True)):
        rank = structure.layer_order[stage].index(position)
        sizes[f'active.{number}'] = Size.of(space, lambda depth, rank=rank: int(depth > rank), index['depth', stage])
        kernel = index['kernel_size', number]
        sizes[f'kernel.{number}'] = Size.of(space, int, kernel)
        sizes[f'area.{number}'] = Size.of(space, lambda size: size ** 2, kernel)
        incoming = structure.inputs[number]
        choice = index['mid_width', next(mids)] if block.expands else index['width', incoming]
        label = f'mid.{number}' if block.expands else f'width.{incoming}'
        inner.append(None if block.kind == 'cn' else label)
        sizes[label] = Size.of(space, int, choice)
        if block.se:
            sizes[f'se.{number}'] = Size.of(space, lambda channels, block=block: se_width(block, channels), choice)
        columns = f'width.{incoming}'
        if block.groups > 1:
            sizes[f'grouped.{number}'] = Size.of(
                space, lambda width, block=block: width // block.groups, index['width', incoming])
            columns = f'grouped.{number}'
            frozen |= {f'width.{incoming}', label}
        if block.stride > 1 and not block.pool:
            padded[f'padded.{number}'] = padding(number, kernel)
        if block.pool == 'blur':
            sizes[f'blurred.{number}'] = Size.of(
                space, lambda resolution, number=number: (side_before(structure, resolution, number) + 2) ** 2, 0)
        fixed = {name: constant(f'{name}.{number}', value ** 2) for name, value in (
            ('start', block.start), ('end', block.end), ('filter', 3 * (block.pool == 'blur'))) if value}
        weights += _block_weights(
            block, number, f'blocks.{stage}.{position}', f'width.{incoming}', columns, label, fixed,
            pixels(number), pixels(number + 1))
    plain, end = structure.head == 'plain', pixels(len(structure.blocks))
    out, last = (f'width.{groups - 2}', end), (f'width.{groups - 1}', end)
    if structure.has_head:
        weights.append(Weight(
            'conv_head', f'width.{groups - 1}', f'width.{groups - 2}', pixels=end if plain else 'unpooled',
            vectors=int(structure.head_bias), kind='pointwise' if plain else 'head',
            live=(out, last) if plain else ()))
    if structure.head in ('plain', 'efficient_norm'):
        weights.append(Weight(
            'bn2' if plain else 'norm_head', f'width.{groups - 1}', pixels=end if plain else 'unpooled', vectors=2,
            matrix=False, kind='norm_act', live=(last, last) if plain else ()))
    weights.append(Weight(
        'classifier', 'num_classes', f'width.{groups - 1}', vectors=1, kind='head'))
    return CnnTable(sizes, tuple(weights), tuple(inner), frozenset(frozen), padded)


Tensor2d = tuple[str, str]  # labels of the channels and the pixels of a tensor
Live = tuple[Tensor2d, ...]


def _block_weights(
        block: CnnBlock, number: int, prefix: str, incoming: str, columns: str, inner: str, fixed: Mapping[str, str],
        before: str, after: str,
) -> list[Weight]:
    """The weights of one block.

    Args:
        block: Its row.
        number: Its number.
        prefix: Its name.
        incoming, columns, inner: Labels of its incoming channels, as stored and as multiplied, and of its inner ones.
        fixed: Labels of fixed areas of kernels.
        before, after: Labels of the pixels of input and output.
    """
    out = f'width.{block.width}'
    spatial_pixels = before if block.pool else after  # of the output of the convolution of elastic kernel size
    stream, wide, narrow = (incoming, before), (inner, spatial_pixels), (inner, after)  # tensors
    rows: list[tuple[str, str, str | None, dict[str, Any]]] = []

    def add(name: str, a: str, b: str | None = None, **more: Any) -> None:
        rows.append((name, a, b, more))

    def spatial(name: str, a: str, b: str | None = None, *, reads: Tensor2d = stream, held: Live = ()) -> None:
        """The convolution of elastic kernel size; `reads` is its input, which is `held` or that of the block."""
        padded = ((reads[0], f'padded.{number}'),) if block.stride > 1 and not block.pool else ()
        add(name, a, b, kernel=f'kernel.{number}', area=f'area.{number}', pixels=spatial_pixels,
            kind='depthwise' if b is None else 'conv', live=(*held, *padded, (a, spatial_pixels)))

    def norm(name: str, output: Tensor2d, act: bool = True, held: Live = ()) -> None:
        add(name, output[0], pixels=output[1], vectors=2, matrix=False, kind='norm_act' if act else 'norm',
            live=(*held, output, output))

    def pool(name: str, held: Live = ()) -> None:
        if block.pool == 'blur':
            add(name, inner, area=fixed['filter'], pixels=after, trained=False, kind='depthwise',
                live=(*held, wide, (inner, f'blurred.{number}'), narrow))

    def excite() -> None:
        if block.se:
            factors = (inner, 'one')
            add('se.conv_reduce', f'se.{number}', inner, vectors=1, kind='se')
            add('se.conv_expand', inner, f'se.{number}', vectors=1, kind='se', live=(narrow, narrow, factors, factors))

    def project(name: str, *, norms: str, nested: bool = False) -> None:
        """The convolution to the stream, and its norm; if `nested`, its input exists until the norm has run."""
        add(name, out, inner, pixels=after, live=(narrow, (out, after)))
        norm(norms, (out, after), act=False, held=(narrow,) if nested else ())

    if block.kind == 'ir':
        add('conv_pw', inner, incoming, pixels=before, live=((inner, before),))
        norm('bn1', (inner, before))
        spatial('conv_dw', inner, reads=(inner, before), held=((inner, before),))
        norm('bn2', wide)
        pool('aa')
        excite()
        project('conv_pwl', norms='bn3')
    elif block.kind == 'ds':
        spatial('conv_dw', inner)
        norm('bn1', wide)
        excite()
        project('conv_pw', norms='bn2')
    elif block.kind == 'er':
        spatial('conv_exp', inner, columns)
        norm('bn1', wide)
        pool('aa')
        excite()
        project('conv_pwl', norms='bn2')
    elif block.kind == 'cn':
        spatial('conv', out, incoming)
        norm('bn1', (out, spatial_pixels))
    else:
        started = (incoming, before if block.middle else after)
        expanded = (inner, started[1])
        held = (started,) if block.start else ()
        if block.start and block.middle:
            add('dw_start.conv', incoming, area=fixed['start'], pixels=before, kind='depthwise', live=(started,))
        elif block.start:
            spatial('dw_start.conv', incoming)
        if block.start:
            norm('dw_start.bn', started, act=False)
        add('pw_exp.conv', inner, incoming, pixels=expanded[1], live=(*held, expanded))
        norm('pw_exp.bn', expanded, held=held)
        if block.middle:
            spatial('dw_mid.conv', inner, reads=expanded, held=(expanded,))
            norm('dw_mid.bn', wide, held=(expanded,))
            pool('dw_mid.aa', held=(expanded,))
        excite()
        project('pw_proj.conv', norms='pw_proj.bn', nested=True)
        end = (out, after)
        if block.end:
            add('dw_end.conv', out, area=fixed['end'], pixels=after, kind='depthwise', live=(end, end))
            norm('dw_end.bn', end, act=False, held=(end,))
        if block.scale:
            add('layer_scale', out, pixels=after, vectors=1, matrix=False, kind='norm', live=(end, end))
    return [Weight(f'{prefix}.{name}', a, b, block=number, **more) for name, a, b, more in rows]


# -- MACs and parameters -----------------------------------------------------------------------------------------------


FIXED = ('one', 'unpooled', 'in_chans', 'num_classes')  # labels of sizes that the geometry decides


@lru_cache(maxsize=64)
def _columns(space: SearchSpace) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """All sizes as a linear map of the concatenated one-hots, and the positions of each weight's sizes among them."""
    table, one_choice = cnn_table(space), list(itertools.accumulate(
        (len(choice.values) for choice in space.choices), initial=0))
    position = {label: i for i, label in enumerate((*table.sizes, *FIXED))}
    with torch.inference_mode(False):
        matrix = torch.zeros(one_choice[-1], len(table.sizes), dtype=torch.float64, device='cpu')
        for label, size in table.sizes.items():
            start = one_choice[size.choices[0]]
            matrix[start:start + len(size.values), position[label]] = torch.tensor(size.values, dtype=torch.float64)
    columns = {
        'active': ['one' if weight.block is None else f'active.{weight.block}' for weight in table.weights],
        'rows': [weight.rows for weight in table.weights], 'area': [weight.area for weight in table.weights],
        'columns': [weight.columns or 'one' for weight in table.weights],
        'pixels': [weight.pixels for weight in table.weights]}
    return matrix, {name: [position[label] for label in labels] for name, labels in columns.items()}


def _channels(space: SearchSpace, stage: int) -> Size:
    """Channels of a feature map: after the stem (0), or a stage of blocks."""
    group = space.structure.stages[stage - 1][-1].width if stage else 0
    return cnn_table(space).sizes[f'width.{group}']


def _kept_weights(space: SearchSpace) -> list[int]:
    """Numbers of the weights of a network in the table; a backbone ends with its last feature map."""
    weights, structure = cnn_table(space.unbind()).weights, space.structure
    if 'features' not in space.geometry:
        return list(range(len(weights)))
    last, stem = space.geometry['features'][-1], ('conv_stem', 'bn1')
    return [
        i for i, weight in enumerate(weights)
        if weight.name in stem or (weight.block is not None and structure.blocks[weight.block].stage < last)]


def _sizes(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    """All sizes, [..., sizes]: those of the table, and `FIXED`."""
    g, (matrix, _) = space.geometry, _columns(space.unbind())
    joint = torch.cat(tuple(one_hots), dim=-1)
    sizes = joint @ matrix.to(joint)
    last = sizes[..., list(cnn_table(space.unbind()).sizes).index(f'pixels.{len(space.structure.blocks)}')]
    one = torch.ones_like(last)
    return torch.cat([sizes, torch.stack([
        one, one if g['global_pool'] else last, one * g['in_chans'], one * g['num_classes']], dim=-1)], dim=-1)


def _weight_sizes(space: SearchSpace, one_hots: OneHots) -> dict[str, torch.Tensor]:
    """Sizes of the weights, each [..., weights]."""
    sizes, kept = _sizes(space, one_hots), _kept_weights(space)
    return {name: sizes[..., [index[i] for i in kept]] for name, index in _columns(space.unbind())[1].items()}


def _macs(space: SearchSpace, one_hots: OneHots, convention: str) -> torch.Tensor:
    size = _weight_sizes(space, one_hots)
    weights = [cnn_table(space.unbind()).weights[i] for i in _kept_weights(space)]
    products = torch.tensor([weight.matrix for weight in weights], dtype=torch.float64).to(size['rows'])
    return (products * size['active'] * size['rows'] * size['columns'] * size['area'] * size['pixels']).sum(-1)


def _params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    size = _weight_sizes(space, one_hots)
    weights = [cnn_table(space.unbind()).weights[i] for i in _kept_weights(space)]
    vectors, products = (
        torch.tensor(values, dtype=torch.float64).to(size['rows']) for values in (
            [weight.vectors for weight in weights], [weight.matrix and weight.trained for weight in weights]))
    matrices = products * size['columns'] * size['area']
    return (size['active'] * size['rows'] * (matrices + vectors)).sum(-1)


# -- operators ---------------------------------------------------------------------------------------------------------


def _operators(space: SearchSpace, one_hots: OneHots) -> OperatorTable:
    table, cnn = OperatorTable(one_hots), cnn_table(space.unbind())
    sizes = _sizes(space, one_hots)
    of_weight = {name: sizes[..., index] for name, index in _columns(space.unbind())[1].items()}
    live = _live(space, one_hots, sizes)
    kept = _kept_weights(space)
    for kind in dict.fromkeys(cnn.weights[i].kind for i in kept):
        chosen = [i for i in kept if cnn.weights[i].kind == kind]
        weights = [cnn.weights[i] for i in chosen]
        active, rows, area, columns, pixels = (
            of_weight[name][..., chosen] for name in ('active', 'rows', 'area', 'columns', 'pixels'))

        def fixed(values: Iterable[float], like: torch.Tensor = rows) -> torch.Tensor:
            return torch.tensor([float(value) for value in values], dtype=torch.float64).to(like)

        matrix = fixed(weight.matrix for weight in weights) * rows * columns * area
        trained = fixed(weight.matrix and weight.trained for weight in weights)
        is_norm = [not weight.matrix and weight.vectors == 2 for weight in weights]
        table.add(
            kind, active, macs=matrix * pixels, writes=rows * pixels, live=live[..., chosen], matrix=trained * matrix,
            rows=trained * rows, vectors=fixed(weight.vectors for weight in weights) * rows,
            statistics=fixed(is_norm) * rows)
    return table


def _live(space: SearchSpace, one_hots: OneHots, sizes: torch.Tensor) -> torch.Tensor:
    """Number of values in all tensors that exist when a weight has been used, [..., weights]."""
    g, cnn, structure = space.geometry, cnn_table(space.unbind()), space.structure
    position = {label: i for i, label in enumerate((*cnn.sizes, *FIXED))}
    inputs = structure.inputs
    starts = [number for number, (_, place) in enumerate(structure.places) if place == 0]
    padded = {label: size.value(one_hots) for label, size in cnn.padded.items()} if g.get('same_padding') else {}

    def values(channels: str, pixels: str) -> torch.Tensor | float:
        if pixels in cnn.padded:
            return sizes[..., position[channels]] * padded.get(pixels, 0.)
        return sizes[..., position[channels]] * sizes[..., position[pixels]]

    resolution = torch.tensor(space.values('resolution'), dtype=torch.float64).to(sizes)
    image = g['in_chans'] * (one_hots[0].to(sizes) @ resolution ** 2)
    found = []
    for weight in cnn.weights:
        tensors, held = list(weight.live), image
        if weight.kind == 'norm_act' and g.get('act_copies'):
            tensors += tensors[-1:]
        if weight.block is not None:
            # the loops over stages and blocks hold their inputs: the output of the stem, that of the stage before, ...
            stage, place = structure.places[weight.block]
            tensors += [('width.0', 'pixels.0')]
            tensors += [(f'width.{inputs[starts[stage]]}', f'pixels.{starts[stage]}')] * (stage > 0)
            tensors += [(f'width.{inputs[weight.block]}', f'pixels.{weight.block}')] * (place > 0)
        found.append(held + sum(values(*tensor) for tensor in tensors))
    return torch.stack(found, dim=-1)


def _geometry(net: Any) -> dict[str, Any]:
    """Properties that MACs and parameters of a CNN of this family, elastic or static, depend on."""
    found = dict(in_chans=net.in_chans, num_classes=net.num_classes, global_pool=net.global_pool.pool_type)
    # only peak memory depends on these: convolutions of stride 2 that copy their input, activations their output
    copies = dict(
        same_padding=net.conv_stem.padding == (0, 0) and net.conv_stem.kernel_size[0] > 1,
        act_copies=not getattr(net.bn1.act, 'inplace', False))
    return found | {name: True for name, value in copies.items() if value}


# -- masks -------------------------------------------------------------------------------------------------------------


class CnnMasks(NamedTuple):
    """An arch as masks of full width: a supernet takes it in place of an `Arch`.

    Attributes:
        resolution: Input height and width: a number, since the task loss has no gradient with respect to it.
        masks: By the labels of `CnnTable`: 'width.G', 'mid.B' and 'se.B' have one entry per channel, 'kernel.B' one per
            size (1 for the chosen one and all smaller ones), 'active.B' is 0-d.
    """
    resolution: int
    masks: dict[str, torch.Tensor]

    def to(self, like: torch.Tensor) -> CnnMasks:
        """The same masks with the dtype and device of a tensor."""
        return CnnMasks(self.resolution, {label: mask.to(like) for label, mask in self.masks.items()})


def _masks(space: SearchSpace, one_hots: OneHots) -> CnnMasks:
    masks = {}
    for label, size in cnn_table(space.unbind()).sizes.items():
        kind, _, number = label.partition('.')
        if kind in ('width', 'mid', 'se'):
            masks[label] = size.mask(one_hots)
        elif kind == 'kernel' and space.structure.blocks[int(number)].has_kernel:
            masks[label] = size.rank_mask(one_hots)
        elif kind == 'active':
            masks[label] = size.value(one_hots)
    return CnnMasks(space.choices[0].values[int(one_hots[0].argmax())], masks)


register_family(Family(
    name='elastic_cnn', space=elastic_cnn_space, macs=_macs, params=_params, masks=_masks, geometry=_geometry,
    operators=_operators, supernet='elastic_supernet', subnet='elastic_cnn_subnet',
    resolution=lambda arch: arch.resolution, channels=_channels))
