"""Parts of a dataset, each with its own transform."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .in_memory import transformed

__all__ = ['DatasetView', 'split_held_out']


class DatasetView(Dataset):
    """Some images of a dataset, under a transform of their own: several views share one base without disturbing it.

    Args:
        base: A dataset of (image, target), random access, without a transform.
        indices: Which images, in which order; integers in [0, len(base)).
        transform: Applied to the base's image; `timm.data.create_loader` sets it.
        target_transform: Applied to the base's target.

    Raises:
        ValueError: If the base streams its images or has a transform already.
    """

    def __init__(
            self,
            base: Dataset,
            indices: Sequence[int] | torch.Tensor,
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        if isinstance(base, IterableDataset):
            raise ValueError(
                f'{type(base).__name__} streams its images, and a part of it cannot be taken; use a dataset with '
                'random access, such as a folder of images or hfds/')
        if getattr(base, 'transform', None) is not None:
            raise ValueError('the dataset has a transform already; take views of it before it is given one')
        self.base = base
        self.indices = torch.as_tensor(indices, dtype=torch.long)  # a tensor: workers share it, unlike a list of ints
        self.transform = transform
        self.target_transform = target_transform

    def with_transform(self, transform: Callable | None) -> DatasetView:
        """Another view of the same images."""
        return DatasetView(self.base, self.indices, transform, self.target_transform)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.base[int(self.indices[index])]
        return transformed(self, image, target)

    def __len__(self) -> int:
        return len(self.indices)


def split_held_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[DatasetView, DatasetView]:
    """Split off images that the weights are not trained on: probability shift measures its progress with them.

    Args:
        dataset: A dataset of (image, target), random access, without a transform.
        share: Share of the images to hold out, in (0, 0.5]; at least one is.
        seed: The split is a function of it and of `len(dataset)`.

    Returns:
        The part to train on and the held-out part, both in the dataset's order.

    Raises:
        ValueError: If the share is out of range, or the dataset has fewer than two images or cannot be split.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 0.5:
        raise ValueError(f'the held-out share {share!r} is out of range; give a share in (0, 0.5], such as 0.02')
    everything = DatasetView(dataset, [])  # checks the dataset before its length is asked for
    count = len(everything.base)
    if count < 2:
        raise ValueError(f'a dataset of {count} image cannot be split; give two or more')
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = max(1, round(share * count))
    return DatasetView(dataset, order[held_out:].sort().values), DatasetView(dataset, order[:held_out].sort().values)
