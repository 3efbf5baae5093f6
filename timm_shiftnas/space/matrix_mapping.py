"""Matrix mapping: from one-hot decisions to nested 0/1 masks that a supernet multiplies with (ShiftNAS, section 3.3).

Choice 2 of (1, 2, 3) heads, the one-hot (0, 1, 0), becomes the mask (1, 1, 0): the one-hot times a matrix whose rows
are the masks of the values. The map is linear, so gradients of a masked network reach the generator through it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .core import SearchSpace, expanded_width
from .shiftmobilenet import HEAD_RATIO, block_choices, se_width, width_choices

__all__ = ['ArchMasks', 'BlockMasks', 'MobileNetMasks', 'arch_masks']


class ArchMasks(NamedTuple):
    """An arch of the ShiftFormer family as masks of full width: a supernet takes it in the place of an `Arch`.

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

    def to(self, like: torch.Tensor) -> ArchMasks:
        """The same masks in the type and place of a tensor."""
        return ArchMasks(*(mask.to(like) for mask in self))


class BlockMasks(NamedTuple):
    """One block of a MobileNet; masks of full width.

    Attributes:
        width_in: [largest width that comes in].
        hidden: [largest width inside].
        kernel_size: [number of sizes], 1 for the chosen size and all smaller ones.
        se: [largest width inside squeeze-and-excitation].
        equal: 0-d, 1 where as many channels come in as go out.
        active: 0-d, 1 if the block exists.
    """
    width_in: torch.Tensor
    hidden: torch.Tensor
    kernel_size: torch.Tensor
    se: torch.Tensor
    equal: torch.Tensor
    active: torch.Tensor


class MobileNetMasks(NamedTuple):
    """An arch of the ShiftMobileNet family as masks of full width: a supernet takes it in the place of an `Arch`.

    The resolution is no mask but a number: the task loss has no gradient for it but by the decisions that follow it in
    a generator, which otherwise learns it from the resource term.

    Attributes:
        resolution: Input height and width.
        blocks: Of every block of the deepest network.
        stage: [largest width of the last stage].
        expanded: [6 times that], of the head that is called 'efficient'.
        last: [largest width of the last convolution].
    """
    resolution: int
    blocks: tuple[BlockMasks, ...]
    stage: torch.Tensor
    expanded: torch.Tensor
    last: torch.Tensor

    def to(self, like: torch.Tensor) -> MobileNetMasks:
        """The same masks in the type and place of a tensor."""
        blocks = tuple(BlockMasks(*(mask.to(like) for mask in block)) for block in self.blocks)
        return MobileNetMasks(self.resolution, blocks, *(mask.to(like) for mask in self[2:]))


def arch_masks(space: SearchSpace, one_hots: Sequence[torch.Tensor]) -> ArchMasks | MobileNetMasks:
    """Masks of one arch.

    Args:
        space: The search space that the one-hots belong to.
        one_hots: One floating-point tensor of shape [number of values] per choice, as `SearchSpace.one_hot` gives them.
    """
    return (_mobilenet_masks if space.family == 'shiftmobilenet' else _shiftformer_masks)(space, one_hots)


def _nested(widths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The mask of each width, [number of widths, largest width]."""
    position = torch.arange(max(widths), device=like.device)
    return (position < torch.tensor(widths, device=like.device)[:, None]).to(like.dtype)


def _shiftformer_masks(space: SearchSpace, one_hots: Sequence[torch.Tensor]) -> ArchMasks:
    embed, depth, *layers = one_hots
    dims, ratios = space.values('embed_dim'), space.values('mlp_ratio')
    # The hidden width int(embed_dim * mlp_ratio) depends on two choices: their outer product selects it.
    hidden = _nested([int(dim * ratio) for dim in dims for ratio in ratios], embed)
    return ArchMasks(
        embed_dim=embed @ _nested(dims, embed),
        depth=depth @ _nested(space.values('depth'), embed),
        num_heads=torch.stack(layers[0::2]) @ _nested(space.values('num_heads'), embed),
        hidden=torch.stack([torch.outer(embed, ratio).flatten() for ratio in layers[1::2]]) @ hidden,
    )


def _mobilenet_masks(space: SearchSpace, one_hots: Sequence[torch.Tensor]) -> MobileNetMasks:
    like = one_hots[0]
    one = like.new_ones(1)
    values = [choice.values for choice in space.choices]
    blocks = []
    for block in block_choices(space):
        incoming, leaving = values[block.width_in], values[block.width_out]
        width_in, width_out = one_hots[block.width_in], one_hots[block.width_out]
        fixed = block.kernel_size is None
        ratios = (1.,) if fixed else values[block.expand_ratio]
        hidden = [expanded_width(width, ratio) if block.expands else width for width in incoming for ratio in ratios]
        both = torch.outer(width_in, one if fixed else one_hots[block.expand_ratio]).flatten()
        sizes = 1 if fixed else len(values[block.kernel_size])
        blocks.append(BlockMasks(
            width_in=width_in @ _nested(incoming, like),
            hidden=both @ _nested(hidden, like),
            kernel_size=(one if fixed else one_hots[block.kernel_size]) @ _nested(range(1, sizes + 1), like),
            se=both @ _nested([se_width(width) if block.se else 1 for width in hidden], like),
            equal=width_in @ like.new_tensor([[float(a == b) for b in leaving] for a in incoming]) @ width_out,
            active=one[0] if fixed else one_hots[block.depth] @ like.new_tensor(
                [float(depth > block.position) for depth in values[block.depth]]),
        ))
    *_, stage, last = width_choices(space)
    return MobileNetMasks(
        resolution=values[0][int(one_hots[0].argmax())],
        blocks=tuple(blocks),
        stage=one_hots[stage] @ _nested(values[stage], like),
        expanded=one_hots[stage] @ _nested([HEAD_RATIO * width for width in values[stage]], like),
        last=one_hots[last] @ _nested(values[last], like),
    )
