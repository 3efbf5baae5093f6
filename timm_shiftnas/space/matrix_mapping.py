r"""Matrix mapping: from one-hot decisions to sizes and to nested 0/1 masks (ShiftNAS, section 3.3).

A size of a network is a table over the choices that it depends on. For a one-hot decision `o` over the widths
`n_1 < ... < n_V`, the size is `o · (n_1, ..., n_V)` and its mask is

    mask = o · M,    M[v, j] = 1 if j < n_v else 0.

Choice 2 of (1, 2, 3) heads, the one-hot (0, 1, 0), becomes the mask (1, 1, 0):

    (0, 1, 0) @ [[1, 0, 0],
                 [1, 1, 0],
                 [1, 1, 1]] = (1, 1, 0)

Both maps are linear, so the gradients of a masked network reach the architecture generator through them. A size that
depends on two choices, such as an MLP's `int(embed_dim * mlp_ratio)`, reads the outer product of their one-hots.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .core import OneHots, SearchSpace
from .families import Masks, family_of

__all__ = ['Size', 'arch_masks', 'nested']


def arch_masks(space: SearchSpace, one_hots: OneHots) -> Masks:
    """Masks of one arch, for a supernet to compute with: `net(x, arch_masks(space, one_hots))`.

    Each is `mask = o · M`, for the one-hot o over the choices that a size depends on and the matrix M of `nested`.

    Args:
        space: The search space that the one-hots belong to.
        one_hots: One floating-point tensor of shape [number of values] per choice, such as those of
            `SearchSpace.one_hot`.
    """
    return family_of(space).masks(space, one_hots)


def nested(widths: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """The matrix M of `mask = o · M`, [number of widths, largest width], with the dtype and device of `like`.

    >>> torch.tensor([0., 1., 0.]) @ nested([1, 2, 3], torch.tensor(0.))
    tensor([1., 1., 0.])
    """
    position = torch.arange(max(widths), device=like.device)
    return (position < torch.tensor(widths, device=like.device)[:, None]).to(like.dtype)


@dataclass(frozen=True)
class Size:
    """A size of a network as a table over the choices that it depends on; `Size.of` creates one.

    The same table is read at an arch (`at`), as a number that is linear in each one-hot (`value`), and as a mask.

    Args:
        choices: Indices into `SearchSpace.choices`; none for a constant.
        counts: Number of values of each of these choices.
        values: The size for every combination of them, the last choice varying fastest.
    """
    choices: tuple[int, ...]
    counts: tuple[int, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, space: SearchSpace, function: Callable[..., Any], *choices: int) -> Size:
        """Tabulate `function` of the values of some choices."""
        options = [space.choices[i].values for i in choices]
        return cls(
            choices, tuple(map(len, options)), tuple(function(*values) for values in itertools.product(*options)))

    def at(self, indices: Sequence[int]) -> Any:
        """The size for one index per choice of the space, as returned by `SearchSpace.encode`."""
        row = 0
        for choice, count in zip(self.choices, self.counts, strict=True):
            row = row * count + indices[choice]
        return self.values[row]

    def value(self, one_hots: OneHots) -> torch.Tensor:
        """The size as a tensor [...] for one-hots [..., number of values]."""
        return self.joint(one_hots) @ self._table.to(one_hots[0])

    def mask(self, one_hots: OneHots) -> torch.Tensor:
        """The nested mask of the size, `mask = o · M`, [largest], for one-hots [number of values]."""
        return self.joint(one_hots) @ nested(self.values, one_hots[0])

    def rank_mask(self, one_hots: OneHots) -> torch.Tensor:
        """The mask over the values themselves, [number of values]: 1 for the chosen one and all before it."""
        return self.joint(one_hots) @ nested(range(1, len(self.values) + 1), one_hots[0])

    def joint(self, one_hots: OneHots) -> torch.Tensor:
        """The one-hot over all combinations, [..., number of combinations]: the outer product of those it reads."""
        if not self.choices:
            return torch.ones_like(one_hots[0][..., :1])
        first, *others = (one_hots[i] for i in self.choices)
        for other in others:
            first = (first[..., :, None] * other[..., None, :]).flatten(-2)
        return first

    @cached_property
    def _table(self) -> torch.Tensor:
        with torch.inference_mode(False):  # it outlives the caller, and gradients pass through it
            return torch.tensor(self.values, dtype=torch.float64, device='cpu')
