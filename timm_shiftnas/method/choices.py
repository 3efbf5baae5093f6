"""Archs as tensors of choice indices, the form in which the architecture generator computes with them."""
from __future__ import annotations

import torch
from torch import Tensor

from ..space.core import SearchSpace
from ..space.resources import MACS, Resource

__all__ = ['ChoiceTable']


class ChoiceTable:
    """The n choices of a search space, padded to the same number of values.

    Its tensors stay on the CPU. Indices are int64 of shape [..., n], as `SearchSpace.encode` gives them.

    Args:
        space: A bound search space.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        counts = [len(choice.values) for choice in space.choices]
        self.most = max(counts)  # number of values after padding
        self.is_padding = torch.tensor(
            [[value >= count for value in range(self.most)] for count in counts], device='cpu')  # [n, most]
        # Choice i is active where _exists[i, index of choice _gates[i]] is True.
        gates = [i if choice.gate is None else choice.gate for i, choice in enumerate(space.choices)]
        self._gates = torch.tensor(gates, device='cpu')
        self._exists = torch.ones(len(counts), self.most, dtype=torch.bool, device='cpu')
        for i, choice in enumerate(space.choices):
            if choice.gate is not None:
                depths = space.choices[choice.gate].values
                self._exists[i, :len(depths)] = torch.tensor(
                    [depth >= choice.min_depth for depth in depths], device='cpu')

    def __len__(self) -> int:
        return len(self._gates)

    def active(self, indices: Tensor) -> Tensor:
        """Whether each choice exists at the chosen depths: bool, [..., n]."""
        return self._exists[torch.arange(len(self), device='cpu'), indices[..., self._gates]]

    def count(self, indices: Tensor, resource: Resource = MACS) -> Tensor:
        """MACs, or another resource, [...]: float64, which holds integers exactly."""
        return resource.count(self.space, self.space.one_hot_of_indices(indices))
