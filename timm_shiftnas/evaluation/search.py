"""Search for the best archs of a trained supernet, on images.

`search` finds the Pareto front of accuracy and MACs (or parameters). `search_archs` is the small search that belongs to
`--sampler uniform`: the best of several sampled archs for each budget group.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..method.generator import ArchitectureGenerator
from ..method.groups import BudgetGroups
from ..models.calibration import BatchNormCalibration, has_batch_norm, parts
from ..space.core import Arch, SearchSpace
from ..space.resources import MACS, PARAMS
from ..space.supernet import is_supernet
from ..utils.distributed import Ranks
from ..utils.streams import stream, stream_seed
from .accuracy import Loader
from .arch_file import ArchFile
from .archs import NAMES, ArchAccuracy, fingerprint

__all__ = ['COSTS', 'STRATEGIES', 'SearchResult', 'pareto_front', 'search', 'search_archs']

STRATEGIES = ('generator', 'evolutionary', 'random')
COSTS = {resource.keyword: resource for resource in (MACS, PARAMS)}  # what a search limits and weighs
DRAWS = 100  # uniform draws for each arch that is wanted within limits
DRAWN_AT_ONCE = 1000  # of these
STALE = 20  # generations in a row without a new arch that end a search


# -- the Pareto front --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Args:
        front: The Pareto front: rows as in `evaluation.tables`, the cheapest and least accurate first.
        rows: All measured archs, in the order of the search.
        archs: Those of the front, in its order; `save_pretrained(searched=...)` stores them.
        bn_stats: The BatchNorm statistics of the front, for `save_pretrained(bn_stats=...)`; empty without BatchNorm.
        limits: The limits of the search in MACs ('flops') and parameters ('params'), as far as there were any.
    """
    front: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    archs: list[Arch]
    bn_stats: Mapping[Arch, Mapping[str, Tensor]]
    limits: Mapping[str, float]


def search(
        net: nn.Module,
        loader: Loader,
        *,
        generator: ArchitectureGenerator | None = None,
        strategy: str | None = None,
        flops: float | str | None = None,
        params: float | str | None = None,
        cost: str = 'flops',
        evaluations: int = 500,
        population: int = 50,
        groups: BudgetGroups | None = None,
        train_loader: Iterable[Any] | None = None,
        bn_images: int = 2000,
        seed: int = 0,
        autocast: AbstractContextManager | None = None,
        file: str | os.PathLike | None = None,
        progress: bool = True,
) -> SearchResult:
    """Search for the archs of a trained supernet that are most accurate for their cost.

    'evolutionary' is NSGA-II (Deb et al., 2002), from uniformly drawn archs; 'generator' is the same, from archs of the
    generator, its proposals at the budgets of the groups among them; 'random' draws archs uniformly. The result is a
    function of the arguments. The first two need pymoo: pip install 'timm_shiftnas[search]'.

    Args:
        net: The supernet.
        loader: Batches of images [B, C, H, W] and class indices [B], neither trained on nor used to report accuracy.
        generator: The generator of the supernet.
        strategy: 'generator', 'evolutionary' or 'random'; default is 'generator' where there is one.
        flops, params: Upper limits of MACs and of parameters, such as '1.4G' and '6M'; all that are given hold.
        cost: The cost that the front weighs against accuracy: 'flops' or 'params'.
        evaluations: How many archs are measured at most; fewer if no others are found within the limits.
        population: Size of a generation.
        groups: Budget groups of 'generator'; default are those of the space.
        train_loader: Training images for BatchNorm statistics, as for `calibrate_bn`; the same images every time.
        bn_images: Number of them that each arch uses.
        seed: Seed of all that is drawn.
        autocast: Context of the forward passes.
        file: Keep accuracies in this file. A later search with the same file does not measure these archs again. Archs
            are measured in parts of up to 16; an interruption loses the current part.
        progress: Show a bar if the standard error stream is a terminal.

    Raises:
        ValueError: If an argument is out of range, the network is no supernet, or has BatchNorm and there are no
            training images, the loader gives no images, or the file belongs to other weights, images or settings.
        ImportError: If pymoo is missing.
    """
    net = unwrap_model(net)
    if not is_supernet(net):
        raise ValueError(f'{type(net).__name__} is not a supernet; make it one with timm_shiftnas.elastic, or search '
                         'the supernet that it was taken from')
    strategy = strategy or ('evolutionary' if generator is None else 'generator')
    given = {name: value for name, value in dict(flops=flops, params=params).items() if value is not None}
    limits = Limits(net.space, given)
    _check_arguments(net, strategy, generator, cost, evaluations, population, train_loader)
    calibration = BatchNormCalibration(train_loader, bn_images) if has_batch_norm(net) else None
    accuracies = None if file is None else ArchFile(
        file, fingerprint(net, loader, None if calibration is None else train_loader, bn_images, autocast), NAMES,
        'give another one (another --output)')
    accuracy = ArchAccuracy(
        net, loader, next(net.parameters()).device, calibration, file=accuracies, autocast=autocast)
    found: dict[Arch, tuple[float, float]] = {}

    def score(arch: Arch) -> tuple[list[float], list[float]]:
        """Objectives and violations of NSGA-II. An arch beyond a limit is not measured: its violation decides."""
        top1, _ = found.get(arch, (0., 0.))
        return [-top1, limits.counts(arch)[cost]], limits.violations(arch)

    archs = _candidates(strategy, generator, groups, limits, evaluations, population, score, seed)
    stale = 0
    with tqdm(total=evaluations, desc='searching', unit='arch', disable=None if progress else True) as bar:
        while len(found) < evaluations and stale < STALE and (generation := next(archs, None)) is not None:
            new = limits.within(arch for arch in dict.fromkeys(generation) if arch not in found)
            stale = 0 if new else stale + 1
            for part in parts(net, new[:evaluations - len(found)]):
                found |= zip(part, accuracy(part))
                bar.update(len(part))
                if calibration is not None:
                    calibration.statistics.clear()  # of thousands of archs; those of the front are computed again
    rows = [_row(f'arch {number}', arch, limits, *found[arch]) for number, arch in enumerate(found, 1)]
    chosen = pareto_front([(row[COSTS[cost].name], row['top1']) for row in rows])
    front = [dict(rows[index], name=f'front {number}') for number, index in enumerate(chosen, 1)]
    best = [list(found)[index] for index in chosen]
    if calibration is not None:
        calibration.prepare(net, best)
    return SearchResult(front, rows, best, {} if calibration is None else calibration.statistics, limits.limits)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, accuracy) that no other point is at least as good as in both, the cheapest first.

    Of equal points, the first one is taken.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


class Limits:
    """Upper limits of MACs and parameters in a space.

    Args:
        space: A bound search space.
        given: Limits by name, 'flops' and 'params'.

    Raises:
        ValueError: If a limit is not a positive number, or below that of the smallest arch.
    """

    def __init__(self, space: SearchSpace, given: Mapping[str, float | str]) -> None:
        self.space = space
        self._counts: dict[Arch, dict[str, int]] = {}  # a search asks for them again in every generation
        self.limits = {name: COSTS[name].parse(value) for name, value in given.items()}
        for name, least in self.counts(space.smallest).items():
            if least > self.limits.get(name, least):
                raise ValueError(
                    f'{name}={given[name]} is less than the smallest arch of this space has; give {name}={least} '
                    f'({COSTS[name].format(least)}) or more')

    def counts(self, arch: Arch) -> dict[str, int]:
        """MACs and parameters of an arch, by the names of their limits."""
        if arch not in self._counts:
            self._counts[arch] = {name: resource.count(self.space, arch) for name, resource in COSTS.items()}
        return self._counts[arch]

    def violations(self, arch: Arch) -> list[float]:
        """The share by which an arch exceeds each limit; 0 or negative within the limit."""
        counts = self.counts(arch) if self.limits else {}
        return [counts[name] / limit - 1 for name, limit in self.limits.items()]

    def within(self, archs: Iterable[Arch]) -> list[Arch]:
        """Those of some archs that are within all limits. They are counted together, which is far cheaper."""
        left = list(archs)
        for name, limit in self.limits.items() if left else ():
            left = [arch for arch, count in zip(left, COSTS[name].count(self.space, left).tolist()) if count <= limit]
        return left


def _check_arguments(
        net: nn.Module,
        strategy: str,
        generator: ArchitectureGenerator | None,
        cost: str,
        evaluations: int,
        population: int,
        train_loader: Iterable[Any] | None,
) -> None:
    """Raise a `ValueError` for the first wrong argument of `search`."""
    for name, value, allowed in (('strategy', strategy, STRATEGIES), ('cost', cost, tuple(COSTS))):
        if value not in allowed:
            raise ValueError(f'{name}={value!r} is unknown; choose one of {allowed}')
    if strategy == 'generator' and generator is None:
        raise ValueError("strategy='generator' needs the generator of the supernet; give strategy='evolutionary'")
    if not (isinstance(evaluations, int) and isinstance(population, int)) or evaluations < 1 or population < 2:
        raise ValueError(
            f'evaluations={evaluations!r} has to be an int of 1 or more, population={population!r} one of 2 or more')
    if has_batch_norm(net) and train_loader is None:
        raise ValueError('the subnets of this network need BatchNorm statistics: give train_loader, training images')


def _row(name: str, arch: Arch, limits: Limits, top1: float, top5: float) -> dict[str, Any]:
    counts = {COSTS[name].name: count for name, count in limits.counts(arch).items()}
    return dict(counts, name=name, budget=None, top1=top1, top5=top5, arch=arch.to_dict())


# -- candidates --------------------------------------------------------------------------------------------------------


def _candidates(
        strategy: str,
        generator: ArchitectureGenerator | None,
        groups: BudgetGroups | None,
        limits: Limits,
        evaluations: int,
        population: int,
        score: Any,
        seed: int,
) -> Iterator[list[Arch]]:
    """The generations of a strategy. All start with the smallest arch, so that every budget has one within it."""
    noise = stream(seed, 'search', 0)
    if strategy == 'random':
        return iter([[limits.space.smallest, *_uniform(limits, evaluations, noise)]])
    first = [] if generator is None or strategy != 'generator' else _generated(
        generator, groups or BudgetGroups.of_space(limits.space, resource=generator.resource), limits, population,
        noise)
    first = list(dict.fromkeys([limits.space.smallest, *(first or _uniform(limits, population, noise))]))
    try:
        from .nsga2 import evolve
    except ImportError as error:
        raise ImportError(
            f"strategy={strategy!r} needs pymoo ({error}): run pip install 'timm_shiftnas[search]', or give "
            "strategy='random'") from error
    return evolve(limits.space, first[:population], population, score, stream_seed(seed, 'search', 1) % 2 ** 32)


def _uniform(limits: Limits, count: int, noise: torch.Generator) -> list[Arch]:
    """Different archs within limits, drawn uniformly; fewer than `count` where limits leave little room."""
    archs: dict[Arch, None] = {}
    left = DRAWS * count
    while left and len(archs) < count:
        drawn = [limits.space.sample(noise) for _ in range(min(left, DRAWN_AT_ONCE))]
        archs |= dict.fromkeys(limits.within(drawn))
        left -= len(drawn)
    return list(archs)[:count]


def _generated(
        generator: ArchitectureGenerator,
        groups: BudgetGroups,
        limits: Limits,
        count: int,
        noise: torch.Generator,
) -> list[Arch]:
    """Archs of the generator within limits: its proposals at the limits and for the groups, and samples beside them."""
    bounds = {COSTS[name]: min(limit, COSTS[name].range(limits.space)[1]) for name, limit in limits.limits.items()}
    low, most = groups.edges[0], min(bounds.get(groups.resource, groups.edges[-1]), groups.edges[-1])
    proposed = [generator.propose_within(bounds) if bounds else generator.propose(most)]
    proposed += generator.propose_many([budget for budget in groups.budgets if budget <= most])
    sampled = generator.sample(torch.linspace(low, most, 2 * count, dtype=torch.float64), noise)
    every_second_first = [*sampled[::2], *sampled[1::2]]  # so that a part of them is spread over all budgets
    return limits.within(dict.fromkeys([*proposed, *every_second_first]))


# -- the best of some sampled archs for each group ---------------------------------------------------------------------


def search_archs(
        space: SearchSpace,
        generator: ArchitectureGenerator,
        groups: BudgetGroups,
        samples: int,
        net: nn.Module,
        loader: Loader,
        device: torch.device,
        seed: int = 0,
        calibration: BatchNormCalibration | None = None,
        ranks: Ranks = Ranks(),
        **kwargs: Any,
) -> list[Arch]:
    """Find the most accurate of `samples` archs for every group, on held-out data.

    Candidates are uniformly sampled archs within the group, and the generator's proposal for its upper edge. Uniform
    sampling rarely reaches the ends of the range of MACs: missing candidates are sampled from the generator. Of equally
    accurate archs, the one with the most MACs is chosen.

    Args:
        space: The search space.
        generator: Proposes archs for the budgets of the groups.
        groups: Budget groups.
        samples: Candidates per group.
        net: The supernet.
        loader: Batches of held-out images and class indices.
        device: Device of the network.
        seed: Seed of the candidates.
        calibration: Computes the BatchNorm statistics of candidates, if there is BatchNorm.
        ranks: The processes that split the candidates; each has a loader of all images.
        **kwargs: As for `evaluate`.
    """
    accuracy = ArchAccuracy(net, loader, device, calibration, ranks, **kwargs)
    noise = stream(seed, 'search', 0)
    uniform = list(dict.fromkeys(space.sample(noise) for _ in range(DRAWS * samples)))
    resource = groups.resource
    counts = resource.count(space, uniform).tolist()
    best = []
    for low, high in zip(groups.edges, groups.edges[1:]):
        candidates = {generator.propose(high): None}
        candidates |= {arch: None for arch, count in zip(uniform, counts) if low < count <= high}
        if len(candidates) < samples:
            drawn = generator.sample(torch.full((4 * samples,), high, dtype=torch.float64), noise)
            candidates |= {arch: None for arch in drawn if low < resource.count(space, arch) <= high}
        tried = list(candidates)[:samples]
        top1 = dict(zip(tried, (values[0] for values in accuracy(tried))))
        best.append(max(tried, key=lambda arch: (top1[arch], MACS.count(space, arch))))
    return best
