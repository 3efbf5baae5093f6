"""Widths of elastic layers: an int slices, a 0/1 mask of full width multiplies, `None` is the full width."""
from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['Width', 'check_channels', 'leading', 'masked', 'prefix']

Width = int | Tensor | None


def masked(x: Tensor, mask: Width, dim: int = 1) -> Tensor:
    """Multiply a tensor by a mask along one dimension, or by a 0-d mask as a whole.

    An int or `None` changes nothing: the layer before has computed that many channels. Most masks act here; kernel
    sizes, shortcuts and the moments of LayerNorm have masks in their own formulas.
    """
    if not isinstance(mask, Tensor):
        return x
    if mask.dim() == 0:
        return x * mask
    return x * mask.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))


def prefix(width: Width) -> int | None:
    """The number of channels to compute, as a slice bound; `None` for masks, which compute all."""
    return None if isinstance(width, Tensor) else width


def leading(weight: Tensor, *sizes: int | None) -> Tensor:
    """The first entries of a tensor along its first dimensions; `None` and the full size take all.

    Taking all returns the tensor itself: autograd would copy the gradient of a slice. A compiled graph always slices,
    so that the full size needs no separate graph.
    """
    if not torch.compiler.is_compiling() and all(
            size is None or size == full for size, full in zip(sizes, weight.shape, strict=False)):
        return weight
    return weight[tuple(map(slice, sizes))]


def check_channels(images: Tensor, channels: int) -> None:
    """Raise a `ValueError` unless images [B, C, H, W] have as many channels as a network reads."""
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(
            f'a batch of shape {list(images.shape)} for a network that takes [batch, {channels}, height, width]; '
            'convert the images, or create the network with in_chans=')
