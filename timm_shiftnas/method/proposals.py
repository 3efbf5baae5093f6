"""Proposals: the arch for a budget, chosen among the generator's samples and enlarged where these leave room.

`ArchitectureGenerator.propose` and its siblings call these functions.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, SupportsFloat, cast

import torch
from torch import Tensor

from ..space import complexity
from ..space.core import Arch, SearchSpace
from ..utils.units import format_count, parse_count
from .choices import ChoiceTable

__all__ = ['enlarge', 'propose', 'propose_for_params', 'propose_many', 'select']

CLOSE = 0.99  # least share of its budget that a sampled proposal uses
ROUNDING = 1.01  # budgets up to 1% above the largest arch are accepted: people type rounded figures
STARTS = 8  # archs that are enlarged


class CandidateGenerator(Protocol):
    """The part of an architecture generator that proposals use."""
    space: SearchSpace
    choices: ChoiceTable
    macs_min: int
    macs_max: int

    def candidates(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, candidates, n] and log-probabilities [B, candidates] of archs for each budget."""


def propose(generator: CandidateGenerator, flops: SupportsFloat | str) -> Arch:
    """The arch for a budget; see `ArchitectureGenerator.propose`."""
    return propose_many(generator, [flops])[0]


@torch.no_grad()
def propose_many(generator: CandidateGenerator, budgets: Sequence[SupportsFloat | str]) -> list[Arch]:
    """`propose` for several budgets at once, with the same results and errors."""
    limits = [_parse_limit('flops', budget, generator.macs_min, generator.macs_max, 'MACs') for budget in budgets]
    archs = []
    for start in range(0, len(limits), 16):  # larger batches do not fit into the processor's cache
        part = torch.tensor(limits[start:start + 16], dtype=torch.float64, device='cpu')
        indices, log_probs = generator.candidates(part)
        for case in zip(part, indices, generator.choices.macs(indices), log_probs):
            archs.append(generator.space.decode(select(generator.choices, *case).tolist()))
    return archs


def select(choices: ChoiceTable, limit: Tensor, indices: Tensor, macs: Tensor, log_probs: Tensor) -> Tensor:
    """Choose the proposal among candidates.

    The most probable candidate that uses at least 99% of the budget. If there is none, the best result of enlarging
    the largest candidates within the budget.

    Args:
        choices: The choices of the search space.
        limit: The budget in MACs, 0-d.
        indices: Choice indices of the candidates, [candidates, n]; 0 where a choice is inactive.
        macs: Their MACs, [candidates].
        log_probs: Their log-probabilities, [candidates].

    Returns:
        Choice indices, [n].
    """
    close = (macs >= CLOSE * limit) & (macs <= limit)
    if close.any():
        return indices[log_probs.masked_fill(~close, -math.inf).argmax()]
    smallest = torch.zeros_like(indices[:1])
    fitting = torch.cat((smallest, indices[macs <= limit])).unique(dim=0)
    return enlarge(choices, limit, fitting[choices.macs(fitting).argsort(descending=True, stable=True)[:STARTS]])


def enlarge(choices: ChoiceTable, limit: Tensor, indices: Tensor) -> Tensor:
    """Enlarge archs by single changes up to a budget, and return the largest result.

    From each start, repeat the change of one choice that gives the most MACs within the budget, until none adds any.

    Args:
        choices: The choices of the search space.
        limit: The budget in MACs, 0-d.
        indices: Choice indices of the starts, [starts, n].

    Returns:
        Choice indices, [n].
    """
    changed, values = torch.nonzero(~choices.is_padding).unbind(1)  # every change: a choice and its new index
    macs = choices.macs(indices)
    while True:
        # A change of an inactive choice leaves the MACs as they are and is therefore never taken.
        neighbours = indices[:, None].repeat(1, len(changed), 1)
        neighbours[:, range(len(changed)), changed] = values
        neighbours *= choices.active(neighbours)
        reached = choices.macs(neighbours)
        highest, change = reached.masked_fill(reached > limit, 0).max(1)
        grows = highest > macs
        if not grows.any():
            return indices[macs.argmax()]
        indices = torch.where(grows[:, None], neighbours[range(len(indices)), change], indices)
        macs = torch.where(grows, highest, macs)


def propose_for_params(generator: CandidateGenerator, params: SupportsFloat | str) -> Arch:
    """The proposal of most MACs within a number of parameters; see `ArchitectureGenerator.propose_for_params`."""
    space = generator.space
    low, high = (cast(int, complexity.params(space, arch)) for arch in (space.smallest, space.largest))
    limit = _parse_limit('params', params, low, high, 'parameters')
    budgets = torch.linspace(generator.macs_min, generator.macs_max, 256, dtype=torch.float64, device='cpu')
    archs = list(dict.fromkeys(propose_many(generator, budgets.tolist())))
    macs, sizes = (cast(Tensor, count(space, archs)).tolist() for count in (complexity.macs, complexity.params))
    # The proposal at the lowest budget is the smallest arch, so at least one fits.
    best = max((i for i, size in enumerate(sizes) if size <= limit), key=lambda i: (macs[i], sizes[i]))
    return archs[best]


def _parse_limit(name: str, value: SupportsFloat | str, low: int, high: int, unit: str) -> float:
    """Read a budget, and lower it to that of the largest arch.

    Raises:
        ValueError: If it is not a positive number, or out of the range from `low` to `high`.
    """
    limit = parse_count(value, name)
    if not low <= limit <= high * ROUNDING:
        problem, hint = ('too small a budget', f'{low} or more') if limit < low else (
            'more than any arch uses', f'{high} for the largest')
        raise ValueError(
            f'{name}={str(value)[:40]} is {problem}: the archs of this space have {format_count(low)} to '
            f'{format_count(high)} {unit}; give {name}={hint}')
    return min(limit, high)
