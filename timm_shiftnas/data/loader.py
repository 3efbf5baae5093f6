"""Training batches that are functions of (seed, epoch, position), and epochs that can start at any batch."""
from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ..utils.distributed import Ranks
from ..utils.streams import seed_process, stream_seed

__all__ = ['TrainLoader']


class TrainLoader:
    """timm's training loader, with epochs that are functions of (seed, epoch) and can start at any batch.

    All processes share one order of the images of an epoch, and each takes every `size`-th image. So a global batch
    holds the same images with the same augmentation for any number of processes. The last images are dropped if they
    do not fill a batch in each process. Datasets that stream their images are read as timm reads them; batches before
    the start are read and discarded.

    Args:
        loader: The result of `timm.data.create_loader` for one process, without persistent workers.
        seed: Seed of the order and of everything random in a batch.
        ranks: The processes that share an epoch.
        repeats: Repetitions of each image in an epoch: timm's repeated augmentation (Hoffer et al., CVPR 2020).
    """

    def __init__(self, loader: DataLoader | PrefetchLoader, seed: int, ranks: Ranks = Ranks(),
                 repeats: float = 0) -> None:
        self._prefetch = loader if isinstance(loader, PrefetchLoader) else None
        self._loader: DataLoader = loader.loader if self._prefetch else loader
        self.seed, self.ranks = seed, ranks
        self._sampler = None
        if not isinstance(self._loader.dataset, IterableDataset):
            self._sampler = (
                RepeatAugSampler(self._loader.dataset, ranks.size, ranks.rank, num_repeats=repeats) if repeats
                else DistributedSampler(self._loader.dataset, ranks.size, ranks.rank))

    def __len__(self) -> int:
        """Number of batches of an epoch in this process."""
        if self._sampler is None:
            return len(self._loader)
        return len(self._sampler) // self._loader.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches (images [B, C, H, W], targets) of an epoch from the `start`-th on.

        Reading a batch sets the random states of the process: seed them again before drawing anything else.
        """
        batches = _Batches(self, epoch, start)
        if self._prefetch is None:
            return iter(batches)
        self._prefetch.loader = batches
        return iter(self._prefetch)

    def read(self, epoch: int, start: int) -> Iterator[Any]:
        """The loader's batches before prefetching."""
        if self._sampler is None:
            self._loader.dataset.set_epoch(epoch)
            seed_process(self.seed, f'stream/{self.ranks.rank}', epoch)  # the loader draws the workers' seeds
            yield from (batch for number, batch in enumerate(self._loader) if number >= start)
            return
        self._sampler.set_epoch(stream_seed(self.seed, 'order', epoch))
        loader = DataLoader(
            _SeededImages(self._loader.dataset, self.seed, epoch), batch_sampler=self._positions(start),
            num_workers=self._loader.num_workers, collate_fn=self._loader.collate_fn,
            pin_memory=self._loader.pin_memory, generator=torch.Generator())
        yield from loader

    def _positions(self, start: int) -> Iterator[list[tuple[int, int]]]:
        """Batches of (index in the dataset, position in the epoch of all processes)."""
        indices, size = list(self._sampler), self._loader.batch_size
        for number in range(start, len(self)):
            yield [(indices[i], i * self.ranks.size + self.ranks.rank)
                   for i in range(number * size, (number + 1) * size)]


class _Batches:
    """The batches given to a `PrefetchLoader`. Seeds the process before each one, for random erasing."""

    def __init__(self, loader: TrainLoader, epoch: int, start: int) -> None:
        self.loader, self.epoch, self.start = loader, epoch, start

    def __iter__(self) -> Iterator[Any]:
        purpose = f'batch/{self.epoch}/{self.loader.ranks.rank}'
        for number, batch in enumerate(self.loader.read(self.epoch, self.start), self.start):
            seed_process(self.loader.seed, purpose, number)
            yield batch


class _SeededImages(Dataset):
    """A dataset whose augmentation is seeded by the position of an image in the epoch."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.purpose = dataset, seed, f'image/{epoch}'

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, position = key
        seed = stream_seed(self.seed, self.purpose, position)
        random.seed(seed)
        np.random.seed(seed % 2 ** 32)
        torch.default_generator.manual_seed(seed)  # the CPU's only: workers use no other device
        return self.dataset[index]
