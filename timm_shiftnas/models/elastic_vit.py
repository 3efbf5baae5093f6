"""Elastic pretrained ViTs: timm's `VisionTransformer` as a supernet, and its static subnets.

The supernet is the base network itself, made elastic in place: names, shapes and weights are timm's, and the largest
arch is the base. A subnet is the base with smaller layers: an object of timm's `VisionTransformer`.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, Format, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..layers.vit import BlockWidths
from ..layers.vit import make_vit_elastic as make_layers_elastic
from ..space.core import Arch, SearchSpace
from ..space.elastic_vit import elastic_vit_space, elastic_vit_space_of, hidden_width, kept_layers, parameter_axes
from ..space.shiftformer import ShiftFormerMasks
from ._elastic_family import ElasticFamily
from ._elastic_vit import ElasticViT
from ._sortable import SortableSupernet, UnitAxis

__all__ = [
    'ELASTIC_VITS', 'ElasticVisionTransformer', 'default_vit_space', 'make_vit_static', 'why_vit_is_not_elastic',
]

WIDTHS, HEADS, RATIOS = (.5, .625, .75, .875, 1.), (.5, 2 / 3, 5 / 6, 1.), (.25, .5, .75, 1.)  # shares of the base
DEPTHS = (2 / 3, 3 / 4, 5 / 6, 11 / 12, 1.)


def why_vit_is_not_elastic(net: nn.Module) -> str | None:
    """The first part of a ViT that is not elastic, or `None` if there is none."""
    if type(net) is not VisionTransformer:
        return f'its class is {type(net).__name__} and not VisionTransformer'
    expected = dict(
        patch_embed=(PatchEmbed,), norm=(LayerNorm, nn.LayerNorm, nn.Identity), attn_pool=(AttentionPoolLatent,),
        norm_pre=(LayerNorm, nn.LayerNorm, nn.Identity), fc_norm=(LayerNorm, nn.LayerNorm, nn.Identity),
        patch_drop=(nn.Identity,))
    parts = [(name, getattr(net, name), types) for name, types in expected.items() if getattr(net, name) is not None]
    norms = (LayerNorm, nn.LayerNorm, nn.Identity)
    for block in net.blocks:
        if type(block) is not Block:
            return f'its blocks are of the class {type(block).__name__} and not Block'
        parts += [
            ('attn', block.attn, (Attention,)), ('mlp', block.mlp, (Mlp,)), ('norm1', block.norm1, norms[:2]),
            ('norm2', block.norm2, norms[:2]), ('ls1', block.ls1, (LayerScale, nn.Identity)),
            ('ls2', block.ls2, (LayerScale, nn.Identity))]
        if isinstance(block.attn, Attention) and isinstance(block.mlp, Mlp):
            parts += [
                ('attn.q_norm', block.attn.q_norm, norms), ('attn.norm', block.attn.norm, (nn.Identity,)),
                ('attn.gate', block.attn.gate, (type(None),)), ('mlp.norm', block.mlp.norm, (nn.Identity,))]
    parts.append(('patch_embed.norm', getattr(net.patch_embed, 'norm', None), (nn.Identity,)))
    for name, module, types in parts:
        if type(module) not in types:
            return f'its {name} is of the class {type(module).__name__} and not {types[0].__name__}'
    return None


def default_vit_space(net: VisionTransformer) -> SearchSpace:
    """The default space of a base: widths, heads, MLPs and depths in steps down from those of the base."""
    block, dim = net.blocks[0], net.embed_dim
    heads, hidden = block.attn.num_heads, block.mlp.fc1.out_features

    def steps(size: int, shares: tuple[float, ...], multiple: int = 1) -> list[int]:
        return sorted({*(max(math.ceil(size * share / multiple - 1e-6) * multiple, 1) for share in shares[:-1]), size})

    return elastic_vit_space(
        embed_dim=steps(dim, WIDTHS, 8), depth=steps(len(net.blocks), DEPTHS), num_heads=steps(heads, HEADS),
        mlp_ratio=[width / dim for width in steps(hidden, RATIOS, 8)])


def fix_input_size(net: VisionTransformer) -> None:
    """Let a network take only images of its own size: MACs of a dynamic size are undefined."""
    net.dynamic_img_size = False
    net.patch_embed.flatten, net.patch_embed.output_fmt = True, Format.NCHW
    net.patch_embed.strict_img_size, net.patch_embed.dynamic_img_pad = True, False


class ElasticVisionTransformer(SortableSupernet, ElasticViT, VisionTransformer):
    """A pretrained ViT whose depth and widths are chosen per call: `net(x, arch)`; create it with `elastic`.

    A smaller width is a prefix of a larger one, and an arch of depth d consists of the first d layers of the space's
    `layer_order`: `sort_by_importance` makes these the most important ones.
    """

    def make_elastic(self, space: SearchSpace, model_args: dict[str, Any]) -> ElasticVisionTransformer:
        """Complete a network whose class has just been changed to this one."""
        make_layers_elastic(self)
        fix_input_size(self)
        self.unbound_space = space.unbind()
        self.model_args = model_args
        return self

    def relative_index(self, x: Tensor) -> None:
        """No relative position."""

    def _blocks_of(self, arch: Arch) -> list[tuple[nn.Module, BlockWidths]]:
        layers = kept_layers(self.unbound_space, arch.depth)
        return [
            (self.blocks[layer], BlockWidths(arch.embed_dim, heads, hidden_width(arch.embed_dim, ratio)))
            for layer, heads, ratio in zip(layers, arch.num_heads, arch.mlp_ratio, strict=True)
            if layer < len(self.blocks)]  # timm's prune_intermediate_layers removes the last ones

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        super().set_input_size(img_size, patch_size)
        self.model_args['img_size'] = self.patch_embed.img_size
        if patch_size is not None:
            self.model_args['patch_size'] = self.patch_embed.patch_size

    # -- sorting -------------------------------------------------------------------------------------------------------

    def unit_axes(self, name: str) -> tuple[UnitAxis | None, ...]:
        layer, size = name.split('.')[1] if name.startswith('blocks.') else '', self.blocks[0].attn.head_dim
        units = {
            'embed': UnitAxis('embed'), 'hidden': UnitAxis(f'hidden.{layer}'),
            'heads': UnitAxis(f'heads.{layer}', size=size), 'qkv': UnitAxis(f'heads.{layer}', 3, size), None: None}
        return tuple(units[axis] for axis in parameter_axes(name))

    def layer_of(self, name: str) -> str | None:
        return f'layer.{name.split(".")[1]}' if name.startswith('blocks.') else None

    def split_masks(self, masks: ShiftFormerMasks) -> dict[str, Tensor]:
        split = {'embed': masks.embed_dim}
        for label, stacked in (('layer', masks.depth), ('heads', masks.num_heads), ('hidden', masks.hidden)):
            split |= {f'{label}.{layer}': mask for layer, mask in enumerate(stacked)}
        return split

    def join_masks(self, masks: Mapping[str, Tensor]) -> ShiftFormerMasks:
        layers = range(len(self.blocks))
        depth, heads, hidden = (
            torch.stack([masks[f'{label}.{layer}'] for layer in layers]) for label in ('layer', 'heads', 'hidden'))
        return ShiftFormerMasks(masks['embed'], depth, heads, hidden)

    def with_layer_order(self, scores: Mapping[str, Tensor]) -> SearchSpace:
        order = sorted(range(len(self.blocks)), key=lambda layer: -scores[f'layer.{layer}'].item())
        return elastic_vit_space(**dict(self.unbound_space.fields), layer_order=order)

    # -- extraction ----------------------------------------------------------------------------------------------------

    def subnet_state_dict(self, arch: Arch, subnet: nn.Module) -> dict[str, Tensor]:
        """The shared weights of an arch: leading slices of the kept layers, in q, k and v each."""
        shared, layers = self.state_dict(), kept_layers(self.unbound_space, arch.depth)
        state = {}
        for name, weight in subnet.state_dict().items():
            state[name] = leading(shared[_renumbered(name, layers)], parameter_axes(name), weight.shape)
        return state


def _renumbered(name: str, layers: list[int]) -> str:
    """The name in the supernet of a parameter of a subnet that consists of these layers."""
    parts = name.split('.')
    if parts[0] == 'blocks':
        parts[1] = str(layers[int(parts[1])])
    return '.'.join(parts)


def leading(weight: Tensor, axes: tuple[str | None, ...], shape: torch.Size) -> Tensor:
    """The first entries of a weight along every axis; along 'qkv', of each of q, k and v."""
    if axes[0] == 'qkv':
        roles = weight.unflatten(0, (3, -1))
        rows = (slice(shape[0] // 3), *map(slice, shape[1:]))
        return roles[(slice(None), *rows)].flatten(0, 1)
    return weight[tuple(map(slice, shape))]


# -- static networks ---------------------------------------------------------------------------------------------------


def shrink(net: VisionTransformer, arch: Arch) -> None:
    """Reduce a base to its first layers, heads and channels, in place: the static network of an arch."""
    dim, head_dim = arch.embed_dim, net.blocks[0].attn.head_dim
    net.blocks = nn.Sequential(*net.blocks[:arch.depth])
    sizes: dict[str | None, int] = dict(embed=dim)
    for name, weight in list(net.named_parameters()):
        axes = parameter_axes(name)
        if name.startswith('blocks.'):
            layer = int(name.split('.')[1])
            sizes['heads'] = arch.num_heads[layer] * head_dim
            sizes['qkv'] = 3 * sizes['heads']
            sizes['hidden'] = hidden_width(dim, arch.mlp_ratio[layer])
        shape = torch.Size(sizes.get(axis, size) for axis, size in zip(axes, weight.shape, strict=True))
        owner, _, leaf = name.rpartition('.')
        weight = nn.Parameter(leading(weight.detach(), axes, shape).clone(), requires_grad=weight.requires_grad)
        net.get_submodule(owner).register_parameter(leaf, weight)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    for block, heads in zip(net.blocks, arch.num_heads, strict=True):
        block.attn.num_heads, block.attn.attn_dim = heads, heads * head_dim
    net.patch_embed.proj.out_channels = net.embed_dim = net.num_features = net.head_hidden_size = dim
    net.feature_info = [dict(info, num_chs=dim) for info in net.feature_info[:arch.depth]]
    if net.attn_pool is not None:
        make_layers_elastic(net.attn_pool)  # timm's reads only tokens as wide as its own heads


def make_vit_static(
        arch: Arch | Mapping[str, Any] | None, net: VisionTransformer, model_args: dict[str, Any]) -> VisionTransformer:
    """Turn a base into the static network of an arch, in place; without an arch, of the largest one.

    Raises:
        ValueError: If the arch is not one of this family.
    """
    space, arch = elastic_vit_space_of(arch or default_vit_space(net).largest)
    shrink(net, arch)
    fix_input_size(net)
    net.arch, net.static_space, net.model_args = arch, space, model_args
    return net


def make_vit_elastic(net: VisionTransformer, space: SearchSpace, model_args: dict[str, Any]) -> nn.Module:
    """Turn a base into a supernet, in place."""
    net.__class__ = ElasticVisionTransformer
    return net.make_elastic(space, model_args)


ELASTIC_VITS = ElasticFamily(
    bases=(VisionTransformer,), modules=('vision_transformer', 'deit'), why_not=why_vit_is_not_elastic,
    space=lambda net, img_size: default_vit_space(net), make_elastic=make_vit_elastic, filter_fn=checkpoint_filter_fn)
