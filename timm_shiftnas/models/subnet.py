"""Subnets of a supernet: views that share its weights, and extracted networks that own a copy."""
from __future__ import annotations

from typing import Any

import torch
from timm.models import create_model
from timm.utils import unwrap_model
from torch import nn

from ..space import SearchSpace, is_supernet, shiftformer_space
from ..space.core import Arch
from .shiftmobilenet import arch_space, stock_blocks

__all__ = ['Subnet', 'extract', 'present_args', 'static_counts', 'static_space', 'stock_description']


class Subnet(nn.Module):
    """A supernet seen at one arch, for callers that can only say `model(x)`; the weights stay shared.

    The inner attribute is called `module`, so that timm's `unwrap_model` sees through the view.
    """

    def __init__(self, module: nn.Module, arch: Arch) -> None:
        super().__init__()
        self.module = module
        self.arch = arch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x, self.arch)


def extract(net: nn.Module, arch: Arch) -> nn.Module:
    """Take one subnet out of a supernet: an ordinary static network with its own copy of the weights.

    Args:
        net: A supernet, possibly wrapped (DDP, compile, EMA).
        arch: An arch of its space.

    Returns:
        A network in the same mode, dtype and place as `net`; its `arch` attribute tells the arch.

    Raises:
        ValueError: If the arch is not in the space, or `net` is not a supernet.
    """
    net = unwrap_model(net)
    if not is_supernet(net):
        raise ValueError(f'{type(net).__name__} is not a supernet; extract takes a model such as shiftformer_supernet')
    weight = next(net.parameters())
    subnet = net.build_subnet(arch, device='meta', dtype=weight.dtype)
    with torch.inference_mode(False):  # its weights are to be trained, wherever it was taken out
        state = {name: tensor.detach().clone() for name, tensor in net.subnet_state_dict(arch, subnet).items()}
    subnet.load_state_dict(state, strict=True, assign=True)
    return subnet.requires_grad_(True).train(net.training)


def present_args(net: nn.Module) -> dict[str, Any]:
    """What reconstructs a network as it is now: a head may have been reset since it was made."""
    pool = getattr(net.global_pool, 'pool_type', net.global_pool)
    return dict(net.model_args, num_classes=net.num_classes, global_pool=pool)


def static_counts(net: nn.Module) -> tuple[int, int]:
    """MACs and parameters of an extracted subnet."""
    args = {name: value for name, value in present_args(net).items() if name != 'structure'}
    space = static_space(net)
    supernet = create_model(f'{space.family}_supernet', space=space, device='meta', **args)
    return supernet.macs(net.arch), sum(weight.numel() for weight in net.parameters())


def static_space(net: nn.Module) -> SearchSpace:
    """The space of a subnet's own values."""
    if 'structure' in net.model_args:
        return arch_space(net.arch, net.model_args['structure'])[0]
    values = {
        name: sorted(set(value)) if isinstance(value, list) else [value] for name, value in net.arch.to_dict().items()}
    return shiftformer_space(**values)


def stock_description(net: nn.Module) -> dict[str, Any] | None:
    """How plain timm builds an extracted subnet without this package; `None` if it cannot."""
    if net.model_args.get('structure', {}).get('shortcut') != 'identity':
        return None
    return dict(
        stock_blocks(*arch_space(net.arch, net.model_args['structure'])), in_chans=net.in_chans,
        global_pool=present_args(net)['global_pool'])
