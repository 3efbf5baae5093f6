"""PreNAS (Wang et al., ICML 2023, arXiv 2304.14636): train only archs that a zero-cost score prefers before training.

The range of sizes is cut into intervals. In each, the arch of the highest score at initialisation is the preferred one;
training draws from these archs alone, and they are the result: there is no search.

As in the authors' published script (github.com/tinyvision/PreNAS, `01_zero_shot_search.sh`):

* The score is the selectivity `sum |w * dL/dw|` over the weights of an arch (SNIP, Lee et al., ICLR 2019). The gradient
  is that of the largest arch, for L the sum of its outputs on random normal images, so that no data is needed.
* One arch is preferred in each interval.

Different here:

* Intervals are the budget groups, of MACs and not of parameters. The candidates of an interval are archs of the fitted
  generator; the authors' script enumerates how often each choice occurs, and gives the larger choices to the layers of
  highest score.
* Each preferred arch is equally likely. Their training script draws an embedding dimension and a depth first, then an
  arch that has both.
* All weights count. Theirs leave out the class token and what depends on positions.

Supernets whose smaller archs are not slices of the largest, such as Once-for-all's with their kernel transforms, get a
score of the transformed products.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...space.core import Arch
from ...utils.streams import stream
from ..signals import frozen, full_precision
from .base import Sampler, Step

__all__ = ['PreNASSampler', 'selectivity']

CANDIDATES, IMAGES = 16, 64  # archs compared in an interval; images behind the gradient


class PreNASSampler(Sampler):
    """Draws from the preferred archs, one of each budget group."""
    proposes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preferred: list[Arch] = []

    def update(self, step: Step) -> None:
        """Choose the preferred archs before the first update."""
        if not self.preferred:
            scores = selectivity(step.net, step.images, stream(self.config.seed, 'prenas', 0))
            chosen = [max(archs, key=lambda arch: score_of(scores, arch)) for archs in self.candidates()]
            self.preferred = step.ranks.gather(chosen)[0]  # machines may round differently

    def draw(self, step: Step, count: int) -> list[Arch]:
        noise = stream(self.config.seed, 'arch', step.micro_step)
        return [self.preferred[index] for index in torch.randint(len(self.preferred), (count,), generator=noise)]

    def candidates(self) -> list[list[Arch]]:
        """The archs of each group that are compared: samples of the generator, and its proposal."""
        noise = stream(self.config.seed, 'prenas', 1)
        found = []
        for low, high in zip(self.groups.edges, self.groups.edges[1:]):
            drawn = self.generator.sample(torch.linspace(low, high, CANDIDATES, dtype=torch.float64), noise)
            within = [arch for arch in drawn if low < self.groups.resource.count(self.space, arch) <= high]
            found.append(list(dict.fromkeys([self.generator.propose(high), *within])))
        return found

    def archs_for_budgets(self) -> list[Arch]:
        return self.preferred or super().archs_for_budgets()

    def state_dict(self) -> dict[str, Any]:
        return dict(super().state_dict(), preferred=[arch.to_dict() for arch in self.preferred])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.preferred = [self.space.from_dict(arch) for arch in state['preferred']]


def selectivity(net: nn.Module, images: torch.Tensor, noise: torch.Generator) -> nn.Module:
    """A copy of a supernet with `|w * dL/dw|` in place of each weight w; `L` is the sum of the largest arch's outputs.

    Args:
        net: The supernet, unwrapped.
        images: Images [B, C, H, W] of the right shape, whose values are not used.
        noise: Source of the random normal images.
    """
    random = torch.randn((IMAGES, *images.shape[1:]), generator=noise).to(images.device, next(net.parameters()).dtype)
    trained = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    with frozen(net), full_precision(images.device), torch.enable_grad():
        values = torch.autograd.grad(net(random).sum(), list(trained.values()), allow_unused=True)
    gradients, scores = dict(zip(trained, values)), copy.deepcopy(net)
    with torch.no_grad():
        for name, weight in scores.named_parameters():
            gradient = gradients.get(name)  # None: frozen, or unused
            weight.copy_(torch.zeros_like(weight) if gradient is None else (weight * gradient).abs())
    return scores


@torch.no_grad()
def score_of(scores: Any, arch: Arch) -> float:
    """The selectivity of an arch: the sum of its part of the result of `selectivity`."""
    subnet = scores.build_subnet(arch, device='meta')
    names = {name for name, _ in subnet.named_parameters()}
    state = scores.subnet_state_dict(arch, subnet)
    return sum(float(tensor.double().sum()) for name, tensor in state.items() if name in names)
