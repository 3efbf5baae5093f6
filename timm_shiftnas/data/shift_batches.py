"""Batches for the probability shift: functions of (seed, step) alone."""
from __future__ import annotations

import functools
import hashlib
import itertools
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from .views import DatasetView

__all__ = ['StepBatches', 'preprocessing']

Batch = tuple[torch.Tensor, torch.Tensor]  # images [B, C, H, W], targets [B]


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of timm's data config that define the evaluation transform."""
    return {name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}


class StepBatches:
    """Batches that are a function of (seed, step), so that scores are comparable and runs can be resumed.

    Images get timm's evaluation transform: there is no augmentation, and only the choice of images is random. The
    random states of the process are neither read nor written.

    With workers, other processes read the batches of the following steps ahead. A step out of sequence restarts them,
    so number the steps consecutively: count shift updates, not optimizer updates.

    Args:
        dataset: A view, whose own transform is not used, or a dataset without a transform.
        batch_size: Images in a batch, all different; at most `len(dataset)` are taken.
        seed: Any integer.
        input_size: Channels, height, width.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, of values in [0, 1].
        interpolation: 'bilinear', 'bicubic', ...
        crop_pct: Share of the resized image's edge that the centre crop keeps.
        workers: Processes that read ahead; with 0, this process reads.
        crop_mode: As in `timm.data.create_transform`, so that `**timm.data.resolve_data_config(...)` fits.

    Raises:
        ValueError: If the dataset is empty or cannot be viewed, or `batch_size` is not positive.
    """

    def __init__(
            self,
            dataset: Dataset,
            batch_size: int,
            seed: int,
            input_size: tuple[int, int, int],
            mean: tuple[float, ...],
            std: tuple[float, ...],
            interpolation: str = 'bicubic',
            crop_pct: float | None = None,
            workers: int = 0,
            crop_mode: str | None = None,
    ) -> None:
        transform = timm.data.create_transform(
            input_size,
            is_training=False,
            interpolation=interpolation,
            mean=mean,
            std=std,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        view = dataset if isinstance(dataset, DatasetView) else DatasetView(dataset, torch.arange(len(dataset)))
        if min(batch_size, len(view)) < 1:
            raise ValueError(
                f'batch_size={batch_size!r} of a dataset of {len(view)} images; both must be at least 1')
        self.view = view.with_transform(transform)
        self.batch_size = min(batch_size, len(view))
        self.seed = seed
        self.workers = workers
        self._stream: Iterator[Batch] | None = None  # batches from step `_next` on, while workers run
        self._next: int | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Returns:
            Normalised images, float32 [B, C, H, W], and targets, int64 [B].

        Raises:
            BrokenImageError: If a file cannot be read.
            RuntimeError: If a worker failed or was killed; the next call starts new ones.
        """
        if self.workers == 0:
            images, targets = default_collate([self.view[i] for i in self.indices(step)])
            return images, targets.long()
        if step != self._next:
            self.close()
            self._stream = self._read_ahead(step)
        self._next = None  # an interruption before the batch arrives also loses the position in the stream
        try:
            images, targets = next(self._stream)
        except Exception as error:
            # The traceback keeps the iterator alive in a cycle; collecting it later stalls torch for seconds.
            traceback.clear_frames(error.__traceback__)
            self.close()
            if isinstance(error, (RuntimeError, OSError, EOFError)):  # which of these torch raises depends on timing
                raise RuntimeError(f'a worker that reads batches ahead failed or was killed: {error!r}') from error
            raise
        self._next = step + 1
        return images, targets.long()

    def indices(self, step: int) -> list[int]:
        """Positions in the view of the images of a step."""
        return _draw_indices(self.seed, step, len(self.view), self.batch_size)

    def close(self) -> None:
        """Stop the workers, if any; a later `batch` starts new ones."""
        self._stream = self._next = None

    def _read_ahead(self, step: int) -> Iterator[Batch]:
        draw = functools.partial(_draw_indices, self.seed, count=len(self.view), size=self.batch_size)
        loader = DataLoader(
            self.view,
            # Not a map of `self.indices`: a reference to this object would keep the workers alive after it.
            batch_sampler=map(draw, itertools.count(step)),
            num_workers=self.workers,
            generator=torch.Generator(),  # without one, the loader draws from the random state of the process
        )
        return iter(loader)


def _draw_indices(seed: int, step: int, count: int, size: int) -> list[int]:
    """Draw `size` of `count` positions, all different, as a function of the arguments."""
    # Not `utils.stream_seed`: another digest would draw other images and change published figures.
    digest = hashlib.sha256(f'{seed} {step}'.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little'))
    return torch.randperm(count, generator=generator)[:size].tolist()
