"""ShiftFormer: an elastic vision transformer and its static subnets, on timm's `VisionTransformer`.

The search spaces are those of AutoFormer (Chen et al., ICCV 2021, arXiv 2107.00651): token width and depth, and per
layer the number of heads and the MLP width, with 2D relative position on keys and values. ShiftNAS (Zhang et al., ICCV
2023, arXiv 2307.08300) calls the network ShiftFormer. Attribute names and the layout of weights are timm's: with
`relative_position=False`, the state_dict of the full network is that of a timm ViT with heads of 64 channels.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm, Mlp, PatchEmbed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._input import get_pretrained_grid_size, update_model_args
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from ..layers.relative_position import RelativeAttention, RelativeBlock, RelativeIndex, RelativePosition2d, extend_table
from ..layers.vit import (
    BlockWidths,
    ElasticAttention,
    ElasticBlock,
    ElasticLayerNorm,
    ElasticMlp,
    ElasticPatchEmbed,
)
from ..space.core import Arch, SearchSpace
from ..space.families import space_of_family
from ..space.shiftformer import shiftformer_space, shiftformer_space_of
from ._checkpoint import check_fits, weights_of
from ._elastic_vit import ElasticViT
from ._published import convert_autoformer, is_autoformer
from .backbone import ElasticBackbone

__all__ = ['ShiftFormer', 'ShiftFormerSupernet', 'checkpoint_filter_fn']

# arguments of timm's VisionTransformer that elastic widths do not touch
_PASSED_ON = frozenset((
    'proj_bias', 'class_token', 'pos_embed', 'no_embed_class', 'final_norm', 'pool_include_prefix', 'drop_rate',
    'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate', 'fix_init', 'act_layer',
))
_POOLS = ('', 'avg', 'avgmax', 'max', 'token')


def _cfg(**kwargs) -> dict[str, Any]:
    return dict(
        num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=.875, interpolation='bicubic',
        fixed_input_size=True, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv='patch_embed.proj', classifier='head', license='apache-2.0') | kwargs


class ShiftFormer(VisionTransformer):
    """A vision transformer with its own number of heads and MLP width in every layer: a ShiftFormer subnet.

    Input [B, in_chans, H, W], output [B, num_classes]. Everything is static; `ShiftFormerSupernet` is elastic.

    Args:
        arch: Widths and depth, an `Arch` or its dict (scalars go to every layer).
        img_size: Input size, H and W.
        patch_size: Patch size.
        in_chans: Input channels.
        num_classes: Classes; 0 for no head.
        global_pool: 'avg' (mean over patch tokens), 'token', 'max', 'avgmax' or ''.
        fc_norm: Put the final norm after pooling instead of before it.
        qkv_bias: Bias in the projection to queries, keys and values.
        relative_position: 2D relative position on keys and values.
        max_relative_position: Distance M at which relative positions are clipped.
        norm_eps: Epsilon of the LayerNorms (AutoFormer: 1e-5).
        weight_init: As in timm's `VisionTransformer`.
        **kwargs: Further arguments of timm's `VisionTransformer` that can be elastic.

    Raises:
        ValueError: If `arch` is not a ShiftFormer arch, or for an argument that cannot be elastic.
    """
    block_cls = RelativeBlock
    layer_types = dict(embed_layer=PatchEmbed, mlp_layer=Mlp, attn_layer=RelativeAttention)
    norm_cls = LayerNorm

    def __init__(
            self,
            arch: Arch | Mapping[str, Any],
            *,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            fc_norm: bool = False,
            qkv_bias: bool = True,
            relative_position: bool = True,
            max_relative_position: int = 14,
            norm_eps: float = 1e-5,
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        _refuse_unsupported(kwargs, global_pool)
        static_space, arch = shiftformer_space_of(arch)

        def block_fn(depth: int, num_heads: int, mlp_ratio: float, **block_kwargs) -> nn.Module:
            return self.block_cls(
                num_heads=arch.num_heads[depth], mlp_ratio=arch.mlp_ratio[depth], depth=depth, **block_kwargs)

        super().__init__(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            global_pool=global_pool, fc_norm=fc_norm, qkv_bias=qkv_bias, embed_dim=arch.embed_dim, depth=arch.depth,
            norm_layer=partial(self.norm_cls, eps=norm_eps), block_fn=block_fn, **self.layer_types,
            weight_init='skip', device=device, dtype=dtype, **kwargs)
        self.relative_position = relative_position
        for block in self.blocks if relative_position else ():
            block.attn.rel_pos = RelativePosition2d(
                self.patch_embed.grid_size, self.num_prefix_tokens, max_relative_position, device=device, dtype=dtype)
        # arguments that create this network again: extraction and saving read them
        self.model_args: dict[str, Any] = dict(
            kwargs, img_size=to_2tuple(img_size), patch_size=to_2tuple(patch_size), in_chans=in_chans,
            num_classes=num_classes, global_pool=global_pool, fc_norm=fc_norm, qkv_bias=qkv_bias,
            relative_position=relative_position, max_relative_position=max_relative_position, norm_eps=norm_eps)
        self.arch, self.static_space = arch, static_space
        if weight_init != 'skip':
            self.weight_init_mode = weight_init
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=.02)  # AutoFormer's; timm's is 1e-6

    def relative_index(self, x: Tensor) -> RelativeIndex | None:
        """Constants of relative position for tokens `x`, shared by all layers."""
        rel_pos = self.blocks[0].attn.rel_pos
        return None if rel_pos is None else rel_pos.index(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        index = self.relative_index(x)
        if isinstance(is_causal, Tensor):  # of the TorchScript-based exporter of ONNX
            is_causal = bool(is_causal)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, attn_mask, is_causal, index)
            else:
                x = block(x, attn_mask, is_causal, index)
        return self.norm(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        tables = {name for name, _ in self.named_parameters() if '.rel_pos.' in name}
        return super().no_weight_decay() | tables

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            _refuse_unsupported(dict(class_token=self.has_class_token), global_pool)
        super().reset_classifier(num_classes, global_pool)
        self.model_args.update(num_classes=num_classes, global_pool=self.global_pool)

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the input size: positions are resampled, relative positions extended from the last trained ones."""
        old_grid = self.patch_embed.grid_size
        super().set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
        self.model_args.update(img_size=self.patch_embed.img_size, patch_size=self.patch_embed.patch_size)
        for block in self.blocks if self.relative_position else ():
            rel_pos = block.attn.rel_pos
            rel_pos.grid_size = self.patch_embed.grid_size
            with torch.no_grad():
                for name, table in rel_pos.named_parameters():
                    table.copy_(_adapt_table(name, table, old_grid, rel_pos.grid_size, rel_pos.max_distance))


class ShiftFormerSupernet(ElasticViT, ShiftFormer):
    """A ShiftFormer whose depth and widths are chosen per call: `net(x, arch)`.

    The network owns the weights of every arch of its space; a smaller choice is a prefix of a larger one. The arch is
    an argument of `forward` and is stored nowhere, so copies, gradient checkpointing and compiled graphs work.

    Args:
        space: The search space, or the dict of its `to_dict`.
        qkv_bias_slicing: 'role', or 'joint' for converted AutoFormer checkpoints; see `layers.ElasticQKV`.
        **kwargs: As for `ShiftFormer`.
    """
    untrained_cfg = _cfg()
    block_cls = ElasticBlock
    layer_types = dict(embed_layer=ElasticPatchEmbed, mlp_layer=ElasticMlp, attn_layer=ElasticAttention)
    norm_cls = ElasticLayerNorm

    def __init__(self, space: SearchSpace | Mapping[str, Any], *, qkv_bias_slicing: str = 'role', **kwargs) -> None:
        space = space_of_family(space, 'shiftformer')
        super().__init__(arch=space.largest, **kwargs)
        del self.arch, self.static_space  # these describe static networks only
        self._make_head_elastic()
        self.unbound_space = space.unbind()
        self.set_qkv_bias_slicing(qkv_bias_slicing)

    def set_qkv_bias_slicing(self, mode: str) -> None:
        """Choose which entries of the qkv bias fewer heads read ('role' or 'joint'); saving and extraction keep it."""
        if mode not in ('role', 'joint'):
            raise ValueError(f"qkv_bias_slicing={mode!r} is unknown; choose 'role' or 'joint'")
        for block in self.blocks:
            block.attn.qkv.bias_slicing = mode
        self.model_args['qkv_bias_slicing'] = mode
        update_model_args(self, qkv_bias_slicing=mode)  # timm's own record

    def _blocks_of(self, arch: Arch) -> list[tuple[nn.Module, BlockWidths]]:
        return [
            (block, BlockWidths(arch.embed_dim, heads, int(arch.embed_dim * ratio)))
            for block, heads, ratio in zip(self.blocks, arch.num_heads, arch.mlp_ratio, strict=False)]

    # -- extraction ----------------------------------------------------------------------------------------------------

    def subnet_args(self, arch: Arch) -> dict[str, Any]:
        return {name: value for name, value in self.model_args.items() if name != 'qkv_bias_slicing'}

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch: leading slices, in q, k and v each."""
        state = super().subnet_state_dict(arch, subnet)
        for layer, heads in enumerate(arch.num_heads):
            name = f'blocks.{layer}.attn.qkv'
            weight, bias = self.get_submodule(name).sliced(arch.embed_dim, heads)
            state |= {f'{name}.weight': weight} if bias is None else {f'{name}.weight': weight, f'{name}.bias': bias}
        return state


def _refuse_unsupported(kwargs: Mapping[str, Any], global_pool: str) -> None:
    if global_pool not in _POOLS:
        raise ValueError(f'global_pool={global_pool!r} cannot be elastic; choose one of {_POOLS}')
    if global_pool == 'token' and not kwargs.get('class_token', True):
        raise ValueError("global_pool='token' needs class_token=True")
    stock = inspect.signature(VisionTransformer.__init__).parameters
    for name, value in kwargs.items():
        if name in _PASSED_ON:
            continue
        if name in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio'):
            raise ValueError(
                f'{name} of a ShiftFormer is set by its space or arch; '
                'type space=timm_shiftnas.shiftformer_space(embed_dim=..., depth=..., num_heads=..., mlp_ratio=...)')
        if name not in stock:
            raise TypeError(f'unexpected argument {name!r}')
        raise ValueError(f'{name}={value!r}: this option of timm\'s VisionTransformer cannot be elastic; leave it out')


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: ShiftFormer) -> dict[str, Tensor]:
    """Adapt a checkpoint to `model`: published AutoFormer supernets, plain timm ViTs, and other image sizes.

    Raises:
        ValueError: If the checkpoint belongs to another search space, arch or number of classes.
    """
    state_dict = weights_of(state_dict)
    published = is_autoformer(state_dict)
    if published:
        state_dict = convert_autoformer(state_dict, model)
    grid = _trained_grid(state_dict, model)
    state_dict = vit_filter_fn(state_dict, model)
    for name, table in state_dict.items():
        if '.rel_pos.' in name:
            state_dict[name] = _adapt_table(
                name, table, grid, model.patch_embed.grid_size, model.model_args['max_relative_position'])
    check_fits(state_dict, model, first_conv='patch_embed.proj', classifier='head')
    if published and isinstance(model, ShiftFormerSupernet):
        model.set_qkv_bias_slicing('joint')
    return state_dict


def _trained_grid(state_dict: Mapping[str, Tensor], model: ShiftFormer) -> tuple[int, int]:
    """The token grid that a checkpoint was trained on, found as timm does when it resamples the positions."""
    grid, patches = model.patch_embed.grid_size, state_dict.get('patch_embed.proj.weight')
    if 'pos_embed' not in state_dict:
        size = getattr(model, 'pretrained_model_args', {}).get('img_size')
        return grid if size is None or patches is None else tuple(
            pixels // patch for pixels, patch in zip(to_2tuple(size), patches.shape[-2:], strict=True))
    count = state_dict['pos_embed'].shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    side = round(count ** .5)
    return get_pretrained_grid_size(model, patches, count) or (grid if math.prod(grid) == count else (side, side))


def _adapt_table(
        name: str, table: Tensor, trained: tuple[int, int], grid: tuple[int, int], max_distance: int) -> Tensor:
    """A relative-position table, adapted if the grid is larger or the clipping distance another one."""
    axis = int(name.endswith('cols'))
    if trained[axis] >= grid[axis] and table.shape[0] == 2 * max_distance + 2:
        return table
    return extend_table(table, trained[axis] - 1, max_distance)


# -- registered models -------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs({
    'shiftformer_supernet.untrained': _cfg(),
    'shiftformer_tiny_supernet.untrained': _cfg(),
    'shiftformer_small_supernet.untrained': _cfg(),
    'shiftformer_base_supernet.untrained': _cfg(),
    'test_shiftformer_supernet.untrained': _cfg(input_size=(3, 32, 32), crop_pct=1.0),
    'shiftformer_subnet.untrained': _cfg(),
})


def _create(cls: type, variant: str, pretrained: bool, **kwargs) -> nn.Module:
    return build_model_with_cfg(
        cls, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(
            out_indices=kwargs.pop('out_indices', 3),
            feature_cls=ElasticBackbone if issubclass(cls, ElasticViT) else 'getter'),
        **kwargs)


def _create_supernet(variant: str, pretrained: bool, **kwargs) -> ShiftFormerSupernet:
    return _create(ShiftFormerSupernet, variant, pretrained, **kwargs)


def _tiny() -> SearchSpace:
    return shiftformer_space(embed_dim=(192, 216, 240), depth=(12, 13, 14), num_heads=(3, 4), mlp_ratio=(3.5, 4.0))


@register_model
def shiftformer_supernet(pretrained: bool = False, **kwargs) -> ShiftFormerSupernet:
    """The same as `shiftformer_tiny_supernet`; pass `space=` for your own space."""
    return _create_supernet('shiftformer_supernet', pretrained, **dict(dict(space=_tiny()), **kwargs))


@register_model
def shiftformer_tiny_supernet(pretrained: bool = False, **kwargs) -> ShiftFormerSupernet:
    """The AutoFormer-T space: 1.281 to 2.442 GMACs at 224 px, 1,056,964,608 archs."""
    return _create_supernet('shiftformer_tiny_supernet', pretrained, **dict(dict(space=_tiny()), **kwargs))


@register_model
def shiftformer_small_supernet(pretrained: bool = False, **kwargs) -> ShiftFormerSupernet:
    """The AutoFormer-S space: 2.958 to 7.509 GMACs at 224 px."""
    space = shiftformer_space(
        embed_dim=(320, 384, 448), depth=(12, 13, 14), num_heads=(5, 6, 7), mlp_ratio=(3.0, 3.5, 4.0))
    return _create_supernet('shiftformer_small_supernet', pretrained, **dict(dict(space=space), **kwargs))


@register_model
def shiftformer_base_supernet(pretrained: bool = False, **kwargs) -> ShiftFormerSupernet:
    """The AutoFormer-B space: 9.076 to 16.25 GMACs at 224 px."""
    space = shiftformer_space(
        embed_dim=(528, 576, 624), depth=(14, 15, 16), num_heads=(9, 10), mlp_ratio=(3.0, 3.5, 4.0))
    return _create_supernet('shiftformer_base_supernet', pretrained, **dict(dict(space=space), **kwargs))


@register_model
def test_shiftformer_supernet(pretrained: bool = False, **kwargs) -> ShiftFormerSupernet:
    """A small space for tests and the quickstart: 32 px, patches of 8; a forward takes milliseconds."""
    space = shiftformer_space(
        embed_dim=(32, 48, 64), depth=(4, 5, 6), num_heads=(1, 2, 3), mlp_ratio=(1.0, 2.0, 3.0))
    args = dict(space=space, img_size=32, patch_size=8, max_relative_position=3)
    return _create_supernet('test_shiftformer_supernet', pretrained, **dict(args, **kwargs))


@register_model
def shiftformer_subnet(pretrained: bool = False, **kwargs) -> ShiftFormer:
    """A static ShiftFormer of any arch; without `arch=`, the smallest one of the AutoFormer-T space."""
    arch = dict(embed_dim=192, depth=12, num_heads=3, mlp_ratio=3.5)
    return _create(ShiftFormer, 'shiftformer_subnet', pretrained, **dict(dict(arch=arch), **kwargs))
