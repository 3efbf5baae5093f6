"""Budget groups: the intervals of a resource that the learned distribution P is over (ShiftNAS, section 3.2)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..space.core import SearchSpace
from ..space.latency import find_resource
from ..space.resources import MACS, Resource

__all__ = ['BudgetGroups']

PAPER_WIDTH = 0.1e9
FEWEST, MOST = 8, 1000


class GroupSettings(Protocol):
    """The settings of groups, as in `RunConfig` and in the flags of train.py."""
    @property
    def resource(self) -> str: ...
    @property
    def resource_file(self) -> str | None: ...
    @property
    def group_width(self) -> str | float | None: ...
    @property
    def num_groups(self) -> int | None: ...


@dataclass(frozen=True)
class BudgetGroups:
    """K intervals of equal width that cover the MACs of a space, or another resource.

    Args:
        edges: K + 1 increasing numbers of MACs, or in the unit of the resource, from the smallest to the largest arch.
            Group k, counted from 0, lies between the edges k and k + 1 and is evaluated at its upper edge.
        resource: What the edges count.
    """
    edges: tuple[float, ...]
    resource: Resource = MACS

    @classmethod
    def of_space(cls, space: SearchSpace, width: float | None = None, count: int | None = None,
                 resource: Resource = MACS) -> BudgetGroups:
        """Divide the range of MACs, or of another resource, of a bound space into groups.

        Args:
            space: A bound search space.
            width: Width in the unit of the resource, rounded to one that divides the range. Without `width` and `count`
                it is the paper's 0.1 GMACs, or less where that would give fewer than 8 groups. Other resources get as
                many groups as MACs would.
            count: Number of groups instead.
            resource: What budgets bound.

        Raises:
            ValueError: If both are given, or there would be fewer than 1 or more than 1,000 groups.
        """
        low, high = resource.range(space)
        if width is not None and count is not None:
            raise ValueError(
                f'give the width of a group ({resource.format(width)}) or the number of groups ({count}), not both')
        if count is None and width is not None:
            count = round((high - low) / width)
        elif count is None:
            fewest_macs, most_macs = MACS.range(space)
            count = max(round((most_macs - fewest_macs) / PAPER_WIDTH), FEWEST)
        if not 1 <= count <= MOST:
            raise ValueError(
                f'{count} groups between {resource.format(low)} and {resource.describe(high)} are not from 1 to '
                f'{MOST}; give a width between {resource.format((high - low) / MOST)} and '
                f'{resource.format(high - low)}')
        edges = [low + (high - low) * k / count for k in range(count)]
        return cls((*map(float, edges), float(high)), resource)

    @classmethod
    def of_settings(
            cls, space: SearchSpace, run: GroupSettings, width_name: str = 'group_width') -> BudgetGroups:
        """The groups that the settings of a run ask for.

        Args:
            space: A bound search space.
            run: The settings: `resource`, `resource_file`, `group_width` and `num_groups`.
            width_name: What the width is called in errors.

        Raises:
            ValueError: As for `find_resource`, `Resource.parse` and `of_space`.
        """
        resource = find_resource(run.resource, space, run.resource_file)
        width = None if run.group_width is None else resource.parse(run.group_width, width_name)
        return cls.of_space(space, width=width, count=run.num_groups, resource=resource)

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budget at which each group is evaluated: its upper edge."""
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
            lowest: Draw from P and the groups restricted to budgets of at least this, at most the largest.
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
