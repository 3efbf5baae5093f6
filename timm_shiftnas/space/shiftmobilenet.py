"""The blocks of a MobileNet space: which choices each of them reads, and what it is at an arch."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from timm.layers import make_divisible

from .core import Arch, SearchSpace, expanded_width

__all__ = [
    'BlockChoices', 'BlockShape', 'HEAD_RATIO', 'block_choices', 'block_shapes', 'output_side', 'se_width',
    'width_choices',
]

HEAD_RATIO = 6  # the 'efficient' head expands the last stage by this before pooling


class BlockChoices(NamedTuple):
    """One block of the deepest network: where it stands, what is fixed in it, and the choices that it reads.

    The last five are indices into `space.choices`; the last three are `None` in a block that is fixed.
    """
    stage: int  # `net.blocks[stage][position]`
    position: int
    stride: int
    se: bool
    act: str
    expands: bool  # has an expanding convolution
    width_in: int
    width_out: int
    depth: int | None
    kernel_size: int | None
    expand_ratio: int | None


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
    se: int  # width inside SE; 0: none


def width_choices(space: SearchSpace) -> list[int]:
    """Indices of the width choices: of the stem, the stages, and the last convolution."""
    return [i for i, choice in enumerate(space.choices) if choice.name == 'width']


def block_choices(space: SearchSpace) -> list[BlockChoices]:
    """Every block of the deepest network, first to last."""
    fixed: dict[str, Any] = dict(space.structure)
    found = {(choice.name, choice.layer): i for i, choice in enumerate(space.choices)}
    widths, blocks = width_choices(space), []
    if fixed['stem_block']:
        blocks.append(BlockChoices(0, 0, 1, False, fixed['act'][1], False, *widths[:2], None, None, None))
    first = 1 + fixed['stem_block']
    block = 0
    for s, stride in enumerate(fixed['stride']):
        depth = found['depth', s]
        entry = first + s
        for position in range(space.choices[depth].values[-1]):
            layer = block if fixed['per_block'] else s
            ratio = found['expand_ratio', layer]
            blocks.append(BlockChoices(
                stage=entry - 1, position=position, stride=stride if position == 0 else 1, se=fixed['se'][s],
                act=fixed['act'][entry], expands=space.choices[ratio].values != (1.0,),
                width_in=widths[entry - (position == 0)], width_out=widths[entry], depth=depth,
                kernel_size=found['kernel_size', layer], expand_ratio=ratio))
            block += 1
    return blocks


def output_side(space: SearchSpace, resolution: int) -> int:
    """Height and width of the last stage's output for images of a resolution."""
    side = math.ceil(resolution / 2)
    for stride in dict(space.structure)['stride']:
        side = math.ceil(side / stride)
    return side


def se_width(hidden: int) -> int:
    """Channels inside squeeze-and-excitation of so many channels: at least 8 (of 8, AttentiveNAS has 9)."""
    return make_divisible(hidden // 4, 8)


def block_shapes(space: SearchSpace, arch: Arch, blocks: Sequence[BlockChoices] | None = None) -> list[BlockShape]:
    """The blocks of the network of an arch, first to last; `blocks` spares finding `block_choices` again."""
    indices = space.encode(arch)
    values = [choice.values[index] for choice, index in zip(space.choices, indices)]
    shapes = []
    for block in block_choices(space) if blocks is None else blocks:
        if block.depth is not None and block.position >= values[block.depth]:
            continue
        width_in = values[block.width_in]
        ratio = 1 if block.expand_ratio is None else values[block.expand_ratio]
        hidden = expanded_width(width_in, ratio) if block.expands else width_in
        shapes.append(BlockShape(
            block.stage, block.position, block.stride, block.act, block.expands, width_in, hidden,
            values[block.width_out], 3 if block.kernel_size is None else values[block.kernel_size],
            se_width(hidden) if block.se else 0))
    return shapes
