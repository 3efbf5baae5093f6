"""Resources that a subnet needs and a budget can bound, each a function of one-hot encodings.

MACs, parameters, bytes of weights and peak memory are exact; latency is predicted (see `latency`). All are
differentiable. The architecture generator, the budget groups, proposals, tables and pictures take a resource. For a
backbone, and for a network with your own head, peak memory and latency are unknown and raise a `ValueError`.

* `size`: bytes of the tensors in the file of an extracted subnet (its parameters, and the statistics of BatchNorm).
  In fp32 that is what `save_pretrained` writes beside a header. In fp16 every number that is not an integer has 2
  bytes. In int8 every entry of the weight of a convolution or a linear layer has 1 byte, and every output channel of it
  a scale of 4 bytes; all other tensors stay in fp32.
* `memory`: bytes of the tensors that exist at the same time, at most, in a forward pass at batch 1: eager mode on a CPU
  without gradients, in fp32, the images included. Weights are not, nor is what a kernel allocates for itself. In-place
  activations allocate nothing. It is a maximum over operators; its gradient is that of the operator with the highest
  peak.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from ..utils.units import format_quantity, parse_quantity
from . import complexity
from .core import Arch, OneHots, SearchSpace
from .families import family_of
from .heads import head_bytes

__all__ = ['LATENCY', 'MACS', 'MEMORY', 'NAMES', 'PARAMS', 'RESOURCES', 'Resource', 'SIZES', 'count_many']

BYTES = 4  # of a value in single precision
COUNTER = 8  # bytes of the counter of batches in every BatchNorm


@dataclass(frozen=True)
class Resource:
    """Something that a subnet needs, and that a budget bounds.

    Args:
        name: Its name in flags and files.
        keyword: The argument of `from_pretrained` that bounds it.
        label: What it counts, for tables, axes and messages.
        kind: Kind of quantity: 'count', 'bytes' or 'seconds'.
        measure: `measure(space, one_hots)`, a float64 tensor [...] for one-hots [..., number of values].
        device: The device file that it is read off, if it is not computed from the space alone.
        source: Tells resources of different device files apart.
    """
    name: str
    keyword: str
    label: str
    kind: str
    measure: Callable[[SearchSpace, OneHots], torch.Tensor] = field(repr=False, compare=False)
    device: Any = field(default=None, repr=False, compare=False)
    source: str = ''

    @overload
    def count(self, space: SearchSpace, arch: Arch) -> int | float: ...
    @overload
    def count(self, space: SearchSpace, arch: Sequence[Arch] | OneHots) -> torch.Tensor: ...

    def count(self, space: SearchSpace, arch: Any) -> Any:
        """Amount of the resource that an arch needs.

        Args:
            space: A bound search space.
            arch: An `Arch`; a sequence of N archs; or one-hots, one tensor of shape [..., number of values] per choice.

        Returns:
            A number for one arch (an int, or seconds), a tensor [N] for a sequence (int64, or float64 for seconds), a
            differentiable float64 tensor [...] for one-hots.

        Raises:
            ValueError: If the space is unbound, or the arch is not in it.
        """
        return complexity.evaluate(space, arch, self.measure, whole=self.kind != 'seconds')

    def range(self, space: SearchSpace) -> tuple[float, float]:
        """Amounts that the smallest and the largest arch need; all others lie between."""
        return self.count(space, space.smallest), self.count(space, space.largest)

    def parse(self, value: Any, name: str = '') -> float:
        """Read a budget: a number, or a text with a unit.

        Raises:
            ValueError: If it is not a positive number in a unit of this resource.
        """
        return parse_quantity(value, self.kind, name or self.keyword)

    def least(self, value: float) -> str:
        """A value as text to type, rounded up where it is rounded, so that the budget is not below it."""
        return str(value) if self.kind != 'seconds' else f'{math.ceil(value * 1e6) / 1e3:.12g}ms'

    def arguments(self, value: Any) -> dict[str, Any]:
        """The arguments of `from_pretrained` that bound it by a value; with dashes, the flags of `timm-shiftnas`."""
        more = dict(precision=self.name.removeprefix('size_')) if self.name.startswith('size_') else {}
        return {self.keyword: value, **more, **({} if self.device is None else dict(device_file=self.device.name))}

    def format(self, value: float) -> str:
        """A value with its unit, for people."""
        return format_quantity(value, self.kind)

    def describe(self, value: float) -> str:
        """A value with its unit and what it counts, such as '1.4G MACs'."""
        return f'{self.format(value)} {self.label}' if self.kind == 'count' else f'{self.format(value)} of {self.label}'


def count_many(space: SearchSpace, archs: Sequence[Arch], resources: Sequence[Resource]) -> list[dict[str, float]]:
    """Amounts that archs need, by name of the resource."""
    counts = [resource.count(space, archs).tolist() for resource in resources]
    return [dict(zip((resource.name for resource in resources), row, strict=True)) for row in zip(*counts, strict=True)]


def _memory(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    family = family_of(space)
    family.check_classifier(space, 'memory')
    return BYTES * family.operator_table(space, one_hots, 'memory').column('live').amax(-1)


def _size(matrix: int, row: int, other: int) -> Callable[[SearchSpace, OneHots], torch.Tensor]:
    """Bytes of a file, from the bytes of an entry of a matrix, of its output channel, and of every other number."""
    def measure(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
        table = family_of(space).operator_table(space, one_hots, 'size')
        matrices, rows, vectors, statistics = (
            table.column(name).sum(-1) for name in ('matrix', 'rows', 'vectors', 'statistics'))
        # every BatchNorm has a mean and a variance for each channel, and counts its batches
        norms = ((table.column('statistics') > 0) * table.column('active')).sum(-1)
        own = matrix * matrices + row * rows + other * (vectors + 2 * statistics) + COUNTER * norms
        return own + head_bytes(space, one_hots, matrix, row, other)

    return measure


def _of_no_device(space: SearchSpace, one_hots: OneHots) -> torch.Tensor:
    raise ValueError('a latency is read off a device file, which timm-shiftnas measure writes')


MACS = Resource('macs', 'flops', 'MACs', 'count', complexity.macs)
PARAMS = Resource('params', 'params', 'parameters', 'count', complexity.params)
MEMORY = Resource('memory', 'memory', 'peak memory', 'bytes', _memory)
SIZES = {
    'fp32': Resource('size', 'size', 'weights in fp32', 'bytes', _size(4, 0, 4)),
    'fp16': Resource('size_fp16', 'size', 'weights in fp16', 'bytes', _size(2, 0, 2)),
    'int8': Resource('size_int8', 'size', 'weights in int8', 'bytes', _size(1, BYTES, BYTES)),
}
RESOURCES = {resource.name: resource for resource in (MACS, PARAMS, *SIZES.values(), MEMORY)}
# latency without a device: only names, parses and formats; `Device.resource` returns the one that counts
LATENCY = Resource('latency', 'latency', 'latency', 'seconds', _of_no_device)
NAMES = (*RESOURCES, LATENCY.name)  # of all resources that a budget may bound
