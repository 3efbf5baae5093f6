"""The elastic forward of MobileNets, shared by `ShiftMobileNetSupernet` and elastic pretrained CNNs."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.models._features import feature_take_indices
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
    """Widths of stem and head: ints, or masks of full width.

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
        """The blocks of an arch, first to last, and their widths; masks have the dtype and device of `like`."""
        raise NotImplementedError

    def end_widths(self, arch: Arch | Masks, like: Tensor) -> EndWidths:
        raise NotImplementedError

    def stage_mask(self, masks: Masks, stage: int) -> Tensor:
        """Mask of the output channels of a stage, counted as in timm: 0 is the stem, 1 the first stage of blocks."""
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
            x = self.run_block(block, x, widths=widths)
        return self._last_convolution(masked(x, ends.stage), ends)

    def _last_convolution(self, x: Tensor, ends: EndWidths) -> Tensor:
        """Run the last convolution, if the network has it between the blocks and pooling."""
        if isinstance(self, MobileNetV3) or isinstance(self.conv_head, nn.Identity):
            return x
        return normalize(self.bn2, self.conv_head(x, out=ends.last), True)

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            extra_blocks: bool = False,
            *,
            arch: Arch | Masks | None = None,
    ) -> Any:
        """timm's `forward_intermediates` of one subnet; other arguments and return values are timm's.

        Args:
            x: Images; with an arch, they are resized to its resolution.
            arch: The subnet; `None` is the full network on images as they are. With masks, maps have the full width
                and are zero in the inactive channels.
        """
        if arch is None:
            return super().forward_intermediates(
                x, indices, norm, stop_early, output_fmt, intermediates_only, extra_blocks)
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        stages = range(len(self.blocks) + 1) if extra_blocks else self.stage_ends
        taken = {stages[i] for i in feature_take_indices(len(stages), indices)[0]}
        widths, ends, maps = dict(self.block_widths(arch, x)), self.end_widths(arch, x), []

        def take(x: Tensor, stage: int) -> None:
            if stage in taken:
                maps.append(x if isinstance(arch, Arch) else masked(x, self.stage_mask(arch, stage).to(x)))

        x = normalize(self.bn1, self.conv_stem(resize(x, arch.resolution), out=ends.stem), True)
        take(x, 0)
        blocks = self.blocks[:max(taken)] if stop_early else self.blocks
        for stage, modules in enumerate(blocks, start=1):
            for block in filter(widths.__contains__, modules):
                x = self.run_block(block, x, widths=widths[block])
            take(x, stage)
        if intermediates_only:
            return maps
        return self._last_convolution(masked(x, ends.stage), ends) if len(blocks) == self.stage_ends[-1] else x, maps

    def keep_features(self, indices: int | list[int] | None, norm: bool) -> list[int]:
        """Remove the head and all stages after the last feature map, in place: the network becomes a backbone.

        Returns:
            `indices` counted from the first feature map.
        """
        return self.prune_intermediate_layers(indices, prune_norm=True)

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
        """Add a module as torch does; tools that replace modules call this for the children, too."""
        super().add_module(name, module)
        keep_activations(self)

    def subnet_cfg(self, arch: Arch) -> dict[str, Any]:
        return dict(
            super().subnet_cfg(arch), input_size=(self.in_chans, arch.resolution, arch.resolution),
            pool_size=(self.output_side(arch.resolution),) * 2)

    def output_side(self, resolution: int) -> int:
        """Height and width of the last block's output for images of a resolution."""
        raise NotImplementedError
