"""Elastic convolutions: timm's MobileNet blocks with a forward that takes the widths and kernel size to compute.

The rules are those of `layers.vit`: an int slices, a 0/1 mask of full width multiplies once, where a value is read;
what a block adds to the stream stays unmasked.

BatchNorm of a slice uses the statistics of the batch in training, and the first channels of the shared running ones in
evaluation. Running statistics are not updated: an average over different subnets is meaningless. Only a forward of the
full network, without widths, updates them.

Networks are built by timm and made elastic in place: `make_elastic` changes the class of a module, so that names,
shapes and initial weights are timm's by construction. Tools may later replace each BatchNorm by another module of the
same kind (timm's `freeze`, `convert_sync_batchnorm` of timm and of torch, ...): `normalize` runs them all.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    BlurPool2d,
    Conv2dSame,
    ConvNormAct,
    DropPath,
    LayerScale2d,
    SyncBatchNormAct,
    pad_same,
)
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.instancenorm import _InstanceNorm

from .widths import Width, check_channels, leading, masked, prefix

__all__ = [
    'Bypass', 'ConvWidths', 'ElasticBatchNorm', 'ElasticConv2d', 'ElasticConvBnAct', 'ElasticDepthwiseConv2d',
    'ElasticDepthwiseSeparableConv', 'ElasticEdgeResidual', 'ElasticInvertedResidual', 'ElasticProjection',
    'ElasticSqueezeExcite', 'ElasticStem', 'IdentityShortcut', 'NoShortcut', 'ProjectedDepthwiseSeparableConv',
    'ProjectedInvertedResidual', 'Projection', 'WidthShortcut', 'centre', 'elastic_kernel', 'keep_activations',
    'make_elastic', 'normalize', 'resize',
]


class ConvWidths(NamedTuple):
    """Widths of one block: ints, or masks of full width; the defaults are timm's full block.

    Attributes:
        hidden: Channels of the depthwise convolution.
        width_out: Channels to compute; `None` with masks, which compute all.
        kernel_size: Kernel size, or a mask over the sizes of the block, smallest first.
        se: Channels inside squeeze-and-excitation.
        width_in: Mask of the incoming channels, masks only.
        equal: 0-d, masks only: 1 if as many channels come in as go out.
        active: 0-d, masks only: 0 skips the block.
        drop: Whether drop path applies.
        elastic: Whether the block is part of a subnet, which updates no running statistics.
    """
    hidden: Width = None
    width_out: int | None = None
    kernel_size: Width = None
    se: Width = None
    width_in: Tensor | None = None
    equal: Tensor | None = None
    active: Tensor | None = None
    drop: bool = True
    elastic: bool = True


FULL = ConvWidths(elastic=False)


def resize(x: Tensor, resolution: int) -> Tensor:
    """Resize square images [B, C, H, W]: bicubic, without antialiasing, as AttentiveNAS does it."""
    height, width = x.shape[-2:]
    if height == width == resolution:
        return x
    if height != width:
        raise ValueError(
            f'images of {height} x {width} pixels are not square, but a subnet of resolution {resolution} takes '
            f'squares; crop or resize them to {max(height, width)} x {max(height, width)} before')
    return F.interpolate(x, size=(resolution, resolution), mode='bicubic', align_corners=False)


# -- layers ------------------------------------------------------------------------------------------------------------


def centre(weight: Tensor, size: int) -> Tensor:
    """The inner kernel [..., size, size] of a weight [..., larger, larger]."""
    border = (weight.shape[-1] - size) // 2
    return weight[..., border:border + size, border:border + size] if border else weight


class ElasticConv2d(nn.Conv2d):
    """Convolution that computes its first `out` channels from the first `x.shape[1]` ones, at any of its kernel sizes.

    A smaller kernel is the centre of the next larger one. If `matrices` has an entry for the two sizes, the centre's
    values then pass through that linear map, which is the same for all channels (OFA).

    Attributes:
        kernel_sizes: The sizes, smallest first; the weight has the largest.
        matrices: Learned maps [size * size, size * size] with the names '7to5', '5to3', or `None`.
    """
    kernel_sizes: tuple[int, ...]
    matrices: nn.ParameterDict | None

    def sliced(self, out: int | None, channels: int | None) -> Tensor:
        """The weight of the first `out` channels, computed from the first `channels`."""
        return leading(self.weight, out, None if channels is None else channels // self.groups)

    def kernel(self, size: int | None = None, out: int | None = None, channels: int | None = None) -> Tensor:
        """The weight [out, channels, size, size]."""
        weight = self.sliced(out, channels)
        for larger, smaller in pairwise(self.kernel_sizes[::-1]):
            if size is None or larger == size:
                break
            weight = centre(weight, smaller)
            if self.matrices is not None:
                weight = F.linear(weight.flatten(2), self.matrices[f'{larger}to{smaller}']).view_as(weight)
        return weight

    def masked_kernel(self, mask: Tensor) -> Tensor:
        """The weight for a nested mask over the sizes, [out, in, largest, largest]: a sum of what each size adds."""
        total = torch.zeros_like(self.weight)
        previous: Tensor | int = 0
        for size, share in zip(self.kernel_sizes, mask, strict=True):
            kernel = F.pad(self.kernel(size), [(self.kernel_sizes[-1] - size) // 2] * 4)
            total, previous = total + share * (kernel - previous), kernel
        return total

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with padding that keeps the size, the stride aside."""
        return F.conv2d(x, weight, bias, self.stride, weight.shape[-1] // 2, 1, x.shape[1] // weight.shape[1])

    def forward(self, x: Tensor, *, out: Width = None, size: Width = None) -> Tensor:
        out = prefix(out)
        if isinstance(size, Tensor):
            weight = self.masked_kernel(size)
        else:
            weight = self.kernel(size, out, x.shape[1])
        return self.convolve(x, weight, None if self.bias is None else leading(self.bias, out))


class ElasticStem(ElasticConv2d):
    """`ElasticConv2d` on images, whose channels are not elastic."""

    def forward(self, x: Tensor, *, out: Width = None, size: Width = None) -> Tensor:
        check_channels(x, self.in_channels)
        return super().forward(x, out=out, size=size)


class ElasticDepthwiseConv2d(ElasticConv2d):
    """Depthwise convolution of the first `x.shape[1]` channels, at any of its kernel sizes."""

    def sliced(self, out: int | None, channels: int | None) -> Tensor:
        return leading(self.weight, channels)


class _SamePadding(ElasticConv2d):
    """TensorFlow's padding, which depends on the size of the image; a smaller kernel is still the centre."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = x.shape[1] // weight.shape[1]
        x = pad_same(x, list(weight.shape[-2:]), list(self.stride))
        return F.conv2d(x, weight, bias, self.stride, 0, 1, groups)


class ElasticConv2dSame(_SamePadding):
    """`ElasticConv2d` with TensorFlow's padding."""


class ElasticStemSame(_SamePadding, ElasticStem):
    """`ElasticStem` with TensorFlow's padding."""


class ElasticDepthwiseConv2dSame(_SamePadding, ElasticDepthwiseConv2d):
    """`ElasticDepthwiseConv2d` with TensorFlow's padding."""


class ElasticBatchNorm(BatchNormAct2d):
    """BatchNorm, then activation, of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor, *, elastic: bool = False) -> Tensor:
        if not elastic:
            return super().forward(x)
        channels = x.shape[1]
        weight, bias = leading(self.weight, channels), leading(self.bias, channels)
        if self.training:
            x = F.batch_norm(x, None, None, weight, bias, True, 0., self.eps)
        else:
            mean, var = self.running_mean[:channels], self.running_var[:channels]  # type: ignore[index]
            x = F.batch_norm(x, mean, var, weight, bias, False, 0., self.eps)
        return self.act(self.drop(x))


def normalize(norm: nn.Module, x: Tensor, elastic: bool) -> Tensor:
    """Normalise and activate the first `x.shape[1]` channels, with a BatchNorm or the module that has replaced it.

    Modules other than `ElasticBatchNorm` run with slices of their weights and statistics. They may update the
    statistics in a forward of the full network; for an arch they get copies.

    Raises:
        ValueError: If `norm` is not a kind of BatchNorm: extracted subnets have BatchNorms.
    """
    if isinstance(norm, ElasticBatchNorm):
        return norm(x, elastic=elastic)
    if not elastic:
        return norm(x)
    if getattr(norm, 'running_mean', None) is None or isinstance(norm, _InstanceNorm):
        raise ValueError(
            f'{type(norm).__name__} cannot take the place of a BatchNorm in a supernet, because it has no running '
            'statistics per channel; use a kind of BatchNorm: frozen, synchronised or split')
    state = {name: weight[:x.shape[1]] for name, weight in norm.named_parameters()}
    state |= {name: buffer[:x.shape[1]].clone() if buffer.dim() else buffer.clone()
              for name, buffer in norm.named_buffers()}
    return functional_call(norm, state, (x,))


class ElasticSqueezeExcite(SqueezeExcite):
    """timm's squeeze-and-excitation of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor, *, hidden: Width = None) -> Tensor:
        gate = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True), out=hidden))
        return x * self.gate(self.conv_expand(masked(gate, hidden), out=x.shape[1]))


class ElasticConvNormAct(ConvNormAct):
    """timm's convolution with BatchNorm, activation and pooling, computing its first `out` channels."""

    def forward(self, x: Tensor, *, out: Width = None, size: Width = None, elastic: bool = False) -> Tensor:
        x = normalize(self.bn, self.conv(x, out=out, size=size), elastic)
        return x if self.aa is None else self.aa(x)


class ElasticBlurPool2d(BlurPool2d):
    """timm's blurring pooling of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.pad(x, self.padding, mode=self.pad_mode)  # type: ignore[arg-type]
        return F.conv2d(x, leading(self.filt, channels), stride=self.stride, groups=channels)  # type: ignore[arg-type]


class ElasticLayerScale2d(LayerScale2d):
    """timm's LayerScale of the first `x.shape[1]` channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * leading(self.gamma, x.shape[1]).view(1, -1, 1, 1)


# -- shortcuts ---------------------------------------------------------------------------------------------------------


class Projection(nn.Module):
    """Shortcut past a block that changes size or width: 2x2 average pooling, then a 1x1 convolution, where needed.

    Args:
        width_in: Channels.
        width_out: Channels of the output.
        stride: 1, or 2 for pooling; odd sides get a border of zeros, which count in the average.
        convolution: Whether there is a convolution; without one, as many channels come in as go out.
    """

    def __init__(self, width_in: int, width_out: int, stride: int, convolution: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(
            width_in, width_out, 1, bias=False, device=device, dtype=dtype) if convolution else nn.Identity()

    def pool(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        height, width = x.shape[-2], x.shape[-1]
        if torch.jit.is_tracing():  # sizes are then tensors, and exporters accept no tensor as padding
            height, width = int(height), int(width)
        return F.avg_pool2d(x, 2, 2, padding=(height % 2, width % 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class _Shortcut(nn.Module):
    """Base class of the shortcuts of elastic blocks.

    `forward(x, *, read, branch, widths)` takes the input of the block, the same input with its channels masked, the
    output of the branch, and the widths. It returns the output of the block.
    """

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:
        raise NotImplementedError


class NoShortcut(_Shortcut):
    """No shortcut: the output is the branch alone."""

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:
        return branch


class Bypass(_Shortcut):
    """The branch, or the input if the block is inactive."""

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:
        return branch if widths.active is None else branch + (1 - widths.active) * x


class IdentityShortcut(_Shortcut):
    """Identity shortcut for blocks that keep size and width in every arch."""

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:
        return branch + x


class WidthShortcut(_Shortcut):
    """Identity shortcut for blocks that keep the size; it exists only in archs where the width stays the same."""

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:
        if widths.equal is not None:
            return branch + widths.equal * _pad_channels(x, branch.shape[1])
        return branch + x if x.shape[1] == branch.shape[1] else branch


class ElasticProjection(Projection):
    """`Projection` where widths differ, and pooling alone in archs where as many channels come in as go out."""

    def forward(self, x: Tensor, *, read: Tensor, branch: Tensor, widths: ConvWidths) -> Tensor:  # type: ignore[override]
        out = branch.shape[1]
        if isinstance(self.conv, nn.Identity):
            return branch + self.pool(x)
        if widths.equal is None:
            x = self.pool(x)
            return branch + (x if x.shape[1] == out else self.conv(x, out=out))
        same = self.pool(_pad_channels(x, out))
        return branch + (widths.equal * same + (1 - widths.equal) * self.conv(self.pool(read), out=out))


def _pad_channels(x: Tensor, channels: int) -> Tensor:
    """The stream at another full width, unmasked: nothing reads the channels beyond the narrower one."""
    return F.pad(x, [0, 0, 0, 0, 0, channels - x.shape[1]])


# -- static blocks -----------------------------------------------------------------------------------------------------


class ProjectedDepthwiseSeparableConv(DepthwiseSeparableConv):
    """timm's block, plus the `Projection` of its input."""

    def forward(self, x: Tensor) -> Tensor:  # TorchScript cannot compile a call of super()
        y = self.se(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(y)) + self.projection(x)  # type: ignore[operator]


class ProjectedInvertedResidual(InvertedResidual):
    """timm's block, plus the `Projection` of its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv_pw(x))
        y = self.se(self.bn2(self.conv_dw(y)))
        return self.bn3(self.conv_pwl(y)) + self.projection(x)  # type: ignore[operator]


# -- elastic blocks ----------------------------------------------------------------------------------------------------


class _ElasticBlock(nn.Module):
    """An elastic block: the branch that its subclasses define, and a shortcut.

    Attributes:
        projection: The shortcut, a module of one of the classes above. Checkpoints hold the weights of an
            `ElasticProjection` with this name.
    """
    projection: nn.Module
    has_skip: bool
    drop_path: DropPath | nn.Identity
    se: nn.Module

    def forward(self, x: Tensor, *, widths: ConvWidths = FULL) -> Tensor:
        read = masked(x, widths.width_in)
        y = self.expand(x, read, widths)
        y = masked(self.depthwise(y, widths), widths.hidden)
        y = self.squeeze_excite(y, widths)
        y = self.project(y, widths)
        y = self.drop_path(y) if widths.drop and self.has_skip else y
        return self.shortcut(x, read=read, branch=masked(y, widths.active), widths=widths)

    @property
    def shortcut(self) -> nn.Module:
        return self.projection

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        """Expand the channels of the stream, `x` unmasked and `read` masked, to those of the depthwise convolution."""
        raise NotImplementedError

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        raise NotImplementedError

    def squeeze_excite(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return x if isinstance(self.se, nn.Identity) else self.se(x, hidden=widths.se)

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        raise NotImplementedError


class ElasticDepthwiseSeparableConv(_ElasticBlock, DepthwiseSeparableConv):
    """timm's depthwise separable block at the given widths; without widths, the full block."""

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        return x  # channels do not mix before the mask of `hidden`, which is the same: masks multiply once

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn1, self.conv_dw(x, size=widths.kernel_size), widths.elastic)

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn2, self.conv_pw(x, out=widths.width_out), widths.elastic)


class ElasticInvertedResidual(_ElasticBlock, InvertedResidual):
    """timm's inverted residual block at the given widths; without widths, the full block."""

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn1, self.conv_pw(read, out=widths.hidden), widths.elastic)

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        x = normalize(self.bn2, self.conv_dw(x, size=widths.kernel_size), widths.elastic)
        return self.aa(x)  # type: ignore[misc]

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn3, self.conv_pwl(x, out=widths.width_out), widths.elastic)


class ElasticEdgeResidual(_ElasticBlock, EdgeResidual):
    """timm's inverted residual block with one convolution in place of two, at the given widths."""

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        x = normalize(self.bn1, self.conv_exp(read, out=widths.hidden, size=widths.kernel_size), widths.elastic)
        return self.aa(x)  # type: ignore[misc]

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return x

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn2, self.conv_pwl(x, out=widths.width_out), widths.elastic)


class ElasticConvBnAct(_ElasticBlock, ConvBnAct):
    """timm's convolution with BatchNorm and activation at the given widths; it has no inner width."""

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        return read

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return x

    def squeeze_excite(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return x

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        return normalize(self.bn1, self.conv(x, out=widths.width_out, size=widths.kernel_size), widths.elastic)


class ElasticUniversalInvertedResidual(_ElasticBlock, UniversalInvertedResidual):
    """timm's universal inverted residual block at the given widths.

    The kernel size is that of the inner depthwise convolution; without that, of the first one.
    """

    def expand(self, x: Tensor, read: Tensor, widths: ConvWidths) -> Tensor:
        if isinstance(self.dw_start, ConvNormAct):  # channels do not mix before the mask
            size = None if isinstance(self.dw_mid, ConvNormAct) else widths.kernel_size
            read = masked(self.dw_start(x, size=size, elastic=widths.elastic), widths.width_in)
        return self.pw_exp(read, out=widths.hidden, elastic=widths.elastic)

    def depthwise(self, x: Tensor, widths: ConvWidths) -> Tensor:
        if isinstance(self.dw_mid, nn.Identity):
            return x
        return self.dw_mid(x, size=widths.kernel_size, elastic=widths.elastic)

    def project(self, x: Tensor, widths: ConvWidths) -> Tensor:
        x = self.pw_proj(x, out=widths.width_out, elastic=widths.elastic)
        x = x if isinstance(self.dw_end, nn.Identity) else self.dw_end(x, elastic=widths.elastic)
        return self.layer_scale(x)


# -- from timm's modules -----------------------------------------------------------------------------------------------


_ELASTIC: dict[type[nn.Module], type[nn.Module]] = {
    BatchNormAct2d: ElasticBatchNorm, SqueezeExcite: ElasticSqueezeExcite, ConvBnAct: ElasticConvBnAct,
    DepthwiseSeparableConv: ElasticDepthwiseSeparableConv, InvertedResidual: ElasticInvertedResidual,
    EdgeResidual: ElasticEdgeResidual, Projection: ElasticProjection, BlurPool2d: ElasticBlurPool2d,
    ConvNormAct: ElasticConvNormAct, LayerScale2d: ElasticLayerScale2d,
    UniversalInvertedResidual: ElasticUniversalInvertedResidual,
}
_CONVOLUTIONS: dict[type[nn.Module], tuple[type[ElasticConv2d], type[ElasticConv2d], type[ElasticConv2d]]] = {
    nn.Conv2d: (ElasticConv2d, ElasticDepthwiseConv2d, ElasticStem),
    Conv2dSame: (ElasticConv2dSame, ElasticDepthwiseConv2dSame, ElasticStemSame),
}


def make_elastic(module: nn.Module) -> None:
    """Turn timm's modules into elastic ones, in place: weights, names and hooks stay.

    Blocks get the shortcut that timm's have; assign `projection` where the widths of archs require another one.
    """
    for name, child in list(module.named_modules()):
        if type(child) in _CONVOLUTIONS:
            plain, depthwise, stem = _CONVOLUTIONS[type(child)]
            separate = child.groups == child.in_channels > 1
            child.__class__ = stem if name == 'conv_stem' else depthwise if separate else plain
            child.kernel_sizes, child.matrices = (child.kernel_size[0],), None
        elif type(child) in _ELASTIC:
            child.__class__ = _ELASTIC[type(child)]
            if isinstance(child, _ElasticBlock):
                child.projection = IdentityShortcut() if child.has_skip else NoShortcut()


def keep_activations(module: nn.Module) -> None:
    """Keep the activations of norms that torch's `SyncBatchNorm.convert_sync_batchnorm` has replaced, in place.

    It moves the activation of timm's norms into a module whose forward does not call it.
    """
    for child in module.modules():
        if type(child) is nn.SyncBatchNorm and hasattr(child, 'act'):
            child.__class__ = SyncBatchNormAct


def elastic_kernel(conv: ElasticConv2d, sizes: Sequence[int], transform: bool = False) -> None:
    """Give a convolution several kernel sizes; if `transform`, learned matrices lead to the smaller ones."""
    conv.kernel_sizes = tuple(sizes)
    if transform and len(sizes) > 1:
        conv.matrices = nn.ParameterDict()
        for larger, smaller in pairwise(sizes[::-1]):
            conv.matrices[f'{larger}to{smaller}'] = nn.Parameter(
                torch.eye(smaller ** 2, device=conv.weight.device, dtype=conv.weight.dtype))
