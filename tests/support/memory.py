"""What torch really allocates in a forward pass."""
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatedBytes(TorchDispatchMode):
    """Bytes of the storages that operators of torch create, while the tensors that use them exist.

    Attributes:
        now: Bytes of those that exist.
        peak: The most bytes that existed after an operator.
        at_peak: Name of that operator, and the sizes of all storages that existed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.at_peak: tuple[str, list[int]] = '', []

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.add(x)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, (str(func), sorted(self.sizes.values(), reverse=True))
        return result


@torch.no_grad()
def allocated_bytes(net: nn.Module, images: Tensor) -> AllocatedBytes:
    """What a forward pass in eval mode allocates, the images included; weights are not."""
    net.eval()
    with AllocatedBytes() as allocated:
        allocated.add(images)
        net(images)
    return allocated


def weight_bytes(net: nn.Module) -> dict[str, int]:
    """Bytes of the tensors in the file of a network: in single and half precision, and with weights in int8."""
    state, convolutions = net.state_dict().values(), (nn.Conv2d, nn.ConvTranspose2d)
    layers = [each for each in net.modules() if isinstance(each, (nn.Linear, *convolutions))]
    entries = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.out_channels if isinstance(layer, convolutions) else layer.out_features for layer in layers)
    numbers = sum(each.numel() for each in state if each.is_floating_point())
    others = sum(each.nbytes for each in state if not each.is_floating_point())
    return dict(fp32=4 * numbers + others, fp16=2 * numbers + others,
                int8=entries + 4 * (rows + numbers - entries) + others)
