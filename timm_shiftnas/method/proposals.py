"""Proposals: the arch for a budget, chosen among the generator's samples and enlarged where these leave room.

A budget is an upper bound on one resource, and several may be given at once. `ArchitectureGenerator.propose` and its
siblings call these functions.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsFloat

import torch
from torch import Tensor

from ..space.core import Arch, SearchSpace
from ..space.resources import MACS, PARAMS, Resource
from .choices import ChoiceTable

__all__ = ['BudgetWarning', 'check_limits', 'enlarge', 'propose', 'propose_for_params', 'propose_many',
           'propose_within', 'select']

CLOSE = 0.99  # least share of its budget that a sampled proposal uses
ROUNDING = 1.01  # no warning for budgets up to 1% above the largest arch: people type rounded figures
STARTS = 8  # archs that are enlarged

Limit = tuple[Resource, float]  # a resource, and the most that an arch may use of it


class BudgetWarning(UserWarning):
    """A budget is above the largest arch, which is returned."""


class CandidateGenerator(Protocol):
    """The part of an architecture generator that proposals use."""
    space: SearchSpace
    choices: ChoiceTable
    resource: Resource
    budget_min: float
    budget_max: float

    def candidates(self, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, candidates, n] and log-probabilities [B, candidates] of archs for each budget."""


def propose(generator: CandidateGenerator, budget: SupportsFloat | str) -> Arch:
    """The arch for a budget; see `ArchitectureGenerator.propose`."""
    return propose_many(generator, [budget])[0]


@torch.no_grad()
def propose_many(generator: CandidateGenerator, budgets: Sequence[SupportsFloat | str]) -> list[Arch]:
    """`propose` for several budgets at once, with the same results and errors."""
    resource, ends = generator.resource, (generator.budget_min, generator.budget_max)
    limits = [_check({resource: budget}, {resource: ends}, generator.space)[resource] for budget in budgets]
    archs = []
    for start in range(0, len(limits), 16):  # larger batches do not fit into the processor's cache
        part = torch.tensor(limits[start:start + 16], dtype=torch.float64, device='cpu')
        indices, log_probs = generator.candidates(part)
        counts = generator.choices.count(indices, resource)
        chosen = select(generator.choices, part, indices, counts, log_probs, resource)
        archs += [generator.space.decode(each) for each in chosen.tolist()]
    return archs


def select(choices: ChoiceTable, limits: Tensor, indices: Tensor, counts: Tensor, log_probs: Tensor,
           resource: Resource = MACS) -> Tensor:
    """Choose the proposal for each of B budgets among its candidates.

    It is the most probable candidate that uses at least 99% of the budget. If there is none, it is the best result of
    enlarging the largest candidates within the budget.

    Args:
        choices: The choices of the search space.
        limits: The budgets, [B].
        indices: Choice indices of the candidates, [B, candidates, n]; 0 where a choice is inactive.
        counts: Their MACs, or what they use of the resource, [B, candidates].
        log_probs: Their log-probabilities, [B, candidates].
        resource: What the budgets bound.

    Returns:
        Choice indices, [B, n].
    """
    fits = counts <= limits[:, None]
    close = fits & (counts >= CLOSE * limits[:, None])
    chosen = indices[range(len(indices)), log_probs.masked_fill(~close, -math.inf).argmax(1)]
    rest = torch.nonzero(~close.any(1)).flatten().tolist()
    if not rest:
        return chosen
    smallest = torch.zeros_like(indices[0, :1])
    fitting = [torch.cat((smallest, indices[i, fits[i]])).unique(dim=0) for i in rest]
    used = choices.count(torch.cat(fitting), resource).split([len(each) for each in fitting])
    starts = [each[count.argsort(descending=True, stable=True)[:STARTS]] for each, count in zip(fitting, used)]
    # the starts of all budgets grow at once: counting takes about as long for many archs as for one
    sizes = [len(each) for each in starts]
    own_limits = limits[rest].repeat_interleave(torch.tensor(sizes, device='cpu'))
    ended, reached = _grow(choices, own_limits, torch.cat(starts), resource)
    chosen[rest] = torch.stack([
        each[most.argmax()] for each, most in zip(ended.split(sizes), reached.split(sizes))])
    return chosen


def enlarge(choices: ChoiceTable, limit: Tensor, indices: Tensor, resource: Resource = MACS,
            others: Sequence[Limit] = ()) -> Tensor:
    """Enlarge archs by single changes up to a budget, and return the largest result.

    From each start, repeat the change of one choice that gives the most MACs within the budget, until none adds any.

    Args:
        choices: The choices of the search space.
        limit: The budget, 0-d.
        indices: Choice indices of the starts, [starts, n].
        resource: What the budget bounds, and what grows.
        others: Further resources and their budgets.

    Returns:
        Choice indices, [n].
    """
    ended, counts = _grow(choices, limit.expand(len(indices)), indices, resource, others)
    return ended[counts.argmax()]


def _grow(choices: ChoiceTable, limits: Tensor, indices: Tensor, resource: Resource,
          others: Sequence[Limit] = ()) -> tuple[Tensor, Tensor]:
    """The arch that `enlarge` reaches from each start under its own limit, [starts, n], and its cost, [starts]."""
    changed, values = torch.nonzero(~choices.is_padding).unbind(1)  # every change: a choice and its new index
    counts = choices.count(indices, resource)
    while True:
        # A change of an inactive choice leaves the MACs as they are and is therefore never taken.
        neighbours = indices[:, None].repeat(1, len(changed), 1)
        neighbours[:, range(len(changed)), changed] = values
        neighbours *= choices.active(neighbours)
        reached = choices.count(neighbours, resource)
        excess = reached > limits[:, None]
        for other, most in others:
            excess |= choices.count(neighbours, other) > most
        highest, change = reached.masked_fill(excess, 0).max(1)
        grows = highest > counts
        if not grows.any():
            return indices, counts
        indices = torch.where(grows[:, None], neighbours[range(len(indices)), change], indices)
        counts = torch.where(grows, highest, counts)


@torch.no_grad()
def propose_within(generator: CandidateGenerator, budgets: Mapping[Resource, SupportsFloat | str]) -> Arch:
    """The arch within budgets of several resources, or of another one than the generator's.

    Of the proposals at 256 budgets over the whole range of the generator, the largest one that fits is taken. If it
    uses less than 99% of every budget, the largest ones that fit are enlarged under all of them.

    Raises:
        ValueError: If no arch fits, or a budget is not a number with a unit of its resource.
    """
    space, target = generator.space, generator.resource
    if {*budgets} == {target}:
        return propose(generator, budgets[target])
    limits = check_limits(space, budgets)
    if all(limit == resource.range(space)[1] for resource, limit in limits.items()):
        return space.largest
    # The proposal at the lowest budget is the smallest arch, so at least one fits.
    grid = torch.linspace(generator.budget_min, generator.budget_max, 256, dtype=torch.float64, device='cpu')
    archs = list(dict.fromkeys(propose_many(generator, grid.tolist())))
    used = {resource: resource.count(space, archs) for resource in {*limits, target, PARAMS}}
    fits = torch.stack([used[resource] <= limit for resource, limit in limits.items()]).all(0)
    chosen = [i for i, fit in enumerate(fits.tolist()) if fit]
    chosen.sort(key=lambda i: (used[target][i].item(), used[PARAMS][i].item()), reverse=True)
    best = chosen[0]
    if any(used[resource][best] >= CLOSE * limit for resource, limit in limits.items()):
        return archs[best]
    starts = torch.tensor([space.encode(archs[i]) for i in chosen[:STARTS]], device='cpu')
    most = torch.tensor(limits.pop(target, generator.budget_max), dtype=torch.float64, device='cpu')
    return space.decode(enlarge(generator.choices, most, starts, target, list(limits.items())).tolist())


def propose_for_params(generator: CandidateGenerator, params: SupportsFloat | str) -> Arch:
    """The proposal within a number of parameters; see `ArchitectureGenerator.propose_for_params`."""
    return propose_within(generator, {PARAMS: params})


def check_limits(space: SearchSpace, budgets: Mapping[Resource, Any]) -> dict[Resource, float]:
    """Read budgets, and lower them to what the largest arch uses.

    Warns:
        BudgetWarning: If all budgets are above what the largest arch uses.

    Raises:
        ValueError: If a budget is not a positive number in a unit of its resource, or is below what the smallest arch
            uses. The message then names the tightest budget and the least that it may be.
    """
    return _check(budgets, {resource: resource.range(space) for resource in budgets}, space)


def _check(
        budgets: Mapping[Resource, Any], ranges: Mapping[Resource, tuple[float, float]], space: SearchSpace,
) -> dict[Resource, float]:
    """`check_limits` with known ranges of the resources."""
    limits = {resource: resource.parse(value) for resource, value in budgets.items()}
    tightest = min(limits, key=lambda resource: limits[resource] / ranges[resource][0])
    low, high = ranges[tightest]
    given = {resource: f'{resource.keyword}={str(value)[:40]}' for resource, value in budgets.items()}
    if limits[tightest] < low:
        several = f'; of {" and ".join(given.values())} it is the tightest' if len(given) > 1 else ''
        raise ValueError(
            f'{given[tightest]} is too small a budget: the archs of this space have {tightest.format(low)} to '
            f'{tightest.describe(high)}; give {tightest.keyword}={tightest.least(low)} or more{several}')
    if all(limits[resource] > ranges[resource][1] * ROUNDING for resource in limits):
        macs = MACS.describe(MACS.range(space)[1])
        warnings.warn(
            f'{" and ".join(given.values())} is more than any arch of this space uses; the largest one has {macs}',
            BudgetWarning, stacklevel=4)
    return {resource: min(limit, ranges[resource][1]) for resource, limit in limits.items()}
