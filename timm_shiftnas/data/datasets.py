"""Images: timm's datasets with clear errors, a data source of our own, the held-out split, batches for shift scores.

Everything that timm reads is read by timm. Added are `sklearn/digits` (real images that need no download) and `glyphs`
(rendered letters); an error in place of timm's skip where an image file is broken, unless asked for; and views: parts
of a dataset that have a transform of their own, because timm's `create_loader` sets `transform` on the dataset it is
given (which breaks `Subset`).
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

from ..utils.text import one_line
from .glyphs import Glyphs
from .in_memory import PixelImages, is_training, transformed

__all__ = ['BrokenImageError', 'create_dataset']

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
        raise ValueError(f'cannot open dataset {called}: {one_line(error)}') from error
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
            reason = 'it is in no known image format' if unknown else one_line(error) or type(error).__name__
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



# -- views -------------------------------------------------------------------------------------------------------------


# -- batches for probability shift -------------------------------------------------------------------------------------


