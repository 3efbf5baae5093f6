"""Uniform sampling, the one-shot baseline (Guo et al., ECCV 2020, arXiv 1904.00420; AutoFormer, ICCV 2021).

Each choice of an arch is drawn independently and uniformly, the depth first: `SearchSpace.sample`. Nothing is learned.
"""
from __future__ import annotations

from ...space.core import Arch, SearchSpace
from ...utils.streams import stream
from .base import Sampler, Step

__all__ = ['UniformSampler', 'draw_uniform']


class UniformSampler(Sampler):
    """Draws archs uniformly."""
    searches = True

    def draw(self, step: Step, count: int) -> list[Arch]:
        return draw_uniform(self.space, self.config.seed, step, count)


def draw_uniform(space: SearchSpace, seed: int, step: Step, count: int) -> list[Arch]:
    """Uniformly drawn archs of a step."""
    noise = stream(seed, 'arch', step.micro_step)
    return [space.sample(noise) for _ in range(count)]
