"""Images: timm's datasets with clear errors, a data source of our own, the held-out split, batches for shift scores.

Everything that timm reads is read by timm. Added are `sklearn/digits` (real images that need no download) and `glyphs`
(rendered letters); an error in place of timm's skip where an image file is broken, unless asked for; and views: parts
of a dataset that have a transform of their own, because timm's `create_loader` sets `transform` on the dataset it is
given (which breaks `Subset`).
"""
from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import tarfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .glyphs import Glyphs
from .pixels import PixelImages, is_training, transformed

__all__ = ['BrokenImageError', 'DatasetView', 'StepBatches', 'create_dataset', 'preprocessing', 'split_held_out']

_logger = logging.getLogger('train')
MOST_BROKEN = 50  # files in a row that `skip_broken` steps over: more are no accident
TIMM_SOURCES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # prefixes of names that are not folders or tars of images


class BrokenImageError(ValueError):
    """An image file cannot be read; the message is one line that names the file, wherever the file was read.

    A `DataLoader` re-raises an error of a worker as `type(error)(text)`, where `text` is the worker's whole traceback.
    Its last line is the message, and nothing else is kept, so `str(error)` is the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__qualname__}: '))


# -- datasets ----------------------------------------------------------------------------------------------------------


def create_dataset(
        name: str,
        root: str | os.PathLike | None,
        split: str,
        glyphs: Mapping[str, Any] | None = None,
        skip_broken: bool = False,
        **kwargs: Any,
) -> Dataset:
    """A dataset by timm's name, or one of our own.

    Args:
        name: 'sklearn/digits', 'glyphs', or anything that `timm.data.create_dataset` takes ('' is a folder or tar of
            images).
        root: Data folder; an image folder holds SPLIT/CLASS/IMAGE. For 'glyphs' a folder of fonts, `None` for those of
            matplotlib. Not used by 'sklearn/' names.
        split: Name of the split; timm's synonyms are understood. '' takes an image folder itself as the split.
        glyphs: `images`, `difficulty` and `pixels` of 'glyphs'; see `glyphs.Glyphs`.
        skip_broken: In the place of an image file that cannot be read, give the next one that can, with a warning.
        **kwargs: Further arguments of `timm.data.create_dataset`; those that do not apply to a source are ignored by
            ours as they are by timm.

    Returns:
        A dataset of (PIL image, int target) with the attributes `transform` and `target_transform`, both `None` unless
        given. A broken file in a folder or tar of images raises a `BrokenImageError` when it is read, unless
        `skip_broken`.

    Raises:
        ValueError: If the data folder or its split is missing, holds no images or fewer than two classes, if timm
            does not know the dataset, or if 'sklearn/' is followed by a name or split that does not exist.
        ImportError: If the dataset needs a package that is not installed.
    """
    source, separator, rest = name.partition('/')
    source = source.lower() if separator else ''
    if source == 'sklearn':
        if rest != 'digits':
            raise ValueError(f"dataset {name!r} is unknown; the only one of this source is 'sklearn/digits'")
        return Digits(split, **_ours(kwargs))
    if name == 'glyphs':
        return Glyphs(split, root or None, **dict(glyphs or {}, **_ours(kwargs)))
    root = None if root is None else os.fspath(root)
    is_files = source not in TIMM_SOURCES
    if is_files:
        _check_root(name, root)
        if os.path.isfile(root):
            # An open tar has one file position for all processes forked later: workers would read each other's bytes.
            kwargs = {'cache_tarfiles': False, **kwargs}
    try:
        dataset = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError, OSError, tarfile.TarError) as error:
        called = ' in '.join(repr(part) for part in (name, root) if part)
        raise ValueError(f'cannot open dataset {called}: {_one_line(error)}') from error
    if not is_files:
        return dataset
    _check_image_files(dataset, root, split if kwargs.get('search_split', True) else '')
    return ImageFiles(
        root,
        reader=dataset.reader,
        load_bytes=dataset.load_bytes,
        input_img_mode=dataset.input_img_mode,
        transform=dataset.transform,
        target_transform=dataset.target_transform,
        skip_broken=skip_broken,
    )


def _ours(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of timm's arguments, those that our own sources take."""
    names = ('input_img_mode', 'transform', 'target_transform')
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}


class ImageFiles(ImageDataset):
    """timm's dataset of image files, except that a file that cannot be read is an error that names it.

    timm logs a warning and returns the *next* image in its place, so what is trained on would change without notice.

    Args:
        *args, **kwargs: As for `timm.data.ImageDataset`.
        skip_broken: Do as timm does, and name the file.
    """

    def __init__(self, *args: Any, skip_broken: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_broken = skip_broken
        self._warned: set[int] = set()  # of this process: every worker warns once of each file

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for tried in range(MOST_BROKEN if self.skip_broken else 1):
            position = index if tried == 0 else (index + tried) % len(self)
            try:
                image, target = self._read(position)
                break
            except BrokenImageError as error:
                broken = error
                if self.skip_broken and position not in self._warned:
                    self._warned.add(position)
                    _logger.warning(f'{str(broken).partition(";")[0]}; the next image takes its place')
        else:
            tried = f'; {MOST_BROKEN} in a row cannot be read' if self.skip_broken else ''
            raise BrokenImageError(f'{broken}{tried}') from broken
        return transformed(self, image, target)

    def _read(self, index: int) -> tuple[Any, int]:
        path = self.filename(index, absolute=True)
        try:
            file, target = self.reader[index]
            with file:
                return file.read() if self.load_bytes else self._decode(file), target
        except Exception as error:  # what decoders raise: OSError, SyntaxError, struct.error, IndexError, ...
            unknown = isinstance(error, UnidentifiedImageError)
            reason = 'it is in no known image format' if unknown else _one_line(error) or type(error).__name__
            raise BrokenImageError(
                f'cannot read the image {path!r} ({reason}); repair or remove it, or train with --skip-broken-images'
            ) from error

    def _decode(self, file: Any) -> Image.Image:
        image = Image.open(file)
        image.load()
        return image.convert(self.input_img_mode) if self.input_img_mode else image


class Digits(PixelImages):
    """scikit-learn's 1,797 real 8 x 8 images of handwritten digits, as PIL images with targets 0..9.

    Four fifths are 'train' and one fifth is 'validation', each with the same share of every digit, always the same.

    Args:
        split: 'train' or 'validation', or one of timm's synonyms for them.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB' or 'L'.
        transform: Applied to the image.
        target_transform: Applied to the target.

    Raises:
        ValueError: If there is no such split.
        ImportError: If scikit-learn is not installed.
    """

    def __init__(
            self,
            split: str,
            input_img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        training = is_training('sklearn/digits', split)
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError(
                "sklearn/digits needs scikit-learn: run pip install 'timm_shiftnas[quickstart]'") from error
        digits = load_digits()
        pixels = (digits.images * 255 / 16).round().astype('uint8')  # scikit-learn's grey levels are 0..16
        train, held_out = train_test_split(
            range(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
        chosen = sorted(train if training else held_out)
        super().__init__(
            pixels[chosen], digits.target[chosen].tolist(), input_img_mode, transform, target_transform)


def _check_root(name: str, root: str | None) -> None:
    if not root:
        wanted = f'the dataset {name!r}, a folder of images,' if name else 'a folder of images'
        raise ValueError(f"{wanted} needs the path of that folder; without one, use the dataset 'sklearn/digits'")
    if not os.path.exists(root):
        raise ValueError(f'the data folder {root!r} does not exist; give a folder that holds SPLIT/CLASS/IMAGE files')
    if os.path.isfile(root) and not root.endswith('.tar'):
        raise ValueError(f'the data {root!r} is neither a folder nor a .tar file; give one of these')


def _check_image_files(dataset: ImageDataset, root: str, split: str) -> None:
    """Refuse what timm accepts in silence: a split that is not there (it reads *all* splits), a single class."""
    reader = dataset.reader
    if split and os.path.isdir(root) and os.path.abspath(reader.root) == os.path.abspath(root):
        found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        shown = ', '.join(found[:5]) + (', ...' if len(found) > 5 else '')
        raise ValueError(
            f'the data folder {root!r} has no folder for the split {split!r}; it holds: {shown or "no folders"} '
            "(an empty split name '' takes the folder itself)")
    classes = reader.class_to_idx if hasattr(reader, 'class_to_idx') else reader.class_name_to_idx  # folder, tar
    if len(classes) < 2:
        raise ValueError(
            f'the images in {reader.root!r} are of {len(classes)} class; at least two are needed, each in a folder '
            'of its own: SPLIT/CLASS/IMAGE')


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


# -- views -------------------------------------------------------------------------------------------------------------


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


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of timm's data config, what turns an image into a network's input in evaluation."""
    return {name: config[name] for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')}


# -- batches for probability shift -------------------------------------------------------------------------------------


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
