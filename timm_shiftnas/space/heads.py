"""MACs and parameters of what reads the feature maps of a backbone: the necks and heads of detectors and segmenters.

Only the first layers of a head see the arch: they read feature maps whose channels follow it. So what a head costs is
affine in the channels `c_l` of the feature maps:

    MACs = a + sum_l b_l c_l

`HeadCounts` holds the numbers a and b, for every resolution of the space, as plain data that a space is bound to.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .core import OneHots, SearchSpace
from .families import family_of

__all__ = ['HeadCounts', 'head_macs', 'head_params', 'resolutions']


class HeadCounts(NamedTuple):
    """The counts of a head as numbers that `SearchSpace.bind` takes.

    Attributes:
        head_macs: (a, b_1, ..., b_L) for the L feature maps, in MACs per image, for one resolution after the other.
        head_params: (a, b_1, ..., b_L) in parameters.
    """
    head_macs: tuple[int, ...]
    head_params: tuple[int, ...]


def resolutions(space: SearchSpace) -> tuple[int | None, ...]:
    """The resolutions of a space, smallest first; `(None,)` if its archs have none."""
    index = _resolution_choice(space)
    return (None,) if index is None else space.choices[index].values


def head_macs(space: SearchSpace, one_hots: OneHots) -> torch.Tensor | int:
    """MACs per image of the head that a space is bound to, [...] for one-hots [..., number of values]; 0 without."""
    return _affine(space, one_hots, space.geometry.get('head_macs'))


def head_params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor | int:
    """Parameters of that head, likewise."""
    return _affine(space, one_hots, space.geometry.get('head_params'))


def _affine(space: SearchSpace, one_hots: OneHots, numbers: Sequence[int] | None) -> torch.Tensor | int:
    if numbers is None:
        return 0
    channels = family_of(space).channels
    assert channels is not None  # a space without it is not bound to features
    maps = [channels(space.unbind(), stage).value(one_hots) for stage in space.geometry['features']]
    table = torch.tensor(numbers, dtype=torch.float64).to(maps[0]).view(-1, 1 + len(maps))
    index = _resolution_choice(space)
    rows = table[0] if index is None or len(table) == 1 else one_hots[index].to(table) @ table
    return (rows * torch.stack([torch.ones_like(maps[0]), *maps], dim=-1)).sum(-1)


def _resolution_choice(space: SearchSpace) -> int | None:
    return next((i for i, choice in enumerate(space.choices) if choice.name == 'resolution'), None)
