"""Datasets by name: those of timm, with an error for broken image files, and two that need no download.

timm reads everything that it can read. Two sources are added: `sklearn/digits` (real images) and `glyphs` (rendered
letters). Where an image file is broken, timm returns the next image; here that is an error, unless asked for.
"""
from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable, Mapping
from typing import Any

import timm.data
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ..utils.paths import expand_home
from ..utils.text import one_line
from .glyphs import Glyphs
from .in_memory import PixelImages, apply_transforms, is_training_split

__all__ = ['BrokenImageError', 'create_dataset']

_logger = logging.getLogger('train')
MAX_BROKEN = 50  # files in a row that `skip_broken` replaces: more are not an accident
TIMM_SOURCES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # prefixes of names that are not folders or tars of images
OWN_OPTIONS = ('input_img_mode', 'transform', 'target_transform')  # timm's arguments that our own sources take


class BrokenImageError(ValueError):
    """An image file cannot be read. The message is one line that names the file.

    A `DataLoader` re-raises an error of a worker as `type(error)(text)`, where `text` is the worker's traceback. Only
    its last line, the message, is kept, so `str(error)` is the same with and without workers.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f'{type(self).__module__}.{type(self).__qualname__}: '))


def create_dataset(
        name: str,
        root: str | os.PathLike | None,
        split: str,
        glyphs: Mapping[str, Any] | None = None,
        skip_broken: bool = False,
        **kwargs: Any,
) -> Dataset:
    """Create a dataset by its name in timm, or one of our own.

    Args:
        name: 'sklearn/digits', 'glyphs', or anything that `timm.data.create_dataset` takes ('' is a folder or tar of
            images).
        root: Data folder; an image folder holds SPLIT/CLASS/IMAGE. For 'glyphs' a folder of fonts, or `None` for those
            of matplotlib. Not used by 'sklearn/digits'.
        split: Name of the split or one of timm's synonyms. '' takes an image folder itself as the split.
        glyphs: `images`, `difficulty` and `pixels` of 'glyphs'; see `glyphs.Glyphs`.
        skip_broken: Replace an image file that cannot be read by the next one that can, with a warning.
        **kwargs: Further arguments of `timm.data.create_dataset`. Like timm, our own sources ignore those that do not
            apply to them.

    Returns:
        A dataset of (PIL image, int target) with the attributes `transform` and `target_transform`, both `None` unless
        given. Reading a broken file of a folder or tar of images raises a `BrokenImageError`, unless `skip_broken`.

    Raises:
        ValueError: If the dataset or its split is unknown or missing, or a folder has fewer than two classes of images.
        ImportError: If the dataset needs a package that is not installed.
    """
    own = {option: kwargs[option] for option in OWN_OPTIONS if kwargs.get(option) is not None}
    source, separator, rest = name.partition('/')
    source = source.lower() if separator else ''
    if source == 'sklearn':
        if rest != 'digits':
            raise ValueError(f"dataset {name!r} is unknown; use 'sklearn/digits'")
        return Digits(split, **own)
    root = None if root is None else expand_home(root)
    if name == 'glyphs':
        return Glyphs(split, root or None, **dict(glyphs or {}, **own))
    is_files = source not in TIMM_SOURCES
    if is_files and not os.path.exists(root or ''):
        raise ValueError(
            f"dataset {name!r}: the data folder {root!r} does not exist; give a folder that holds SPLIT/CLASS/IMAGE "
            "files, or use the dataset 'sklearn/digits'")
    if is_files and os.path.isfile(root):
        # An open tar has one file position for all processes forked later: workers would read each other's bytes.
        kwargs = {'cache_tarfiles': False, **kwargs}
    try:
        dataset = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError, OSError, tarfile.TarError) as error:
        raise ValueError(
            f'cannot open dataset {name!r} in {root!r}: {one_line(error)}; check --dataset and --data-dir') from error
    if not is_files:
        return dataset
    _validate_folder(dataset, root, split if kwargs.get('search_split', True) else '')
    return ImageFiles(
        root,
        reader=dataset.reader,
        load_bytes=dataset.load_bytes,
        input_img_mode=dataset.input_img_mode,
        transform=dataset.transform,
        target_transform=dataset.target_transform,
        skip_broken=skip_broken,
    )


def _validate_folder(dataset: ImageDataset, root: str, split: str) -> None:
    """Reject what timm accepts in silence: a missing split, for which it reads *all* splits, and a single class."""
    reader = dataset.reader
    if split and os.path.isdir(root) and os.path.samefile(reader.root, root):
        found = ', '.join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:5])
        raise ValueError(
            f'the data folder {root!r} has no folder for the split {split!r}, but: {found or "no folders"}; give the '
            "name of one, or '' to use the folder itself")
    classes = reader.class_to_idx if hasattr(reader, 'class_to_idx') else reader.class_name_to_idx  # folder, tar
    if len(classes) < 2:
        raise ValueError(
            f'the images in {reader.root!r} have {len(classes)} class; give at least two, each in its own folder: '
            'SPLIT/CLASS/IMAGE')


class ImageFiles(ImageDataset):
    """timm's dataset of image files, except that a file that cannot be read is an error that names it.

    timm logs a warning and returns the *next* image instead, which changes the training data without notice.

    Args:
        *args, **kwargs: As for `timm.data.ImageDataset`.
        skip_broken: Return the next image, as timm does, with a warning that names the file.
    """

    def __init__(self, *args: Any, skip_broken: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_broken = skip_broken
        self._warned: set[int] = set()  # every worker warns once about each file

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return apply_transforms(self, *(self._read_next(index) if self.skip_broken else self._read(index)))

    def _read_next(self, index: int) -> tuple[Any, int]:
        """The first image from `index` on that can be read, and its target."""
        for position in range(index, index + MAX_BROKEN):
            position %= len(self)
            try:
                return self._read(position)
            except BrokenImageError as error:
                broken = error
                if position not in self._warned:
                    self._warned.add(position)
                    _logger.warning(f'{str(broken).partition(";")[0]}; the next image takes its place')
        raise BrokenImageError(f'{broken}; {MAX_BROKEN} in a row cannot be read') from broken

    def _read(self, index: int) -> tuple[Any, int]:
        """An image and its target, before transforms."""
        path = self.filename(index, absolute=True)
        try:
            file, target = self.reader[index]
            with file:
                return file.read() if self.load_bytes else self._decode(file), target
        except Exception as error:  # what decoders raise: OSError, SyntaxError, struct.error, IndexError, ...
            unknown = isinstance(error, UnidentifiedImageError)
            reason = 'not a known image format' if unknown else one_line(error) or type(error).__name__
            raise BrokenImageError(
                f'cannot read the image {path!r} ({reason}); repair or remove it, or train with --skip-broken-images'
            ) from error

    def _decode(self, file: Any) -> Image.Image:
        image = Image.open(file)
        image.load()
        return image.convert(self.input_img_mode) if self.input_img_mode else image


class Digits(PixelImages):
    """scikit-learn's 1,797 real 8 x 8 images of handwritten digits, as PIL images with targets 0..9.

    Four fifths are 'train' and one fifth is 'validation', with equal shares of every digit. The split is fixed.

    Args:
        split: 'train' or 'validation', or one of timm's synonyms for them.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB' or 'L'.
        transform: Applied to the image.
        target_transform: Applied to the target.

    Raises:
        ValueError: If the split is unknown.
        ImportError: If scikit-learn is not installed.
    """

    def __init__(
            self,
            split: str,
            input_img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        training = is_training_split('sklearn/digits', split)
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
