"""Networks on the meta device: their shapes, without memory and without values."""
from __future__ import annotations

from typing import Any

import torch
from timm.models import create_model
from torch import nn
from torch.overrides import TorchFunctionMode

# clamp_ and erfinv_ are steps of timm's trunc_normal_
_RANDOM = frozenset([
    nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.uniform_,
    nn.init.xavier_normal_, nn.init.xavier_uniform_, torch.Tensor.clamp_, torch.Tensor.erfinv_, torch.Tensor.normal_,
    torch.Tensor.uniform_])


class SkipRandomInit(TorchFunctionMode):
    """A context in which tensors on the meta device are not initialized at random.

    They have no values, but torch would take up to a millisecond per tensor to find the shape of the result: most of
    the time in which a network is created to load weights into. Tensors on other devices are initialized as usual.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _RANDOM:
            tensor = args[0] if args else kwargs['tensor']
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))


def create_on_meta(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model(name, **kwargs)` on the meta device, whatever device the arguments name."""
    with SkipRandomInit():
        return create_model(name, **{**kwargs, 'device': 'meta'})
