"""Subnets of a supernet: views that share its weights, and extracted networks that own a copy."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

from ..space import Family, SearchSpace, families, family_of, is_supernet, macs
from ..space.core import Arch

__all__ = [
    'Subnet', 'bound_space', 'describe_images', 'extract', 'present_args', 'static_counts', 'static_space',
    'stock_description',
]

LABELS = ('label_names', 'label_descriptions')  # entries of timm's configuration about the classes


class Subnet(nn.Module):
    """A supernet seen at one arch, for callers that can only call `model(x)`; the weights stay shared.

    The inner attribute is called `module`, so that timm's `unwrap_model` sees through the view.
    """

    def __init__(self, module: nn.Module, arch: Arch) -> None:
        super().__init__()
        self.module = module
        self.arch = arch
        self.training = module.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x, self.arch)


def extract(net: nn.Module, arch: Arch) -> nn.Module:
    """Take one subnet out of a supernet: an ordinary static network with its own copy of the weights.

    Args:
        net: A supernet, possibly wrapped (DDP, compile, EMA).
        arch: An arch of its space.

    Returns:
        A network with the mode, dtype and device of `net`; its `arch` attribute is the arch.

    Raises:
        ValueError: If the arch is not in the space, or `net` is not a supernet.
    """
    net = unwrap_model(net)
    if not is_supernet(net):
        known = ', '.join(family.supernet for family in families())
        raise ValueError(f'{type(net).__name__} is not a supernet; extract takes a model such as {known}')
    weight = next(net.parameters())
    subnet = net.build_subnet(arch, device='meta', dtype=weight.dtype)
    with torch.inference_mode(False):  # so that the weights can be trained even if extracted in inference mode
        state = {name: tensor.detach().clone() for name, tensor in net.subnet_state_dict(arch, subnet).items()}
    subnet.load_state_dict(state, strict=True, assign=True)
    for name in {'image_mode', 'upright'} & {*vars(net)}:
        setattr(subnet, name, getattr(net, name))
    # what is not in a state_dict, such as the filters of a blurring pooling, may be on another device
    return subnet.to(weight.device).requires_grad_(True).train(net.training)


def describe_images(
        net: nn.Module,
        class_names: Mapping[int, str] | Sequence[str] | None,
        mode: str | None = None,
        upright: bool | None = None,
) -> None:
    """Record which images a network is trained on; its copies, subnets and saved models keep the record.

    Args:
        net: A supernet or a subnet.
        class_names: Names of the classes by index. They become the `label_names` of timm's configuration: a list, or a
            dict if there are gaps.
        mode: Mode of the PIL images, such as 'RGB'; it becomes the attribute `image_mode`.
        upright: Whether photographs are turned by their EXIF orientation; it becomes the attribute `upright`.
    """
    if isinstance(class_names, Mapping):
        ordered = dict(sorted(class_names.items()))
        class_names = list(ordered.values()) if list(ordered) == list(range(len(ordered))) else ordered
    cfg = {name: value for name, value in net.pretrained_cfg.items() if name not in LABELS}
    net.pretrained_cfg = cfg | dict(num_classes=net.num_classes, label_names=class_names or None)
    if mode:
        net.image_mode = mode
    if upright is not None:
        net.upright = upright


def present_args(net: nn.Module) -> dict[str, Any]:
    """Arguments that create a supernet or a static subnet as it is now: a head may have been reset since."""
    geometry = _family(net).geometry(net)
    return net.model_args | {
        name: geometry[name] for name in ('num_classes', 'global_pool') if name in geometry}


def static_counts(net: nn.Module) -> tuple[int, int]:
    """MACs and parameters of an extracted subnet."""
    return macs(bound_space(net), net.arch), sum(weight.numel() for weight in net.parameters())


def static_space(net: nn.Module) -> SearchSpace:
    """The space of an extracted subnet's own values; unbound, unless it is a network around a static backbone."""
    return net.static_space


def bound_space(net: nn.Module) -> SearchSpace:
    """The space of an extracted subnet's own values, bound to its current geometry."""
    space = static_space(net)
    return space if space.is_bound else space.bind(**_family(net).geometry(net))  # with a head it is


def stock_description(net: nn.Module) -> dict[str, Any] | None:
    """Arguments with which timm builds an extracted subnet without this package; `None` if it cannot."""
    stock = _family(net).stock(static_space(net), net.arch)
    return None if stock is None else dict(
        stock, in_chans=net.in_chans, global_pool=present_args(net)['global_pool'])


def _family(net: nn.Module) -> Family:
    return family_of(net.space if is_supernet(net) else static_space(net))
