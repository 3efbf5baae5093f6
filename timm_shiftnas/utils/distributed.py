"""The processes of `torch.distributed` that train one network together. A single process communicates nothing.

The generator and P are not part of `DistributedDataParallel`. They stay equal in all processes because every process
draws from the same random streams and learns from sums over all processes.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ['Ranks']

Item = TypeVar('Item')


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Args:
        rank: Index of this process, 0 to `size - 1`.
        size: Number of processes.
        device: Device on which the backend exchanges tensors.
    """
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device('cpu')

    @classmethod
    def current(cls, device: torch.device | str = 'cpu') -> Ranks:
        """The ranks of the default process group, or a single process if there is none.

        Args:
            device: The accelerator of this process, for backends such as nccl that exchange nothing else.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        exchanged_on = 'cpu' if dist.get_backend() in ('gloo', 'mpi') else device
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(exchanged_on))

    @property
    def primary(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this process works on: every `size`-th one."""
        return items[self.rank::self.size]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; the sum is equal in all of them, bit for bit."""
        if self.size == 1:
            return
        # one message in one precision; it copies the tensors, which may be all weights of a network
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(self.device)
        dist.all_reduce(flat)
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        self.sum_(tensors)
        if self.size > 1:
            torch._foreach_div_(list(tensors), self.size)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks; for small values that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
