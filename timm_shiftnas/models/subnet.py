"""Subnets of a supernet: views that share its weights, and extracted networks that own a copy."""
from __future__ import annotations

import torch
from timm.utils import unwrap_model
from torch import nn

from ..space import is_supernet
from ..space.core import Arch

__all__ = ['Subnet', 'extract']


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
