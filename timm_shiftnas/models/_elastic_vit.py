"""The elastic forward of vision transformers, shared by `ShiftFormerSupernet` and `ElasticVisionTransformer`."""
from __future__ import annotations

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.vit import BlockWidths, ElasticLayerNorm, ElasticLinear
from ..layers.widths import Width, masked
from ..space.core import Arch
from ..space.shiftformer import ShiftFormerMasks
from ._supernet import TimmSupernet

__all__ = ['ElasticViT']


class ElasticViT(TimmSupernet):
    """Mixin of supernets that derive from timm's `VisionTransformer` and are made of elastic layers."""

    def _blocks_of(self, arch: Arch) -> list[tuple[nn.Module, BlockWidths]]:
        """The blocks of an arch, first to last, and their widths."""
        raise NotImplementedError

    def forward(self, x: Tensor, arch: Arch | ShiftFormerMasks | None = None) -> Tensor:
        """Logits [B, num_classes] of one subnet for images [B, in_chans, H, W].

        Args:
            x: Images.
            arch: The subnet; `None` is the largest one. Masks compute the same at full width, differentiably.
        """
        return self.forward_head(self.forward_features(x, arch), arch=arch)

    def forward_features(self, x: Tensor, arch: Arch | ShiftFormerMasks | None = None) -> Tensor:
        blocks = self._widths(arch.to(x) if isinstance(arch, ShiftFormerMasks) else arch)
        embed = blocks[0][1].embed_dim
        x = self._tokens(x, embed)
        index = self.relative_index(x)
        for block, widths in blocks:
            x = self.run_block(block, x, index=index, widths=widths)
        return _norm(self.norm, x, embed)

    def _tokens(self, x: Tensor, embed: Width) -> Tensor:
        """The tokens that the first block reads, for images."""
        x = self._pos_embed(self.patch_embed(x, out=embed))
        if isinstance(self.norm_pre, ElasticLayerNorm):
            x = self.norm_pre.normalized(x, embed)  # what is added to the residual stream stays unmasked
        return x

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            *,
            arch: Arch | ShiftFormerMasks | None = None,
    ) -> Any:
        """timm's `forward_intermediates` of one subnet; other arguments and return values are timm's.

        Args:
            indices: Layers of the subnet: -1 is the last one at every depth.
            arch: The subnet; `None` is the largest one. With masks, maps have the full width and are zero in the
                inactive channels.
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        masks = arch.to(x) if isinstance(arch, ShiftFormerMasks) else None
        blocks = self._widths(arch if masks is None else masks)
        ends = _layer_ends(masks, len(blocks))
        taken = {ends[i] for i in feature_take_indices(len(ends), indices)[0]}
        embed = blocks[0][1].embed_dim
        x = self._tokens(x, embed)
        index, maps = self.relative_index(x), []
        for count, (block, widths) in enumerate(blocks[:max(taken)] if stop_early else blocks, start=1):
            x = self.run_block(block, x, attn_mask=attn_mask, is_causal=is_causal, index=index, widths=widths)
            if count in taken:
                normed = norm and isinstance(self.norm, ElasticLayerNorm)
                maps.append(self.norm(x, width=embed) if normed else masked(x, embed, -1))
        count = self.num_prefix_tokens
        prefixes, maps = [tokens[:, :count] for tokens in maps], [tokens[:, count:] for tokens in maps]
        if output_fmt == 'NCHW':
            maps = [tokens.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for tokens in maps]
        if output_dict:
            features = {} if intermediates_only else dict(image_features=_norm(self.norm, x, embed))
            more = dict(image_intermediates_prefix=prefixes) if count and return_prefix_tokens else {}
            return dict(image_intermediates=maps, **more, **features)
        if count and return_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (_norm(self.norm, x, embed), maps)

    def keep_features(self, indices: int | list[int] | None, norm: bool) -> list[int]:
        """Remove the head, and the final norm unless `norm`, in place: the network becomes a backbone.

        Returns:
            `indices` counted from the last layer, so that they mean the same at every depth.
        """
        taken, _ = feature_take_indices(len(self.blocks), indices)
        self.prune_intermediate_layers(1, prune_norm=not norm)
        self.model_args['final_norm'] = not isinstance(self.norm, nn.Identity)
        return [index - len(self.blocks) for index in taken]

    def forward_head(
            self, x: Tensor, pre_logits: bool = False, *, arch: Arch | ShiftFormerMasks | None = None) -> Tensor:
        embed = arch.embed_dim.to(x) if isinstance(arch, ShiftFormerMasks) else None
        x = self.pool(x) if self.attn_pool is None else self._attention_pool(x, embed)
        x = _norm(self.fc_norm, x, embed)
        normed = self.attn_pool is None and isinstance(self.norm, ElasticLayerNorm)
        if not normed and not isinstance(self.fc_norm, ElasticLayerNorm):
            x = masked(x, embed, -1)  # no norm has masked what the head reads
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _attention_pool(self, x: Tensor, embed: Width) -> Tensor:
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens:]
        if not isinstance(self.norm, ElasticLayerNorm):
            x = masked(x, embed, -1)  # no norm has masked what the pooling reads
        return self.attn_pool(x, width=embed)

    def _widths(self, arch: Arch | ShiftFormerMasks | None) -> list[tuple[nn.Module, BlockWidths]]:
        """The blocks of an arch or of masks, first to last, and their widths."""
        if isinstance(arch, ShiftFormerMasks):
            return [
                (block, BlockWidths(arch.embed_dim, *widths))
                for block, *widths in zip(self.blocks, arch.num_heads, arch.hidden, arch.depth, strict=True)]
        if arch is None:
            arch = self.unbound_space.largest
        elif not torch.compiler.is_compiling():
            self.unbound_space.validate(arch)
        return self._blocks_of(arch)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions and prefix tokens as timm does, at the width of `x`."""
        dim, position = x.shape[-1], None
        if self.pos_embed is not None:
            # a copy: a view is contiguous at the full width only, which would then have its own compiled graphs
            position = self.pos_embed[..., :dim].clone(memory_format=torch.contiguous_format)
        if position is not None and self.no_embed_class:
            x = x + position
        prefix = [token[..., :dim].expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token)
                  if token is not None]
        x = torch.cat([*prefix, x], dim=1) if prefix else x
        if position is not None and not self.no_embed_class:
            x = x + position
        return x if position is None else self.pos_drop(x)  # as timm does

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        # a pooling decides where the norm is, so both are needed to create the network again
        self.model_args.update(
            num_classes=num_classes, global_pool=self.global_pool, fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self._make_head_elastic()

    def _make_head_elastic(self) -> None:
        if type(self.head) is nn.Linear:
            self.head.__class__ = ElasticLinear

    def subnet_cfg(self, arch: Arch) -> dict:
        return dict(super().subnet_cfg(arch), input_size=(self.in_chans, *self.patch_embed.img_size))


def _layer_ends(masks: ShiftFormerMasks | None, count: int) -> list[int]:
    """Number of blocks to run before each layer's output is read.

    Blocks that a mask switches off add nothing. Those after a layer run before it is read, so that gradients reach
    them.
    """
    if masks is None:
        return list(range(1, count + 1))
    first, *others = masks.depth.detach().round().nonzero().flatten().tolist()
    return [*others, count]


def _norm(norm: nn.Module, x: Tensor, width: Width) -> Tensor:
    """Run a final norm, which may be switched off (an Identity)."""
    return norm(x, width=width) if isinstance(norm, ElasticLayerNorm) else norm(x)
