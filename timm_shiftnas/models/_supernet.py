"""`TimmSupernet`: the mixin of supernets that are registered with timm."""
from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import FrozenBatchNormAct2d
from timm.models import checkpoint, create_model
from torch import Tensor, nn

from ..space import SearchSpace, Supernet, family_of
from ..space.core import Arch
from ._meta import SkipRandomInit
from .subnet import LABELS

__all__ = ['TimmSupernet', 'plain_state_dict']

# entries of timm's configuration that say where the weights of a supernet come from, or hold for its size only
_OF_THE_SUPERNET = (
    'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'test_input_size')


class TimmSupernet(Supernet):
    """Mixin of supernets whose subnets are created by timm, under the name that their family registers.

    A subclass also derives from `torch.nn.Module` and sets the attributes below. Its static networks take `arch=` and
    the arguments in `subnet_args`, and have the attributes `arch`, `static_space` (the space of the arch's own values)
    and `model_args`.

    Attributes:
        unbound_space: The search space without geometry.
        model_args: Arguments that create the network as it is now, `space` aside.
        untrained_cfg: timm's configuration for subnets of a network that timm has not created.
        grad_checkpointing: timm's switch, `set_grad_checkpointing`.
    """
    unbound_space: SearchSpace
    model_args: dict[str, Any]
    untrained_cfg: Mapping[str, Any] = {}
    grad_checkpointing: bool

    @property
    def space(self) -> SearchSpace:
        """The search space, bound to the current geometry of the network."""
        return self.unbound_space.bind(**family_of(self.unbound_space).geometry(self))

    def run_block(self, block: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        """`block(x, **kwargs)`; with timm's gradient checkpointing, backward computes its activations again."""
        run = partial(block, **kwargs)
        return checkpoint(run, x) if self.grad_checkpointing else run(x)

    def build_subnet(self, arch: Arch, **kwargs: Any) -> nn.Module:
        """The static network of an arch, with its own weights; users call `timm_shiftnas.extract`."""
        self.unbound_space.validate(arch)
        with SkipRandomInit():  # for `device='meta'`: only the shapes are needed, to slice the weights
            return create_model(
                family_of(self.unbound_space).subnet, arch=arch.to_dict(), pretrained_cfg=self.subnet_cfg(arch),
                **{**self.subnet_args(arch), **kwargs})

    def subnet_args(self, arch: Arch) -> dict[str, Any]:
        """Arguments of the static network, `arch` aside."""
        return self.model_args

    def subnet_cfg(self, arch: Arch) -> dict[str, Any]:
        """timm's configuration of the static network."""
        cfg = getattr(self, 'pretrained_cfg', None) or self.untrained_cfg
        dropped = _OF_THE_SUPERNET if cfg.get('num_classes') == self.num_classes else (*_OF_THE_SUPERNET, *LABELS)
        cfg = {name: value for name, value in cfg.items() if name not in dropped}
        return dict(cfg, architecture=family_of(self.unbound_space).subnet, num_classes=self.num_classes)

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch, with the names and shapes of its static network: leading slices."""
        shared = plain_state_dict(self)
        return {
            name: shared[name][tuple(slice(size) for size in weight.shape)]
            for name, weight in subnet.state_dict().items()}


def plain_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a network as if no other kind of BatchNorm had replaced its own.

    Frozen ones do not count batches, and split ones have further statistics that only training uses.
    """
    state = net.state_dict()
    for prefix, module in net.named_modules():
        if isinstance(module, FrozenBatchNormAct2d):
            state[f'{prefix}.num_batches_tracked'] = torch.tensor(0, device=module.running_mean.device)
    return {name: weight for name, weight in state.items() if '.aux_bn.' not in name}
