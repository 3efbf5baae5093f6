"""The interface between sorting by importance and a supernet: the units that its weights consist of."""
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..space.core import SearchSpace
from ..space.families import Masks

__all__ = ['SortableSupernet', 'UnitAxis']


class UnitAxis(NamedTuple):
    """A dimension of a weight that consists of units: [repeats, units, size] flattened.

    Attributes:
        units: Label of the units: all dimensions with this label have one order.
        repeats: How often the sequence of units repeats: 3 times in the rows q | k | v of attention.
        size: Entries of one unit: the width of a head.
    """
    units: str
    repeats: int = 1
    size: int = 1

    def scores(self, entries: Tensor) -> Tensor:
        """Sums over the entries of every unit."""
        return entries.view(self.repeats, -1, self.size).sum((0, 2))

    def rows(self, order: Tensor) -> Tensor:
        """The entries, in the order of the units."""
        count = len(order) * self.repeats * self.size
        entries = torch.arange(count, device=order.device).view(self.repeats, -1, self.size)
        return entries[:, order].flatten()


class SortableSupernet:
    """Mixin of supernets whose units may be permuted without changing the function.

    Units and layers have labels: a channel group, the heads of a layer, a layer.
    """
    unbound_space: SearchSpace

    def unit_axes(self, name: str) -> tuple[UnitAxis | None, ...]:
        """For every dimension of a parameter or buffer, by its name, the units that it consists of, if any."""
        raise NotImplementedError

    def layer_of(self, name: str) -> str | None:
        """The label of the layer that a parameter belongs to; `None` for parameters outside of layers."""
        raise NotImplementedError

    def split_masks(self, masks: Masks) -> dict[str, Tensor]:
        """The masks of units and layers by label: a vector for units, 0-d for a layer."""
        raise NotImplementedError

    def join_masks(self, masks: Mapping[str, Tensor]) -> Masks:
        """Inverse of `split_masks`, for the largest arch."""
        raise NotImplementedError

    def with_layer_order(self, scores: Mapping[str, Tensor]) -> SearchSpace:
        """The search space in which layers of higher scores are more important."""
        raise NotImplementedError
