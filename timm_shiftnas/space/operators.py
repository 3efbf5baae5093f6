"""The operators of the networks of a family: what each computes, writes, stores and leaves in memory.

One table gives bytes of weights, peak memory and the features of latency. Its columns are polynomials in one-hot
encodings, like MACs and parameters.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .core import OneHots

__all__ = ['COLUMNS', 'OperatorTable']

COLUMNS = ('active', 'macs', 'writes', 'live', 'matrix', 'rows', 'vectors', 'statistics')


class OperatorTable:
    """All operators of the deepest network of a space, for archs given as one-hots.

    The columns, each [..., operators], are 0 where an arch does not have the operator:

    * `active`: how many of this operator there are, 0 or 1;
    * `macs`: its multiply-accumulates per image;
    * `writes`: the values of its output;
    * `live`: the values (of 4 bytes) of all tensors that exist when it has finished, at batch 1 in eager mode in single
      precision: images, what the frames of Python still hold, and its output. It may be 0 where another operator of the
      arch leaves more in every case;
    * `matrix`: the entries of its weight, which quantisation to int8 reduces to a byte each, and `rows`, its output
      channels, each of which then has a scale;
    * `vectors`: its other parameters (biases, norms, tables, positions);
    * `statistics`: the channels of BatchNorm.

    Args:
        one_hots: One tensor [..., number of values] per choice.
    """

    def __init__(self, one_hots: OneHots) -> None:
        self._like = one_hots[0][..., 0]
        self._rows: list[tuple[str, dict[str, Tensor]]] = []

    def add(self, kind: str, active: Tensor | float = 1., **values: Tensor | float) -> None:
        """Add an operator, or one for each layer.

        Args:
            kind: What it does, such as 'linear': a latency has one price for each kind.
            active: 1 where an arch has it: a number, [...], or [..., layers].
            **values: Further columns, each a number or of such a shape; 0 if left out.
        """
        given = [value for value in (active, *values.values()) if isinstance(value, Tensor)]
        layers = max((value.shape[-1] for value in given if self._has_layers(value)), default=1)

        def column(value: Tensor | float) -> Tensor:
            if not isinstance(value, Tensor):
                value = torch.full_like(self._like, float(value))
            return (value if self._has_layers(value) else value[..., None]).expand(*self._like.shape, layers)

        exists = column(active)
        columns = {name: exists * column(value) for name, value in values.items()}
        self._rows.append((kind, {'active': exists, **columns}))

    def _has_layers(self, value: Tensor) -> bool:
        return value.dim() > self._like.dim()

    def column(self, name: str) -> Tensor:
        """One of `COLUMNS`, [..., operators]."""
        return torch.cat([
            row.get(name, torch.zeros_like(row['active'])) for _, row in self._rows], dim=-1)

    def sums(self, *names: str) -> Mapping[tuple[str, str], Tensor]:
        """The sums of columns over the operators of each kind, [...], by (kind, column)."""
        found: dict[tuple[str, str], Tensor] = {}
        for kind, row in self._rows:
            for name in names:
                if name in row:
                    found[kind, name] = found.get((kind, name), 0.) + row[name].sum(-1)
        return found
