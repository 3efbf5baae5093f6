"""Elastic layers of vision transformers: timm's layers with a forward that takes the width to compute.

A width is an **int** (slice the shared weights: the fast path) or a **0/1 mask of full width** (differentiable: the
path of the architecture generator). The *input* width is always read off the tensor. Layers store nothing about an
arch.

Masks multiply exactly once, where a value is read: after a LayerNorm, on the attention output, after the activation of
the MLP, and once per residual branch. Writes to the residual stream stay unmasked: otherwise the gradient of every
inactive unit would be exactly zero, and the generator could never learn to grow.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from ..space.shiftformer import HEAD_DIM
from .relative_position import RelativeAttention, RelativeBlock, RelativeIndex
from .widths import Width, check_channels, leading, masked, prefix

__all__ = [
    'BlockWidths', 'ElasticAttention', 'ElasticBlock', 'ElasticLayerNorm', 'ElasticLinear', 'ElasticMlp',
    'ElasticAttentionPool', 'ElasticLayerScale', 'ElasticPatchEmbed', 'ElasticQKV', 'make_vit_elastic',
]


class BlockWidths(NamedTuple):
    """Widths of one transformer block: ints, or masks of full width; the defaults are the full block."""
    embed_dim: Width = None
    num_heads: Width = None
    hidden: Width = None
    active: Tensor | None = None  # 0-d, masks only: 0 skips the block


FULL = BlockWidths()


# -- linear, norm, embedding, MLP --------------------------------------------------------------------------------------


class ElasticLinear(nn.Linear):
    """Linear layer that computes its first `out` outputs from the first `x.shape[-1]` inputs."""

    def forward(self, x: Tensor, *, out: Width = None) -> Tensor:
        out = prefix(out)
        bias = None if self.bias is None else leading(self.bias, out)
        return F.linear(x, leading(self.weight, out, x.shape[-1]), bias)


class ElasticQKV(nn.Linear):
    """The joint projection to queries, keys and values, laid out as timm's: rows q | k | v, heads of 64 in each.

    Args:
        dim: Largest input width.
        num_heads: Largest number of heads.
        bias_slicing: Which entries of the bias a smaller number of heads reads. 'role': the first heads of each of q, k
            and v, as for the weight. 'joint': the first 3 * 64 * heads entries, split into q, k and v, as in the
            training of AutoFormer's published supernets; only its converter sets this.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool = True, bias_slicing: str = 'role', device=None,
                 dtype=None) -> None:
        super().__init__(dim, 3 * num_heads * HEAD_DIM, bias=bias, device=device, dtype=dtype)
        self.bias_slicing = bias_slicing

    head_dim = HEAD_DIM

    def sliced(self, dim: int, heads: int) -> tuple[Tensor, Tensor | None]:
        """Weight [3 * head width * heads, dim] and bias of the first `heads` heads."""
        rows = heads * self.head_dim
        # skipped in compiled graphs: comparing sizes would compile a separate graph for the full size
        if not torch.compiler.is_compiling() and (3 * rows, dim) == (self.out_features, self.in_features):
            return self.weight, self.bias
        # always copies: a view is possible for some numbers of heads only, and would add compiled graphs
        layout = torch.contiguous_format
        weight = self.weight.view(3, -1, self.in_features)[:, :rows, :dim].clone(memory_format=layout).view(-1, dim)
        if self.bias is None:
            return weight, None
        if self.bias_slicing == 'joint':
            return weight, self.bias[:3 * rows]
        return weight, self.bias.view(3, -1)[:, :rows].clone(memory_format=layout).view(-1)

    def forward(self, x: Tensor, *, heads: Width = None) -> Tensor:
        if not isinstance(heads, Tensor):
            heads = self.out_features // (3 * self.head_dim) if heads is None else heads
            return F.linear(x, *self.sliced(x.shape[-1], heads))
        bias: Tensor | None = self.bias
        if bias is not None and self.bias_slicing == 'joint':
            # active heads read the bias of a network with as many heads, inactive ones that of the full network
            rows = int(heads.detach().sum().round()) * HEAD_DIM
            bias = torch.cat([bias[:3 * rows].view(3, rows), bias.view(3, -1)[:, rows:]], dim=1).flatten()
        return F.linear(x, leading(self.weight, None, x.shape[-1]), bias)


class ElasticLayerNorm(LayerNorm):
    """LayerNorm over the channels of `x`; with a mask, over the active ones, and the output is masked."""

    def forward(self, x: Tensor, *, width: Width = None) -> Tensor:
        return masked(self.normalized(x, width), width, -1)

    def normalized(self, x: Tensor, width: Width) -> Tensor:
        """The output before it is masked: for a norm whose output is the residual stream itself."""
        if not isinstance(width, Tensor):
            dim = x.shape[-1]
            return F.layer_norm(x, (dim,), leading(self.weight, dim), leading(self.bias, dim), self.eps)
        count = width.sum()
        x = x - (x * width).sum(-1, keepdim=True) / count
        variance = (x * x * width).sum(-1, keepdim=True) / count
        return x * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class ElasticPatchEmbed(PatchEmbed):
    """timm's patch embedding, computing its first `out` channels: [B, C, H, W] -> [B, patches, out]."""

    def forward(self, x: Tensor, *, out: Width = None) -> Tensor:
        check_channels(x, self.proj.in_channels)
        if x.shape[-2:] != tuple(self.img_size):
            raise ValueError(
                f'input of size {tuple(x.shape[-2:])} for a network of {tuple(self.img_size)}; '
                'resize the images or call set_input_size')
        out = prefix(out)
        bias = None if self.proj.bias is None else leading(self.proj.bias, out)
        x = F.conv2d(x, leading(self.proj.weight, out), bias, self.proj.stride)
        return x.flatten(2).transpose(1, 2)


class ElasticMlp(Mlp):
    """timm's MLP with elastic hidden and output widths."""

    def __init__(self, in_features: int, hidden_features: int, act_layer=nn.GELU, norm_layer=None, bias: bool = True,
                 drop: float = 0., device=None, dtype=None) -> None:
        # timm's linear layers are replaced, so they are built on the meta device at no cost
        super().__init__(in_features, hidden_features, act_layer=act_layer, bias=bias, drop=drop, device='meta')
        self.fc1 = ElasticLinear(in_features, hidden_features, bias=bias, device=device, dtype=dtype)
        self.fc2 = ElasticLinear(hidden_features, in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, hidden: Width = None, out: Width = None) -> Tensor:
        x = self.drop1(self.act(self.fc1(x, out=hidden)))
        return self.drop2(self.fc2(masked(x, hidden, -1), out=out))


# -- attention with 2D relative position -------------------------------------------------------------------------------


class ElasticAttention(RelativeAttention):
    """`RelativeAttention` computing its first heads and its first output channels."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, proj_bias: bool = True, attn_drop: float = 0.,
                 proj_drop: float = 0., device=None, dtype=None, **unused) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, proj_drop=proj_drop, device='meta')
        self.qkv = ElasticQKV(dim, num_heads, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = ElasticLinear(self.attn_dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                index: RelativeIndex | None = None, *, heads: Width = None, out: Width = None) -> Tensor:
        x = self.attend(self.qkv(x, heads=heads), attn_mask, is_causal, index)
        return self.proj_drop(self.proj(masked(x, heads).transpose(1, 2).flatten(2), out=out))


class ElasticBlock(RelativeBlock):
    """timm's pre-norm block at the given widths; without widths, the full block."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                index: RelativeIndex | None = None, *, widths: BlockWidths = FULL) -> Tensor:
        embed, heads, hidden, active = widths
        y = self.ls1(self.attn(self.norm1(x, width=embed), attn_mask, is_causal, index, heads=heads, out=embed))
        x = x + self.drop_path1(masked(y, active))
        y = self.ls2(self.mlp(self.norm2(x, width=embed), hidden=hidden, out=embed))
        return x + self.drop_path2(masked(y, active))


# -- options of pretrained ViTs ----------------------------------------------------------------------------------------


class ElasticLayerScale(LayerScale):
    """timm's LayerScale of the first `x.shape[-1]` channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * leading(self.gamma, x.shape[-1])


class ElasticAttentionPool(AttentionPoolLatent):
    """timm's attention pooling of tokens of any width; its heads and the width of its MLP are fixed."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, width: Width = None) -> Tensor:
        latent = masked(self.latent[..., :x.shape[-1]], width, -1).expand(x.shape[0], -1, -1)
        q = self.q(latent).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        y = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2), out=x.shape[-1]))
        y = y + self.mlp(self.norm(y, width=width), out=x.shape[-1])
        return y[:, 0] if self.pool == 'token' else y.mean(1)


_ELASTIC = {
    PatchEmbed: ElasticPatchEmbed, LayerNorm: ElasticLayerNorm, nn.LayerNorm: ElasticLayerNorm,
    nn.Linear: ElasticLinear, Mlp: ElasticMlp, Attention: ElasticAttention, Block: ElasticBlock,
    LayerScale: ElasticLayerScale, AttentionPoolLatent: ElasticAttentionPool,
}


def make_vit_elastic(net: nn.Module) -> None:
    """Turn the modules of timm's ViT into elastic ones, in place: weights, names and hooks stay."""
    for module in net.modules():
        module.__class__ = _ELASTIC.get(type(module), type(module))
    for module in net.modules():
        if isinstance(module, ElasticAttention):
            qkv: Any = module.qkv
            module.rel_pos, qkv.__class__ = None, ElasticQKV
            qkv.head_dim, qkv.bias_slicing = module.head_dim, 'role'
