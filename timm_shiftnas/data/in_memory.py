"""Images held in memory as arrays: the base of our own data sources."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

__all__ = ['PixelImages', 'apply_transforms', 'is_training_split']

TRAIN_SPLITS = ('train', 'training')
EVAL_SPLITS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')


def is_training_split(dataset: str, split: str) -> bool:
    """Whether a split is for training, by timm's synonyms.

    Raises:
        ValueError: If it is neither for training nor for validation.
    """
    if split not in TRAIN_SPLITS + EVAL_SPLITS:
        raise ValueError(f"{dataset} has no split {split!r}; choose 'train' or 'validation'")
    return split in TRAIN_SPLITS


def apply_transforms(dataset: Any, image: Any, target: int) -> tuple[Any, int]:
    """Apply the `transform` and `target_transform` of a dataset to one of its items."""
    if dataset.transform is not None:
        image = dataset.transform(image)
    if dataset.target_transform is not None:
        target = dataset.target_transform(target)
    return image, target


class PixelImages(Dataset):
    """The grey images of an array, as PIL images with targets.

    Args:
        pixels: uint8 [N, height, width].
        targets: N class indices.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB' or 'L'.
        transform: Applied to the image.
        target_transform: Applied to the target.
    """

    def __init__(
            self,
            pixels: np.ndarray,
            targets: Sequence[int],
            input_img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        self.pixels = pixels
        self.targets = list(targets)
        self.input_img_mode = input_img_mode
        self.transform = transform
        self.target_transform = target_transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.pixels[index]).convert(self.input_img_mode)
        return apply_transforms(self, image, self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)
