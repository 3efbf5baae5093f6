"""Budget groups: the intervals of MACs that the learned distribution P is over (ShiftNAS, section 3.2)."""
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
    """K intervals of equal width that cover the MACs of a space.

    Args:
        edges: K + 1 increasing numbers of MACs, from the smallest to the largest arch. Group k, counted from 0, lies
            between the edges k and k + 1 and is evaluated at its upper edge.
    """
    edges: tuple[float, ...]

    @classmethod
    def of_space(cls, space: SearchSpace, width: float | None = None, count: int | None = None) -> BudgetGroups:
        """Divide the MACs range of a bound space into groups.

        Args:
            space: A bound search space.
            width: Width in MACs, rounded to one that divides the range. Without `width` and `count` it is the paper's
                0.1 GMACs, or less where that would give fewer than 8 groups.
            count: Number of groups instead.

        Raises:
            ValueError: If both are given, or there would be fewer than 1 or more than 1,000 groups.
        """
        low, high = macs_range(space)
        if width is not None and count is not None:
            raise ValueError(
                f'give the width of a group ({format_count(width)}) or the number of groups ({count}), not both')
        if count is None:
            count = round((high - low) / (width or PAPER_WIDTH))
            if width is None:
                count = max(count, FEWEST)
        if not 1 <= count <= MOST:
            raise ValueError(
                f'{count} groups between {format_count(low)} and {format_count(high)} MACs are not from 1 to {MOST}; '
                f'give a width between {format_count((high - low) / MOST)} and {format_count(high - low)}')
        edges = [low + (high - low) * k / count for k in range(count)]
        return cls((*map(float, edges), float(high)))

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget at which each group is evaluated: its upper edge, in MACs."""
        return self.edges[1:]

    def draw(
            self,
            probabilities: torch.Tensor,
            count: int,
            generator: torch.Generator,
            lowest: float = 0.,
    ) -> torch.Tensor:
        """Draw budgets, float64 [count]: the group with `probabilities` [K], then uniformly inside the group.

        Args:
            probabilities: P, [K].
            count: Number of budgets.
            generator: Source of randomness.
            lowest: Draw from P and the groups restricted to budgets of at least this many MACs, at most the largest.
        """
        edges = torch.tensor(self.edges, dtype=torch.float64)
        low, high = edges[:-1].clamp(min=lowest), edges[1:]
        reachable = high > lowest
        reachable[-1] = True
        group = torch.multinomial(probabilities.double() * reachable, count, replacement=True, generator=generator)
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        return low[group] + share * (high - low)[group]

    def lowest_budget(self, update: int, length: int) -> float:
        """The lowest budget of a curriculum: it falls from the largest to the smallest in `length` updates."""
        low, high = self.edges[0], self.edges[-1]
        return high - (high - low) * update / length if update < length else low

    def spread(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` budgets, float64 [count]: uniform over the whole range, with both of its ends among them."""
        low, high = self.edges[0], self.edges[-1]
        budgets = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
        budgets[0], budgets[-1] = low, high
        return budgets
