"""Groups of budgets: the intervals of the MACs range that the learned distribution is over (ShiftNAS, section 3.2)."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..space.complexity import macs_range
from ..space.core import SearchSpace
from ..utils.units import format_count

__all__ = ['BudgetGroups']

PAPER_WIDTH = 0.1e9
FEWEST, MOST = 8, 1000


@dataclass(frozen=True)
class BudgetGroups:
    """K equally wide intervals that cover the MACs of a space.

    Args:
        edges: K + 1 increasing numbers of MACs, from the smallest to the largest arch. Group k (from 0) lies between
            edges k and k + 1, and is evaluated at its upper edge.
    """
    edges: tuple[float, ...]

    @classmethod
    def of_space(cls, space: SearchSpace, width: float | None = None, count: int | None = None) -> BudgetGroups:
        """Cut the MACs range of a bound space.

        Args:
            space: A bound search space.
            width: Wanted width in MACs; the nearest one that divides the range is taken. The paper's 0.1 GMACs when
                neither `width` nor `count` is given, unless that makes fewer than 8 groups: then 8.
            count: Number of groups instead.

        Raises:
            ValueError: If both are given, or the groups would be fewer than 1 or more than 1,000.
        """
        low, high = macs_range(space)
        if width is not None and count is not None:
            raise ValueError(f'give the width ({format_count(width)}) or the number ({count}) of groups, not both')
        if count is None:
            count = round((high - low) / (width or PAPER_WIDTH))
            if width is None:
                count = max(count, FEWEST)
        if not 1 <= count <= MOST:
            raise ValueError(
                f'{count} groups between {format_count(low)} and {format_count(high)} MACs; there must be 1 to {MOST}: '
                f'choose a width between {format_count((high - low) / MOST)} and {format_count(high - low)}')
        edges = [low + (high - low) * k / count for k in range(count)]
        return cls((*map(float, edges), float(high)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget at which each group is evaluated: its upper edge, in MACs."""
        return self.edges[1:]

    def draw(self, probabilities: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` budgets, float64 [count]: a group by `probabilities` [K], then uniform inside it."""
        group = torch.multinomial(probabilities.double(), count, replacement=True, generator=generator)
        edges = torch.tensor(self.edges, dtype=torch.float64)
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        return edges[group] + share * (edges[group + 1] - edges[group])
