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


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of timm's data config, what turns an image into a network's input in evaluation."""
    return {name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}


class StepBatches:
    """Batches that are a function of (seed, step) alone, for scores that must compare and runs that must resume.

    Images get timm's evaluation transform: no augmentation, so nothing is random but the choice of images. No random
    state of the process is read or written.

    With workers, the batches of the steps that follow are read ahead by other processes; a step out of sequence starts
    them anew. Number the steps consecutively, therefore: count shift updates, not optimizer updates.

    Args:
        dataset: A view, whose own transform is not used, or a dataset without a transform.
        batch_size: Images in a batch, all different; at most `len(dataset)` are taken.
        seed: Any integer.
        input_size: Channels, height, width.
        mean: Per channel, of values in [0, 1].
        std: Per channel, likewise.
        interpolation: 'bilinear', 'bicubic', ...
        crop_pct: Share of the resized image's edge that the centre crop keeps.
        workers: Processes that read ahead; 0 reads in this one.
        crop_mode: As in `timm.data.create_transform`, so that `**timm.data.resolve_data_config(...)` fits.

    Raises:
        ValueError: If the dataset is empty or cannot be viewed, or `batch_size` or `workers` is not a count.
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
        for name, value, least in (('batch_size', batch_size, 1), ('workers', workers, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f'{name}={value!r} must be an integer, {least} or more')
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
        if not len(view):
            raise ValueError('the dataset is empty; batches need at least one image')
        self.view = view.with_transform(transform)
        self.batch_size = min(batch_size, len(view))
        self.seed = seed
        self.workers = workers
        self._stream = None  # iterator over the batches from step `_next` on, while workers run
        self._next = None

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step.

        Returns:
            Normalised images, float32 [B, C, H, W], and targets, int64 [B].

        Raises:
            ValueError: If the step is not a non-negative integer.
            BrokenImageError: If a file cannot be read.
            RuntimeError: If a worker failed or was killed; the next call starts new ones.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f'step={step!r} must be an integer, 0 or more')
        if self.workers == 0:
            images, targets = default_collate([self.view[i] for i in self.indices(step)])
            return images, targets.long()
        if step != self._next:
            self.close()
            self._stream = self._read_ahead(step)
        self._next = None  # until the batch is here: what interrupts this call also loses the place in the stream
        try:
            images, targets = next(self._stream)
        except Exception as error:
            # The traceback holds the iterator in a cycle; torch stalls for seconds where that is collected later.
            traceback.clear_frames(error.__traceback__)
            self.close()
            if isinstance(error, (RuntimeError, OSError, EOFError)):  # what torch lets out depends on the moment
                raise RuntimeError(f'a process that reads batches ahead failed or was killed: {error!r}') from error
            raise
        self._next = step + 1
        return images, targets.long()

    def indices(self, step: int) -> list[int]:
        """Positions in the view that the batch of a step is made of."""
        return _draw(self.seed, step, len(self.view), self.batch_size)

    def close(self) -> None:
        """Stop the workers, if any; a later `batch` starts new ones."""
        self._stream = self._next = None

    def _read_ahead(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        draw = functools.partial(_draw, self.seed, count=len(self.view), size=self.batch_size)
        loader = DataLoader(
            self.view,
            # Not a map of `self.indices`: a cycle through this object would keep the workers after its end.
            batch_sampler=map(draw, itertools.count(step)),
            num_workers=self.workers,
            generator=torch.Generator(),  # without one, the loader draws from the process's random state
        )
        return iter(loader)


def _draw(seed: int, step: int, count: int, size: int) -> list[int]:
    """Draw `size` of `count` positions, all different, as a function of the arguments alone."""
    # A hash keeps (seed, step) and (seed + 1, step - 1) unrelated, which a sum would not.
    digest = hashlib.sha256(f'{seed} {step}'.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], 'little'))
    return torch.randperm(count, generator=generator)[:size].tolist()
