"""The supernet interface: `Supernet` and `is_supernet`."""
from __future__ import annotations

from typing import Any

from timm.utils import unwrap_model
from torch import nn

from . import complexity
from .core import Arch, SearchSpace

__all__ = ['Supernet', 'is_supernet']


class Supernet:
    """Mixin of the networks that own the weights of every arch of a search space.

    A network derives from it and from `torch.nn.Module`, and defines `space`, `forward(x, arch)`, `build_subnet` and
    `subnet_state_dict` (`models.TimmSupernet` defines all but `forward` for networks that are registered with timm).
    The arch is an argument of `forward` and is stored nowhere.
    """

    @property
    def space(self) -> SearchSpace:
        """The search space, bound to the current geometry of the network."""
        raise NotImplementedError

    def macs(self, arch: Arch, convention: str = 'fused') -> int:
        """Multiply-accumulates per image of the subnet, at its own resolution; see `complexity.macs`."""
        return complexity.macs(self.space, arch, convention)

    def params(self, arch: Arch) -> int:
        """Number of parameters of the extracted subnet."""
        return complexity.params(self.space, arch)

    def build_subnet(self, arch: Arch, **kwargs: Any) -> Any:
        """The static network of an arch, with its own weights; users call `timm_shiftnas.extract`."""
        raise NotImplementedError

    def subnet_state_dict(self, arch: Arch, subnet: Any) -> dict[str, Any]:
        """The shared weights of an arch, with the names and shapes of its static network."""
        raise NotImplementedError


def is_supernet(net: Any) -> bool:
    """Whether a network is a supernet, possibly wrapped (DDP, compile, EMA)."""
    return isinstance(net, nn.Module) and isinstance(unwrap_model(net), Supernet)
