"""`ElasticFamily`: the interface between `elastic` and a family of elastic pretrained networks."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..space.core import SearchSpace

__all__ = ['ElasticFamily']


@dataclass(frozen=True)
class ElasticFamily:
    """One family of bases.

    Args:
        bases: Classes of timm whose objects it may make elastic.
        modules: Modules of timm with such networks, by their names in timm's registry.
        why_not: `why_not(net)`: the first part of a network of these classes that is not elastic, or `None`.
        space: `space(net, img_size)`: the space that is derived from a base; `img_size` is the size of its images if
            `sized`, else `None`.
        make_elastic: `make_elastic(net, space, model_args)` turns a base into the supernet, in place.
        sized: Whether `img_size` is the resolution of the largest arch, and not an argument of timm's network.
        filter_fn: timm's adaptation of a checkpoint to a network of these classes.
        levels: Feature maps that `features_only=True` returns by default.
    """
    bases: tuple[type[nn.Module], ...]
    modules: tuple[str, ...]
    why_not: Callable[[nn.Module], str | None]
    space: Callable[[nn.Module, int | None], SearchSpace]
    make_elastic: Callable[[nn.Module, SearchSpace, dict[str, Any]], nn.Module]
    sized: bool = False
    filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None
    levels: int | tuple[int, ...] = 3
