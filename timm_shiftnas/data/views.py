"""Parts of a dataset, each with its own transform."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .in_memory import apply_transforms

__all__ = ['DatasetView', 'default_share', 'split_held_out']


class DatasetView(Dataset):
    """Some images of a dataset, with their own transform. Several views can share one base dataset.

    torch's `Subset` has no transform: timm's `create_loader` would set that of the base, for all its subsets.

    Args:
        base: A dataset of (image, target) with random access and without a transform.
        indices: The images and their order; integers in [0, len(base)).
        transform: Applied to the image; `timm.data.create_loader` sets it.
        target_transform: Applied to the target.

    Raises:
        ValueError: If the base streams its images or already has a transform.
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
                f'{type(base).__name__} streams its images, so no part of it can be selected; use a dataset with '
                'random access, such as a folder of images or hfds/')
        if getattr(base, 'transform', None) is not None:
            raise ValueError('the dataset already has a transform; create views before setting one')
        self.base = base
        self.indices = torch.as_tensor(indices, dtype=torch.long)  # workers share a tensor, but copy a list
        self.transform = transform
        self.target_transform = target_transform

    def with_transform(self, transform: Callable | None) -> DatasetView:
        """Another view of the same images."""
        return DatasetView(self.base, self.indices, transform, self.target_transform)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.base[int(self.indices[index])]
        return apply_transforms(self, image, target)

    def __len__(self) -> int:
        return len(self.indices)


def default_share(dataset: Dataset) -> float:
    """The share of the images of a dataset that is held out unless another one is asked for."""
    return 0.02 if len(dataset) >= 20_000 else 0.05


def split_held_out(dataset: Dataset, share: float, seed: int = 0) -> tuple[DatasetView, DatasetView]:
    """Split off images that the weights are not trained on, for the probability shift or a search.

    Args:
        dataset: A dataset of (image, target) with random access and without a transform.
        share: Share of the images to hold out, in (0, 0.5]; at least one image.
        seed: The split is a function of it and of `len(dataset)`.

    Returns:
        The part to train on and the held-out part, both in the dataset's order.

    Raises:
        ValueError: If the share is out of range or the dataset cannot be split.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f'the held-out share {share!r} is out of range; give a share in (0, 0.5], such as 0.02')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(order)))
    return DatasetView(dataset, order[count:].sort().values), DatasetView(dataset, order[:count].sort().values)
