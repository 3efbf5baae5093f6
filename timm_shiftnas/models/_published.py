"""Converters of published checkpoints: AutoFormer, and AttentiveNAS, AlphaNet and Once-for-all."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

__all__ = ['convert_autoformer', 'convert_mobilenet', 'is_autoformer', 'is_published_mobilenet']


# -- AutoFormer --------------------------------------------------------------------------------------------------------

_AUTOFORMER_NAMES = {
    'patch_embed_super.': 'patch_embed.', 'attn_layer_norm.': 'norm1.', 'ffn_layer_norm.': 'norm2.',
    '.fc1.': '.mlp.fc1.', '.fc2.': '.mlp.fc2.',
    'rel_pos_embed_k.embeddings_table_v': 'rel_pos.k_rows', 'rel_pos_embed_k.embeddings_table_h': 'rel_pos.k_cols',
    'rel_pos_embed_v.embeddings_table_v': 'rel_pos.v_rows', 'rel_pos_embed_v.embeddings_table_h': 'rel_pos.v_cols',
}


def is_autoformer(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of AutoFormer's published code."""
    return 'patch_embed_super.proj.weight' in state_dict


def convert_autoformer(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename AutoFormer's keys, undo its interleaving of qkv rows, and keep the prefix that `model` can reach.

    AutoFormer's supernets are wider than any arch of their spaces (T: 256 for 240). Their qkv weight holds query, key
    and value rows in turn, and an arch with h heads uses the first 64 h of each.
    """
    own, converted = model.state_dict(), {}
    for name, weight in state_dict.items():
        for old, new in _AUTOFORMER_NAMES.items():
            name = name.replace(old, new)
        if name.startswith('blocks.') and int(name.split('.')[1]) >= len(model.blocks):
            continue  # a layer that no arch of the space has
        if name.endswith('qkv.weight'):
            heads_wide = own[name].shape[0] // 3
            weight = torch.cat([weight[role::3][:heads_wide] for role in range(3)])
        # leading slices of widths; distances, tokens, patches and classes are adapted elsewhere
        if name in ('pos_embed', 'head.weight'):
            weight = weight[..., :model.embed_dim]
        elif name == 'patch_embed.proj.weight':
            weight = weight[:model.embed_dim]
        elif name in own and name != 'head.bias' and '.rel_pos.' not in name:
            weight = weight[tuple(slice(size) for size in own[name].shape)]
        converted[name] = weight
    return converted


# -- AttentiveNAS, AlphaNet, Once-for-all ------------------------------------------------------------------------------

_CONVOLUTIONS = ('inverted_bottleneck', 'depth_conv', 'point_linear')  # of a block, first to last
_PARTS = {*_CONVOLUTIONS, 'shortcut'}


def is_published_mobilenet(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of the published code of AttentiveNAS, AlphaNet or Once-for-all."""
    return any(name.startswith('first_conv.') for name in state_dict)


def convert_mobilenet(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the published code; drop shortcuts that no arch uses, and statistics for tracking."""
    blocks = [(f'blocks.{s}.{i}', block) for s, stage in enumerate(model.blocks) for i, block in enumerate(stage)]
    own, converted = model.state_dict(), {}
    for name, weight in state_dict.items():
        tokens = name.split('.')
        if 'bn_tracking' in tokens:
            continue
        norm, leaf = 'bn' in tokens, tokens[-1]
        if tokens[0] == 'first_conv':
            new = f'{"bn1" if norm else "conv_stem"}.{leaf}'
        elif 'final_expand_layer' in tokens:
            new = f'{blocks[-1][0]}.{"bn1" if norm else "conv"}.{leaf}'
        elif tokens[0] == 'classifier':
            new = f'classifier.{leaf}'
        elif tokens[0] in ('last_conv', 'feature_mix_layer'):
            new = f'{"bn2" if norm else "conv_head"}.{leaf}'
        elif tokens[0] == 'blocks' and tokens[1].isdecimal() and int(tokens[1]) < len(blocks) and _PARTS & set(tokens):
            prefix, block = blocks[int(tokens[1])]
            new = f'{prefix}.{_block_part(tokens, isinstance(block, InvertedResidual))}'
            if 'shortcut' in tokens and new not in own:
                continue
        else:
            new = name  # `check_fits` will report it
        converted[new] = weight
    return converted


def _block_part(tokens: list[str], expands: bool) -> str:
    """timm's name, inside a block, of the part that the published code names with these tokens."""
    leaf = tokens[-1]
    if 'shortcut' in tokens:
        return f'projection.conv.{leaf}'
    if 'se' in tokens:
        return f'se.{"conv_reduce" if "reduce" in tokens else "conv_expand"}.{leaf}'
    if leaf.endswith('_matrix'):
        return f'conv_dw.matrices.{leaf.removesuffix("_matrix")}'
    number = next(i for i, part in enumerate(_CONVOLUTIONS) if part in tokens)
    if 'bn' in tokens:
        return f'bn{number + expands}.{leaf}'
    return f'{("conv_pw", "conv_dw", "conv_pwl" if expands else "conv_pw")[number]}.{leaf}'
