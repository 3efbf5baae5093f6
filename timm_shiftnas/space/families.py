"""The registry of families. A family is one entry: everything that differs between elastic ViTs, MobileNets, ...

To add a family, write its space builder, polynomials and masks in one file of this package (or in your own), and end
it with `register_family(Family(...))`. Its networks derive from `Supernet` and are registered with timm. Nothing else
in the package asks which family a space belongs to.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .core import Arch, OneHots, SearchSpace

if TYPE_CHECKING:
    from .operators import OperatorTable

__all__ = ['Family', 'Masks', 'families', 'family_of', 'register_family', 'space_from_dict', 'space_of_family']


class Masks(Protocol):
    """An arch as 0/1 masks of full width, which a supernet takes in place of an `Arch`."""

    def to(self, like: torch.Tensor) -> Masks:
        """The same masks with the dtype and device of a tensor."""


@dataclass(frozen=True)
class Family:
    """One family of supernets.

    Args:
        name: The `family` of its spaces, in memory and in saved files.
        space: Builder of its spaces; `SearchSpace.to_dict` writes its arguments.
        masks: `masks(space, one_hots)`: the masks of one arch, for one-hots [number of values].
        geometry: `geometry(net)`: what `macs` and `params` read from `SearchSpace.geometry`, of a supernet or a static
            subnet. Holds `num_classes` and `global_pool` if its networks can change them.
        supernet: Name in timm's registry of a supernet that takes `space=`.
        subnet: Name in timm's registry of the static network that takes `arch=`.
        operators: `operators(space, one_hots)`: the table of the networks' operators, from which bytes of weights, peak
            memory and latency are computed. It may be left out if these are not needed.
        macs: `macs(space, one_hots, convention)`: multiply-accumulates per image, a float64 tensor [...] for one-hots
            [..., number of values], as a polynomial in them. Default: their sum over the operators.
        params: `params(space, one_hots)`: number of parameters, likewise.
        stock: `stock(space, arch)`: JSON-able description of a subnet that plain timm can build, or `None`.
        resolution: `resolution(arch)`: height and width of the images that a subnet takes, if its arch says so.
        bn_recipe: `bn_recipe(space)`: how BatchNorm statistics of subnets are computed; see `calibrate_bn`.
        channels: `channels(space, stage)`: the number of channels after a stage, as a `Size`. If the geometry has
            `features`, which are stages in ascending order, the network ends with the last of these stages; `macs`,
            `params` and `operators` leave out what follows.
    """
    name: str
    space: Callable[..., SearchSpace]
    masks: Callable[[SearchSpace, OneHots], Masks]
    geometry: Callable[[Any], dict[str, Any]]
    supernet: str
    subnet: str
    operators: Callable[[SearchSpace, OneHots], OperatorTable] | None = None
    macs: Callable[[SearchSpace, OneHots, str], torch.Tensor] | None = None
    params: Callable[[SearchSpace, OneHots], torch.Tensor] | None = None
    stock: Callable[[SearchSpace, Arch], dict[str, Any] | None] = lambda space, arch: None
    resolution: Callable[[Arch], int | None] = lambda arch: None
    bn_recipe: Callable[[SearchSpace], str] = lambda space: 'attentivenas'
    channels: Callable[[SearchSpace, int], Any] | None = None

    def operator_table(self, space: SearchSpace, one_hots: OneHots, resource: str = 'resource') -> OperatorTable:
        """Operators of archs of a bound space. For a network around a backbone: those of the backbone.

        Args:
            space: The space.
            one_hots: The archs, [..., number of values].
            resource: What is computed from them, for error messages.

        Raises:
            ValueError: If the family has no table of them.
        """
        if self.operators is None:
            raise ValueError(
                f'the family {self.name!r} describes no operators, so their {resource} is unknown; give '
                'register_family(Family(..., operators=...))')
        return self.operators(space, one_hots)

    def check_classifier(self, space: SearchSpace, resource: str) -> None:
        """Raise a `ValueError` if the networks of a bound space are backbones, or networks around backbones.

        Peak memory and latency depend on what runs behind the feature maps, which is the user's code.
        """
        if 'features' in space.geometry:
            raise ValueError(
                f'the {resource} of a backbone, or of a network around one, is unknown: its operators are not those of '
                'a classifier; give a budget of MACs (flops=), parameters (params=) or bytes of weights (size=), or '
                'the resource macs, params or size, and measure the extracted network')

    def count_macs(self, space: SearchSpace, one_hots: OneHots, convention: str = 'fused') -> torch.Tensor:
        """Multiply-accumulates per image, [...], of archs given as one-hots [..., number of values]."""
        if self.macs is not None:
            return self.macs(space, one_hots, convention)
        return self.operator_table(space, one_hots, 'macs').column('macs').sum(-1)

    def count_params(self, space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
        """Number of parameters, [...], of archs given as one-hots [..., number of values]."""
        if self.params is not None:
            return self.params(space, one_hots)
        table = self.operator_table(space, one_hots, 'params')
        return (table.column('matrix') + table.column('vectors')).sum(-1)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add a family, or replace the one of the same name."""
    _FAMILIES[family.name] = family


def families() -> list[Family]:
    """All registered families."""
    return list(_FAMILIES.values())


def family_of(space: SearchSpace) -> Family:
    """The entry of a space's family."""
    return _FAMILIES[space.family]


def space_of_family(space: SearchSpace | Mapping[str, Any], name: str) -> SearchSpace:
    """A space, given as such or as the dict of its `to_dict`, for a network of the family `name`.

    Raises:
        ValueError: If it is not a space, or a space of another family.
    """
    space = space if isinstance(space, SearchSpace) else space_from_dict(space)
    if space.family != name:
        raise ValueError(
            f'this network needs a {name} space, got family={space.family!r}; '
            f'type timm.create_model({family_of(space).supernet!r}, space=...)')
    return space


def space_from_dict(data: Mapping[str, Any]) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote.

    Raises:
        ValueError: If `data` is not the dict of a space.
    """
    fields = dict(data) if isinstance(data, Mapping) else {}
    name, geometry = fields.pop('family', None), fields.pop('geometry', None)
    if name not in list(_FAMILIES) or not isinstance(geometry, (Mapping, type(None))):
        raise ValueError(f'not a search space: family={name!r}, geometry={geometry!r}; '
                         f'known families: {", ".join(_FAMILIES)}')
    try:
        space = _FAMILIES[name].space(**fields)
    except TypeError as error:
        raise ValueError(f'not a search space of the family {name}: {error}') from None
    return space if geometry is None else space.bind(**geometry)
