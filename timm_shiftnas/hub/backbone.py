"""Saved networks around an elastic backbone: what is recorded of them, and how they are built again."""
from __future__ import annotations

from collections.abc import Callable
from reprlib import repr as short
from typing import Any

from torch import nn

from ..models import ElasticBackbone, ElasticModel, StaticBackbone, backbone_of, static_model
from ..space import SearchSpace, complexity, is_supernet
from ..space.heads import HeadCounts
from ..utils.text import one_line
from .format import KEY, Backbone

__all__ = ['Build', 'build_around', 'build_backbone', 'describe_backbone', 'ready']

Build = Callable[[Any], nn.Module]  # a network around a backbone


def describe_backbone(net: nn.Module, network: nn.Module) -> Backbone:
    """The record of a network that contains a backbone.

    Args:
        net: An `ElasticModel` or an `ElasticBackbone`, or one of their subnets.
        network: The same; of an `ElasticModel`, the network inside.
    """
    path, backbone = backbone_of(network)
    geometry = (net.space if is_supernet(net) else net.static_space).geometry  # type: ignore[union-attr, operator]
    # layers of a ViT count from the last one, which archs of every depth have
    stages = list(geometry['features'])
    return Backbone(
        out_indices=stages if stages[-1] < 0 else list(backbone.out_indices), norm=backbone.norm, path=path,
        network=None if network is backbone else type(network).__name__,
        **{name: list(geometry[name]) if name in geometry else None for name in HeadCounts._fields})


def build_backbone(
        about: Backbone, net: nn.Module, where: str) -> tuple[ElasticBackbone | StaticBackbone, SearchSpace]:
    """The backbone of a record, and its space, bound to the head of the record.

    Args:
        about: The record.
        net: The supernet or static subnet that timm creates, changed in place.
        where: Name of the file in error messages.

    Raises:
        ValueError: If the record does not describe a backbone of this network.
    """
    try:
        backbone: Any = (ElasticBackbone if is_supernet(net) else StaticBackbone)(
            net, about['out_indices'], norm=about['norm'])
        space = backbone.space if is_supernet(net) else backbone.static_space
        head = {name: about[name] for name in HeadCounts._fields if about.get(name) is not None}
        space = space.bind(**space.geometry, **head)
        complexity.macs(space, space.smallest), complexity.params(space, space.smallest)
    except Exception as error:  # timm and torch raise many types; the record is always the cause
        raise ValueError(
            f'{where} has an unusable entry {KEY}.backbone: {short(about)} ({one_line(error)})') from error
    return backbone, space


def build_around(net: nn.Module, about: Backbone | None, build: Build | None, name: str) -> nn.Module:
    """The network of a record around its backbone `net`; `ready` completes it when it has its weights.

    Raises:
        ValueError: If `build` is missing or needless, or builds no such network.
    """
    if about is None or about['network'] is None:
        if build is not None:
            raise ValueError(f'{name} holds no network around a backbone; leave out network=')
        return net
    if build is None:
        raise ValueError(
            f'{name} holds a {about["network"]} around a backbone, and its code is not saved; give the function that '
            f'builds it: network=lambda backbone: {about["network"]}(backbone, ...)')
    network = build(net)
    if backbone_of(network) != (about['path'], net):
        raise ValueError(
            f'network= must build a {about["network"]} whose {about["path"]!r} is the backbone that it is given, and '
            f'it returns a {type(network).__name__} with {backbone_of(network)[0]!r}')
    return network


def ready(network: nn.Module) -> nn.Module:
    """A network that has its weights, as a supernet or as a subnet."""
    backbone = backbone_of(network)[1]
    if network is backbone:
        return network
    return ElasticModel(network) if is_supernet(backbone) else static_model(network)
