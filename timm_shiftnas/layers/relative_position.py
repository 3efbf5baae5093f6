"""2D relative position on keys and values (AutoFormer, Chen et al., ICCV 2021), through one fused attention call."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, maybe_add_mask, register_notrace_function, resolve_self_attn_mask, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..space.shiftformer import HEAD_DIM, fused_columns

__all__ = ['RelativeAttention', 'RelativeBlock', 'RelativeIndex', 'RelativePosition2d', 'extend_table']


class RelativeIndex(NamedTuple):
    """Constants of relative position on a token grid of R x C, computed once per forward and shared by the layers."""
    rows: Tensor  # [R, R] table row of (query row, key row)
    cols: Tensor  # [C, C] the same for columns
    columns: Tensor  # [tokens, fused_columns] one-hot row, one-hot column and class flag of every key


@torch.fx.wrap
@register_notrace_function
def relative_index(grid_size: tuple[int, int], num_prefix: int, max_distance: int, like: Tensor) -> RelativeIndex:
    """Constants for `num_prefix` (0 or 1) class tokens followed by the grid, with the dtype and device of `like`."""
    rows, cols = grid_size
    row, col = torch.arange(rows, device=like.device), torch.arange(cols, device=like.device)
    one_hot_rows = torch.eye(rows, device=like.device, dtype=like.dtype)[:, None].expand(-1, cols, -1).flatten(0, 1)
    one_hot_cols = torch.eye(cols, device=like.device, dtype=like.dtype).repeat(rows, 1)
    rest = fused_columns(grid_size) - rows - cols
    columns = F.pad(torch.cat([one_hot_rows, one_hot_cols], dim=1), [0, rest])
    if num_prefix > 0:
        flag = torch.ones(num_prefix, 1, device=like.device, dtype=like.dtype)
        columns = torch.cat([F.pad(flag, [rows + cols, rest - 1]), columns])
    return RelativeIndex(
        (row - row[:, None]).clamp(-max_distance, max_distance) + max_distance + 1,
        (col - col[:, None]).clamp(-max_distance, max_distance) + max_distance + 1,
        columns)


def _read_tables(row_table: Tensor, col_table: Tensor, index: RelativeIndex) -> tuple[Tensor, Tensor, Tensor]:
    """Table entries by pair of grid rows [R, R, 64], by pair of grid columns [C, C, 64], of the class token [64]."""
    return row_table[index.rows], col_table[index.cols], row_table[0] + col_table[0]


def _read_pairs(row_table: Tensor, col_table: Tensor, index: RelativeIndex, num_prefix: int) -> Tensor:
    """Table entries by pair of tokens, [tokens, tokens, 64]."""
    rows, cols = index.rows.shape[0], index.cols.shape[0]
    by_row = index.rows.repeat_interleave(cols, 0).repeat_interleave(cols, 1)
    by_col = index.cols.repeat(rows, rows)
    pad = [num_prefix, 0, num_prefix, 0]  # with 0, the table row of the class token
    return row_table[F.pad(by_row, pad)] + col_table[F.pad(by_col, pad)]


class RelativePosition2d(nn.Module):
    """Tables of 2D relative position on keys and on values, shared by the heads of one layer (AutoFormer).

    A table has 2M + 2 rows of 64 channels: row `clamp(key - query, -M, M) + M + 1` for a distance along an axis, and
    row 0 of *both* axes whenever query or key is the class token.

    Args:
        grid_size: Token grid (rows, columns).
        num_prefix: Class tokens before the grid, 0 or 1.
        max_distance: M, the distance at which positions are clipped.
    """

    def __init__(
            self, grid_size: tuple[int, int], num_prefix: int = 1, max_distance: int = 14, *, device=None, dtype=None,
    ) -> None:
        super().__init__()
        self.grid_size = (grid_size[0], grid_size[1])
        self.num_prefix = num_prefix
        self.max_distance = max_distance
        self.scale = HEAD_DIM ** -0.5
        shape = 2 * max_distance + 2, HEAD_DIM
        self.k_rows = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.k_cols = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.v_rows = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.v_cols = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.init_weights()

    def init_weights(self) -> None:
        for table in self.parameters():
            trunc_normal_(table, std=.02)

    reset_parameters = init_weights  # the name that timm's weight_init='reset' calls

    def index(self, like: Tensor) -> RelativeIndex:
        """The constants that `attend` takes, with the dtype and device of `like`."""
        return relative_index(self.grid_size, self.num_prefix, self.max_distance, like)

    def _on_grid(self, x: Tensor) -> Tensor:
        """Patch tokens of [B, heads, tokens, C] as [B, heads, rows, columns, C]."""
        return x[:, :, self.num_prefix:].unflatten(2, self.grid_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, index: RelativeIndex, dropout: float = 0.,
               attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Exact attention with relative position through one fused call; all tensors are [B, heads, tokens, 64].

        Each key (and value) is extended by its one-hot row, one-hot column and class flag, each query by its dot
        products with the tables. One attention then adds the key term to its logits, and returns in the extra value
        columns the attention mass per row, per column and on the class token, which the value tables turn into the
        value term. The key term of the class token as a *query* is the same for every key, so softmax drops it.
        """
        rows, cols = self.grid_size
        prefix, padding = self.num_prefix, fused_columns(self.grid_size) - rows - cols - 1

        by_row, by_col, by_class = _read_tables(self.k_rows, self.k_cols, index)
        patches = self._on_grid(q)
        extra = torch.cat([
            torch.einsum('bhrcd,rsd->bhrcs', patches, by_row).flatten(2, 3),
            torch.einsum('bhrcd,csd->bhrcs', patches, by_col).flatten(2, 3),
            (q[:, :, prefix:] * by_class).sum(-1, keepdim=True).to(q.dtype),
        ], dim=-1)
        extra = F.pad(extra, [0, padding, prefix, 0])
        columns = index.columns.to(q.dtype).expand(k.shape[0], k.shape[1], -1, -1)
        x = F.scaled_dot_product_attention(
            torch.cat([q, extra], dim=-1), torch.cat([k, columns], dim=-1), torch.cat([v, columns], dim=-1),
            attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale)

        by_row, by_col, by_class = _read_tables(self.v_rows, self.v_cols, index)
        x, row_mass, col_mass, class_mass, _ = x.split([v.shape[-1], rows, cols, 1, padding], dim=-1)
        value = class_mass[:, :, prefix:] * by_class
        value = value + torch.einsum('bhrcs,rsd->bhrcd', self._on_grid(row_mass), by_row).flatten(2, 3)
        value = value + torch.einsum('bhrcs,csd->bhrcd', self._on_grid(col_mass), by_col).flatten(2, 3)
        if prefix > 0:
            # every key is at the class distance from the class token (masses sum to one, dropout aside)
            mass = row_mass[:, :, :1].sum(-1, keepdim=True) + class_mass[:, :, :1]
            value = torch.cat([mass * by_class, value], dim=2)
        return x + value.to(x.dtype)

    def attend_plainly(self, q: Tensor, k: Tensor, v: Tensor, index: RelativeIndex, dropout: float = 0.,
                       attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`attend` by its definition, with tables of [tokens, tokens, 64]: slow, but needs no fused attention."""
        by_pair = _read_pairs(self.k_rows, self.k_cols, index, self.num_prefix)
        logits = (q @ k.transpose(-2, -1) + torch.einsum('bhqd,qkd->bhqk', q, by_pair)) * self.scale
        logits = maybe_add_mask(logits, resolve_self_attn_mask(q.shape[2], logits, attn_mask, is_causal))
        attention = F.dropout(logits.softmax(dim=-1), dropout, training=dropout > 0)
        by_pair = _read_pairs(self.v_rows, self.v_cols, index, self.num_prefix)
        return attention @ v + torch.einsum('bhqk,qkd->bhqd', attention, by_pair)


def extend_table(table: Tensor, trained: int, max_distance: int) -> Tensor:
    """A relative-position table for other distances: rows beyond the trained ones repeat the last trained row.

    Args:
        table: [2M + 2, 64].
        trained: The largest distance that was ever read, such as grid side - 1; rows further out hold initial noise.
        max_distance: M of the returned table, [2 * max_distance + 2, 64].
    """
    limit = table.shape[0] // 2 - 1
    reach = min(trained, limit)
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device).clamp(-reach, reach)
    return torch.cat([table[:1], table[distance + limit + 1]])


class RelativeAttention(Attention):
    """timm's attention with heads of 64 channels and, if `rel_pos` is set, 2D relative position."""

    def __init__(self, dim: int, num_heads: int, **kwargs) -> None:
        super().__init__(dim, num_heads, attn_head_dim=HEAD_DIM, **kwargs)
        self.rel_pos = None  # a RelativePosition2d, set by networks that use it

    def attend(self, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
               index: RelativeIndex | None = None) -> Tensor:
        """[B, tokens, 3 * 64 * heads] -> [B, heads, tokens, 64]."""
        batch, tokens, _ = qkv.shape
        q, k, v = qkv.reshape(batch, tokens, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.
        if self.rel_pos is not None:
            if index is None:
                index = self.rel_pos.index(q)
            if self.fused_attn:
                return self.rel_pos.attend(q, k, v, index, dropout, attn_mask, is_causal)
            return self.rel_pos.attend_plainly(q, k, v, index, dropout, attn_mask, is_causal)
        if self.fused_attn:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        logits = q * self.scale @ k.transpose(-2, -1)
        logits = maybe_add_mask(logits, resolve_self_attn_mask(q.shape[2], logits, attn_mask, is_causal))
        return F.dropout(logits.softmax(dim=-1), dropout, self.training) @ v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                index: RelativeIndex | None = None) -> Tensor:
        x = self.attend(self.qkv(x), attn_mask, is_causal, index)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class RelativeBlock(Block):
    """timm's pre-norm block; it passes the constants of relative position on to its attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                index: RelativeIndex | None = None) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), attn_mask, is_causal, index))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
