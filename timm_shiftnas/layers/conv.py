"""Elastic convolutions: timm's MobileNet blocks whose forward takes the widths and the kernel size to compute.

The rules are those of `layers.vit`: an int slices, a 0/1 mask of full width multiplies once, where a value is read;
what a block adds to the stream stays unmasked. BatchNorm of a slice uses the statistics of the batch in training and
the first channels of the shared running ones in evaluation, and never writes: what a running mean over different
networks would mean, nobody can say. Only a forward of the full network, without widths, updates them.

Networks are built by timm and made elastic in place: `make_elastic` changes the class of a module, so that names,
shapes and initial weights are timm's by construction.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from torch import Tensor, nn

__all__ = [
    'ConvWidths', 'ElasticBatchNorm', 'ElasticConv2d', 'ElasticConvBnAct', 'ElasticDepthwiseConv2d',
    'ElasticDepthwiseSeparableConv', 'ElasticInvertedResidual', 'ElasticSqueezeExcite',
    'ProjectedDepthwiseSeparableConv', 'ProjectedInvertedResidual', 'Projection', 'elastic_kernel', 'make_elastic',
    'resize',
]


class ConvWidths(NamedTuple):
    """What one block is to compute: ints, or masks of full width.

    Attributes:
        hidden: Channels of the depthwise convolution.
        width_out: Channels to compute; `None` with masks, which compute all.
        kernel_size: Kernel size, or a mask over the sizes of the block, smallest first.
        se: Channels inside squeeze-and-excitation.
        width_in: Mask of the incoming channels, masks only.
        equal: 0-d, masks only: 1 where as many channels come in as go out.
        active: 0-d, masks only: 0 skips the block.
        drop: Whether drop path applies.
    """
    hidden: int | Tensor
    width_out: int | None
    kernel_size: int | Tensor
    se: int | Tensor
    width_in: Tensor | None = None
    equal: Tensor | None = None
    active: Tensor | None = None
    drop: bool = True


def resize(x: Tensor, resolution: int) -> Tensor:
    """Images [B, C, H, W] as squares of another size: bicubic, without antialiasing, as AttentiveNAS does it."""
    if x.shape[-2:] == (resolution, resolution):
        return x
    return F.interpolate(x, size=(resolution, resolution), mode='bicubic', align_corners=False)


def _slice(width: int | Tensor | None) -> int | None:
    """The width to slice to; masks compute at full width."""
    return None if isinstance(width, Tensor) else width


def _channels(mask: Tensor) -> Tensor:
    return mask[:, None, None]


class ElasticConv2d(nn.Conv2d):
    """Convolution that computes its first `out` channels from the first `x.shape[1]` ones."""

    def forward(self, x: Tensor, out: int | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias[:out]
        return F.conv2d(x, self.weight[:out, :x.shape[1]], bias, self.stride, self.padding)


class ElasticDepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of the first `x.shape[1]` channels, at any of its kernel sizes.

    A smaller kernel is the centre of the next larger one, where `matrices` has an entry after that linear map of its
    values, the same for all channels (OFA).

    Attributes:
        kernel_sizes: The sizes, smallest first; the weight has the largest.
        matrices: Learned maps [size * size, size * size] under the names '7to5', '5to3'; may be empty.
    """
    kernel_sizes: tuple[int, ...]
    matrices: nn.ParameterDict

    def kernel(self, size: int, channels: int | None = None) -> Tensor:
        """The weight [channels, 1, size, size]."""
        weight = self.weight[:channels]
        sizes = self.kernel_sizes
        for larger, smaller in zip(sizes[:0:-1], sizes[-2::-1]):
            if larger == size:
                break
            border = (larger - smaller) // 2
            weight = weight[:, :, border:border + smaller, border:border + smaller]
            if len(self.matrices):
                weight = F.linear(weight.flatten(1), self.matrices[f'{larger}to{smaller}']).view_as(weight)
        return weight

    def masked_kernel(self, mask: Tensor) -> Tensor:
        """The weight for a nested mask over the sizes, [C, 1, largest, largest]: a sum of what each size adds."""
        total = torch.zeros_like(self.weight)
        previous = 0
        for size, share in zip(self.kernel_sizes, mask):
            kernel = F.pad(self.kernel(size), [(self.kernel_sizes[-1] - size) // 2] * 4)
            total, previous = total + share * (kernel - previous), kernel
        return total

    def forward(self, x: Tensor, size: int | Tensor | None = None) -> Tensor:
        channels = x.shape[1]
        if isinstance(size, Tensor):
            weight = self.masked_kernel(size)
        else:
            weight = self.kernel(self.kernel_sizes[-1] if size is None else size, channels)
        return F.conv2d(x, weight, None, self.stride, weight.shape[-1] // 2, groups=channels)


class ElasticBatchNorm(BatchNormAct2d):
    """BatchNorm, then activation, of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor, elastic: bool = False) -> Tensor:
        if not elastic:
            return super().forward(x)
        channels = x.shape[1]
        weight, bias = self.weight[:channels], self.bias[:channels]
        if self.training:
            x = F.batch_norm(x, None, None, weight, bias, True, 0., self.eps)
        else:
            x = F.batch_norm(
                x, self.running_mean[:channels], self.running_var[:channels], weight, bias, False, 0., self.eps)
        return self.act(self.drop(x))


class ElasticSqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor, hidden: int | Tensor | None = None) -> Tensor:
        gate = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True), _slice(hidden)))
        if isinstance(hidden, Tensor):
            gate = gate * _channels(hidden)
        return x * self.gate(self.conv_expand(gate, x.shape[1]))


class Projection(nn.Module):
    """Shortcut past a block that changes size or width: 2x2 average pooling, then a 1x1 convolution, where needed.

    Args:
        width_in: Channels.
        width_out: Channels; a convolution where they may differ.
        stride: 1, or 2 for pooling; odd sides get a border of zeros, which count.
        convolution: Whether there is one.
    """

    def __init__(self, width_in: int, width_out: int, stride: int, convolution: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(
            width_in, width_out, 1, bias=False, device=device, dtype=dtype) if convolution else nn.Identity()

    def pool(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return F.avg_pool2d(x, 2, 2, padding=(x.shape[-2] % 2, x.shape[-1] % 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class ProjectedDepthwiseSeparableConv(DepthwiseSeparableConv):
    """timm's block, plus the `Projection` of its input."""

    def forward(self, x: Tensor) -> Tensor:  # not by super(), which TorchScript does not know
        y = self.se(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(y)) + self.projection(x)


class ProjectedInvertedResidual(InvertedResidual):
    """timm's block, plus the `Projection` of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv_pw(x))
        y = self.se(self.bn2(self.conv_dw(y)))
        return self.bn3(self.conv_pwl(y)) + self.projection(x)


class _ElasticBlock:
    """What both elastic blocks share: the order of a forward, and the shortcut.

    Attributes:
        projection: The shortcut of a block that changes size or width, or `None`.
        may_skip: Whether there is an identity shortcut at some widths only: where as many channels come in as go out.
    """

    def forward(self, x: Tensor, widths: ConvWidths | None = None) -> Tensor:
        elastic = widths is not None
        hidden, out, kernel_size, se, width_in, equal, active, drop = widths or ConvWidths(None, None, None, None)
        read = x if width_in is None else x * _channels(width_in)
        y = self._depthwise(x, read, hidden, kernel_size, elastic)
        if isinstance(hidden, Tensor):
            y = y * _channels(hidden)
        if isinstance(self.se, SqueezeExcite):
            y = self.se(y, se)
        y = self._project(y, out, elastic)
        if drop:
            y = self.drop_path(y)
        if active is not None:
            y = y * active
        if self.projection is not None:
            return y + self._shortcut(x, read, y.shape[1], equal)
        if self.may_skip and elastic:
            # what lies beyond the narrower width is read by nothing
            if equal is not None:
                return y + equal * F.pad(x, [0, 0, 0, 0, 0, y.shape[1] - x.shape[1]])
            return y + x if x.shape[1] == y.shape[1] else y
        return y + x if self.has_skip else y

    def _shortcut(self, x: Tensor, read: Tensor, out: int, equal: Tensor | None) -> Tensor:
        """The input at the size and width of the output: itself where as many channels go out, else projected."""
        projection = self.projection
        if equal is None:
            x = projection.pool(x)
            return x if x.shape[1] == out or isinstance(projection.conv, nn.Identity) else projection.conv(x, out)
        # the stream passes on unmasked; channels beyond the narrower width are read by nothing
        same = projection.pool(F.pad(x, [0, 0, 0, 0, 0, out - x.shape[1]]))
        if isinstance(projection.conv, nn.Identity):
            return same
        return equal * same + (1 - equal) * projection.conv(projection.pool(read), out)


class ElasticDepthwiseSeparableConv(_ElasticBlock, DepthwiseSeparableConv):
    """timm's depthwise separable block at the given widths; without widths, the full block."""

    def _depthwise(self, x: Tensor, read: Tensor, hidden, kernel_size, elastic: bool) -> Tensor:
        # channels do not mix here: their mask is that of `hidden`, after the activation
        return self.bn1(self.conv_dw(x, kernel_size), elastic)

    def _project(self, y: Tensor, out: int | None, elastic: bool) -> Tensor:
        return self.bn2(self.conv_pw(y, out), elastic)


class ElasticInvertedResidual(_ElasticBlock, InvertedResidual):
    """timm's inverted residual block at the given widths; without widths, the full block."""

    def _depthwise(self, x: Tensor, read: Tensor, hidden, kernel_size, elastic: bool) -> Tensor:
        y = self.bn1(self.conv_pw(read, _slice(hidden)), elastic)
        return self.bn2(self.conv_dw(y, kernel_size), elastic)

    def _project(self, y: Tensor, out: int | None, elastic: bool) -> Tensor:
        return self.bn3(self.conv_pwl(y, out), elastic)


class ElasticConvBnAct(ConvBnAct):
    """timm's convolution with BatchNorm and activation, computing its first `out` channels."""

    def forward(self, x: Tensor, out: int | None = None, elastic: bool = False) -> Tensor:
        return self.bn1(self.conv(x, out), elastic)


_ELASTIC = {
    BatchNormAct2d: ElasticBatchNorm, SqueezeExcite: ElasticSqueezeExcite, ConvBnAct: ElasticConvBnAct,
    DepthwiseSeparableConv: ElasticDepthwiseSeparableConv, InvertedResidual: ElasticInvertedResidual,
}


def make_elastic(module: nn.Module) -> None:
    """Turn timm's modules into elastic ones, in place: weights, names and hooks stay."""
    for child in module.modules():
        if type(child) is nn.Conv2d:
            child.__class__ = ElasticConv2d if child.groups == 1 else ElasticDepthwiseConv2d
            if child.groups > 1:
                child.kernel_sizes, child.matrices = (child.kernel_size[0],), nn.ParameterDict()
        elif type(child) in _ELASTIC:
            child.__class__ = _ELASTIC[type(child)]
            if isinstance(child, _ElasticBlock):
                child.projection, child.may_skip = None, False


def elastic_kernel(conv: ElasticDepthwiseConv2d, sizes: Sequence[int], transform: bool) -> None:
    """Let a depthwise convolution have several kernel sizes, smaller ones by learned matrices if `transform`."""
    conv.kernel_sizes = tuple(sizes)
    like = dict(device=conv.weight.device, dtype=conv.weight.dtype)
    for larger, smaller in zip(sizes[:0:-1], sizes[-2::-1]) if transform else ():
        conv.matrices[f'{larger}to{smaller}'] = nn.Parameter(torch.eye(smaller ** 2, **like))
