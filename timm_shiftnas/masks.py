"""Matrix mapping: from one-hot decisions to nested 0/1 masks that a supernet multiplies with (ShiftNAS, section 3.3).

Choice 2 of (1, 2, 3) heads, the one-hot (0, 1, 0), becomes the mask (1, 1, 0): the one-hot times a matrix whose rows
are the masks of the values. The map is linear, so gradients of a masked network reach the generator through it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .space import SearchSpace

__all__ = ['ArchMasks', 'arch_masks']


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


def arch_masks(space: SearchSpace, one_hots: Sequence[torch.Tensor]) -> ArchMasks:
    """Masks of one arch.

    Args:
        space: The search space that the one-hots belong to.
        one_hots: One floating-point tensor of shape [number of values] per choice, as `SearchSpace.one_hot` gives them.
    """
    embed, depth, *layers = one_hots
    dims, ratios = space.values('embed_dim'), space.values('mlp_ratio')

    def nested(widths: Sequence[int]) -> torch.Tensor:
        position = torch.arange(max(widths), device=embed.device)
        return (position < torch.tensor(widths, device=embed.device)[:, None]).to(embed.dtype)

    # The hidden width int(embed_dim * mlp_ratio) depends on two choices: their outer product selects it.
    hidden = nested([int(dim * ratio) for dim in dims for ratio in ratios])
    return ArchMasks(
        embed_dim=embed @ nested(dims),
        depth=depth @ nested(space.values('depth')),
        num_heads=torch.stack(layers[0::2]) @ nested(space.values('num_heads')),
        hidden=torch.stack([torch.outer(embed, ratio).flatten() for ratio in layers[1::2]]) @ hidden,
    )
