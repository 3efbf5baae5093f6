"""The elastic forward of MobileNets: what `ShiftMobileNetSupernet` and elastic pretrained CNNs share."""
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.models import checkpoint
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from ..layers.conv import ConvWidths, keep_activations, normalize, resize
from ..layers.widths import Width, leading, masked
from ..space.core import Arch
from ..space.families import Masks
from ._supernet import TimmSupernet

__all__ = ['POOLS', 'ElasticCnn', 'EndWidths', 'check_pool']

POOLS = ('avg', 'max', 'avgmax')


def check_pool(global_pool: str, num_classes: int) -> None:
    """Raise a `ValueError` for a pooling whose output has another number of channels than its input."""
    if global_pool not in POOLS and (global_pool or num_classes):
        raise ValueError(f"global_pool={global_pool!r} is not supported; choose one of {POOLS}, or '' without classes")


class EndWidths(NamedTuple):
    """What stem and head compute: ints, or masks of full width.

    Attributes:
        stem: Channels of the stem.
        stage: Channels of the last block.
        last: Channels of the last convolution; `None` without one.
    """
    stem: Width
    stage: Width
    last: Width


class ElasticCnn(TimmSupernet):
    """Mixin of supernets that derive from timm's `EfficientNet` or `MobileNetV3` and are made of elastic layers."""

    def block_widths(self, arch: Arch | Masks, like: Tensor) -> list[tuple[nn.Module, ConvWidths]]:
        """The blocks of an arch, first to last, and what each computes; masks with the dtype and device of `like`."""
        raise NotImplementedError

    def end_widths(self, arch: Arch | Masks, like: Tensor) -> EndWidths:
        raise NotImplementedError

    def drops(self, arch: Arch | Masks) -> bool:
        """Whether dropout and drop path apply."""
        return True

    def forward(self, x: Tensor, arch: Arch | Masks | None = None) -> Tensor:
        """Logits [B, num_classes] for images [B, in_chans, H, W].

        Args:
            x: Images; with an arch, they are resized to its resolution.
            arch: The subnet; `None` is the full network on images as they are. Masks compute the same at full width,
                differentiably.
        """
        return self.forward_head(self.forward_features(x, arch), arch=arch)

    def forward_features(self, x: Tensor, arch: Arch | Masks | None = None) -> Tensor:
        if arch is None:
            return super().forward_features(x)
        blocks, ends = self.block_widths(arch, x), self.end_widths(arch, x)
        x = normalize(self.bn1, self.conv_stem(resize(x, arch.resolution), out=ends.stem), True)
        for block, widths in blocks:
            run = partial(block, widths=widths)
            x = checkpoint(run, x) if self.grad_checkpointing else run(x)
        x = masked(x, ends.stage)
        if isinstance(self, MobileNetV3) or isinstance(self.conv_head, nn.Identity):
            return x
        return normalize(self.bn2, self.conv_head(x, out=ends.last), True)

    def forward_head(self, x: Tensor, pre_logits: bool = False, *, arch: Arch | Masks | None = None) -> Tensor:
        if arch is None:
            return super().forward_head(x, pre_logits)
        x, last = self.global_pool(x), self.end_widths(arch, x).last
        if isinstance(self, MobileNetV3):  # the last convolution comes after pooling
            x = self.conv_head(x, out=last)
            x = self.act2(x if isinstance(self.norm_head, nn.Identity) else normalize(self.norm_head, x, True))
        x = masked(x, last)
        if self.global_pool.pool_type:
            x = x.flatten(1)
        if self.drop_rate > 0 and self.drops(arch):
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or isinstance(self.classifier, nn.Identity):
            return x
        return F.linear(x, leading(self.classifier.weight, None, x.shape[1]), self.classifier.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            check_pool(global_pool, num_classes)
        super().reset_classifier(num_classes, global_pool)
        self.model_args.update(num_classes=num_classes, global_pool=self.global_pool.pool_type)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch; tools that replace modules call this for the children, too."""
        super().add_module(name, module)
        keep_activations(self)

    def subnet_cfg(self, arch: Arch) -> dict[str, Any]:
        return dict(
            super().subnet_cfg(arch), input_size=(self.in_chans, arch.resolution, arch.resolution),
            pool_size=(self.output_side(arch.resolution),) * 2)

    def output_side(self, resolution: int) -> int:
        """Height and width of the last block's output for images of a resolution."""
        raise NotImplementedError
