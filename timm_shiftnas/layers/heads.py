"""Parts of heads for detection and segmentation: layers that read any prefix of the channels of a feature map.

The channels of a feature map follow the arch. A head becomes elastic by its first layers, which read the first
`x.shape[1]` of their input channels and have a fixed number of output channels. Everything behind them is plain torch.

    neck = torchvision.ops.FeaturePyramidNetwork(backbone.feature_info.channels(), 256)
    make_inputs_elastic(*(block[0] for block in neck.inner_blocks))
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .vit import ElasticLinear
from .widths import leading

__all__ = [
    'FeatureSum', 'PrefixConv2d', 'PrefixConvTranspose2d', 'SimpleFeaturePyramid', 'elastic_inputs', 'input_channels',
    'keep_inputs', 'make_inputs_elastic',
]


class PrefixConv2d(nn.Conv2d):
    """Convolution that reads the first `x.shape[1]` of its input channels; all of its outputs are computed."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, leading(self.weight, None, x.shape[1]), self.bias)


class PrefixConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution that reads the first `x.shape[1]` of its input channels."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # an output size cannot be given
        return F.conv_transpose2d(
            x, leading(self.weight, x.shape[1]), self.bias, self.stride, self.padding, self.output_padding,  # type: ignore[arg-type]
            self.groups, self.dilation)


# plain layer: its elastic class, and the dimension of its weight that consists of input channels
_INPUTS: dict[type[nn.Module], tuple[type[nn.Module], int, str]] = {
    nn.Conv2d: (PrefixConv2d, 1, 'in_channels'), nn.ConvTranspose2d: (PrefixConvTranspose2d, 0, 'in_channels'),
    nn.Linear: (ElasticLinear, 1, 'in_features')}


def make_inputs_elastic(*layers: nn.Module) -> None:
    """Let layers read any prefix of their input channels, in place: weights, names and hooks stay.

    Args:
        *layers: The layers of a head that read feature maps: `Conv2d` and `ConvTranspose2d` with one group, `Linear`.

    Raises:
        ValueError: For any other layer.
    """
    for layer in layers:
        if type(layer) not in _INPUTS or getattr(layer, 'groups', 1) > 1:
            raise ValueError(
                f'{layer!r} cannot read a prefix of channels; let a Conv2d or ConvTranspose2d of one group, or a '
                'Linear, read the feature map first')
        layer.__class__ = _INPUTS[type(layer)][0]


def elastic_inputs(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a module that read any prefix of their input channels, with their names."""
    classes = tuple(elastic for elastic, _, _ in _INPUTS.values())
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, classes))


def input_channels(layer: Any) -> int:
    """The largest number of channels that a layer reads."""
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def keep_inputs(layer: Any, channels: int | None) -> None:
    """Turn an elastic layer into a plain one with its first input channels, in place; `None` keeps all."""
    plain, (_, dim, name) = next(item for item in _INPUTS.items() if isinstance(layer, item[1][0]))
    layer.__class__ = plain
    if channels is not None:
        weight = layer.weight.detach().narrow(dim, 0, channels).clone()
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
        setattr(layer, name, channels)


# -- necks -------------------------------------------------------------------------------------------------------------


class FeatureSum(nn.Module):
    """The sum of feature maps at the size of the first, each projected to the same number of channels.

    It is the decoder of Semantic FPN (Kirillov et al., CVPR 2019, arXiv 1901.02446) without its further convolutions.
    A single map gets a linear projection of its pixels.

    Args:
        channels: Largest channels of each map, the largest map first; `backbone.feature_info.channels()`.
        out_channels: Channels of the sum.
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(PrefixConv2d(each, out_channels, 1) for each in channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, out_channels, H, W] for maps [B, C_l, H_l, W_l], with H and W those of the first."""
        first, *others = (layer(each) for layer, each in zip(self.inputs, maps, strict=True))
        for other in others:
            first = first + F.interpolate(other, size=first.shape[-2:], mode='bilinear', align_corners=False)
        return first


class SimpleFeaturePyramid(nn.Module):
    """Maps at several strides from the last map of a plain ViT (ViTDet, Li et al., ECCV 2022, arXiv 2203.16527).

    The map is enlarged 4 and 2 times by transposed convolutions, kept, or halved by max pooling. A 1x1 and a 3x3
    convolution, each with LayerNorm, follow. For patches of 16 pixels, the scales 4, 2, 1 and 0.5 give strides 4 to 32.

    Args:
        channels: Largest channels of the map.
        out_channels: Channels of every map of the pyramid.
        scales: Sizes of its maps relative to the given one, from 4, 2, 1 and 0.5.
    """

    def __init__(self, channels: int, out_channels: int = 256, scales: Sequence[float] = (4, 2, 1, .5)) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        resize: dict[float, Callable[[], list[nn.Module]]] = {
            4: lambda: [PrefixConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half), nn.GELU(),
                        nn.ConvTranspose2d(half, quarter, 2, 2), nn.Conv2d(quarter, out_channels, 1, bias=False)],
            2: lambda: [PrefixConvTranspose2d(channels, half, 2, 2), nn.Conv2d(half, out_channels, 1, bias=False)],
            1: lambda: [PrefixConv2d(channels, out_channels, 1, bias=False)],
            .5: lambda: [nn.MaxPool2d(2), PrefixConv2d(channels, out_channels, 1, bias=False)]}
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resize[scale](), LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels))
            for scale in scales)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, out_channels, scale * H, scale * W] for the list of one map [B, C, H, W]."""
        x, = maps
        return [level(x) for level in self.levels]
