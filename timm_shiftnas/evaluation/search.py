"""The search of one-shot NAS: the best of several sampled archs for each budget."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..method.generator import ArchitectureGenerator
from ..method.groups import BudgetGroups
from ..models.calibration import BatchNormCalibration
from ..space import complexity
from ..space.core import Arch, SearchSpace
from ..utils.distributed import Ranks
from ..utils.streams import stream
from .accuracy import Loader, at_arch, evaluate

__all__ = ['search_archs']


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
    noise = stream(seed, 'search', 0)
    uniform = list(dict.fromkeys(space.sample(noise) for _ in range(100 * samples)))
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
        mine = {arch: evaluate(at_arch(net, arch, calibration), loader, device, **kwargs)[0]
                for arch in ranks.shard(tried)}
        top1 = {arch: value for part in ranks.gather(mine) for arch, value in part.items()}
        best.append(max(tried, key=lambda arch: (top1[arch], complexity.macs(space, arch))))
    return best
