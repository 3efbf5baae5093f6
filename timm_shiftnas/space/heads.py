"""MACs, parameters and bytes of the heads that read the feature maps of a backbone, such as those of detectors.

Only the first layers of a head see the arch: they read feature maps whose channels follow it. So the cost of a head is
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

__all__ = ['HeadCounts', 'head_bytes', 'head_macs', 'head_params', 'resolutions']


class HeadCounts(NamedTuple):
    """The counts of a head as numbers that `SearchSpace.bind` takes.

    Attributes:
        head_macs: (a, b_1, ..., b_L) for the L feature maps, in MACs per image, for one resolution after the other.
        head_params: (a, b_1, ..., b_L) in parameters.
        head_sizes: Further numbers that bytes of weights depend on: the entries of the weights of convolutions and
            linear layers that read no feature map, the output channels of all such layers, the floating-point numbers
            in buffers, and the bytes of all other buffers.
    """
    head_macs: tuple[int, ...]
    head_params: tuple[int, ...]
    head_sizes: tuple[int, int, int, int]


def resolutions(space: SearchSpace) -> tuple[int | None, ...]:
    """The resolutions of a space, smallest first; `(None,)` if its archs have none."""
    index = _resolution_choice(space)
    return (None,) if index is None else space.choices[index].values


def head_macs(space: SearchSpace, one_hots: OneHots) -> torch.Tensor | int:
    """MACs per image of the head that a space is bound to, [...] for one-hots [..., number of values]; 0 without."""
    return _affine(space, one_hots, space.geometry.get('head_macs'))


def head_params(space: SearchSpace, one_hots: OneHots) -> torch.Tensor | int:
    """Parameters of the head that a space is bound to; see `head_macs`."""
    return _affine(space, one_hots, space.geometry.get('head_params'))


def head_bytes(space: SearchSpace, one_hots: OneHots, matrix: int, row: int, other: int) -> torch.Tensor | int:
    """Bytes of the weights of that head; see `head_macs`. Only entries of weights depend on the channels of maps.

    Args:
        space: The space.
        one_hots: The archs.
        matrix: Bytes of an entry of the weight of a convolution or a linear layer.
        row: Bytes for each output channel of such a layer.
        other: Bytes of every other floating-point number.

    Raises:
        ValueError: If the head was saved before its sizes were recorded.
    """
    if 'head_macs' not in space.geometry:
        return 0
    if 'head_sizes' not in space.geometry:
        raise ValueError('the size of this network was not saved; load it with network=, or save it again')
    entries, rows, numbers, buffers = space.geometry['head_sizes']
    vectors = space.geometry['head_params'][0] - entries
    return matrix * (head_params(space, one_hots) - vectors) + row * rows + other * (vectors + numbers) + buffers


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
