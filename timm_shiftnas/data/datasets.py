"""Datasets by name: those of timm, with an error for broken image files, and two that need no download.

Two sources are added to timm's: `sklearn/digits` (real images) and `glyphs` (rendered letters). Folders and tars of
images are read by our reader, and image files by our decoder. For a broken image file, timm returns the next image;
here it is an error, unless `skip_broken`.
"""
from __future__ import annotations

import functools
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm.data
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from ..utils.paths import expand_home
from ..utils.text import one_line
from .decoding import Decoder
from .glyphs import Glyphs
from .image_reader import ImageReader
from .in_memory import PixelImages, apply_transforms, is_training_split

__all__ = ['BrokenImageError', 'class_names', 'create_dataset']

_logger = logging.getLogger('train')
MAX_BROKEN = 50  # files in a row that `skip_broken` replaces: more are not an accident
TIMM_SOURCES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # prefixes of names that are not folders or tars of images
MEASURED = 32  # images on which the range of grey levels is measured
# timm's arguments for streams and downloads, which folders and tars ignore; the decoder has the mode
NOT_FOR_FILES = (
    'batch_size', 'download', 'input_img_mode', 'is_training', 'num_samples', 'repeats', 'seed', 'trust_remote_code')
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
        upright: bool = True,
        min_classes: int = 2,
        **kwargs: Any,
) -> Dataset:
    """Create a dataset by its name in timm, or one of our own.

    Args:
        name: 'sklearn/digits', 'glyphs', or anything that `timm.data.create_dataset` takes ('' is a folder or tar of
            images).
        root: Data folder or tar of SPLIT/CLASS/IMAGE; see `image_reader`. For 'glyphs' a folder of fonts, or `None`
            for those of matplotlib. Not used by 'sklearn/digits'.
        split: Name of the split or one of timm's synonyms. '' takes an image folder itself as the split.
        glyphs: `images`, `difficulty` and `pixels` of 'glyphs'; see `glyphs.Glyphs`.
        skip_broken: Replace an image file that cannot be read by the next one that can, with a warning.
        upright: Turn photographs by the orientation in their EXIF data; timm does not.
        min_classes: Refuse a folder of fewer classes; 0 takes images that lie anywhere in it.
        **kwargs: Further arguments of `timm.data.create_dataset`. Like timm, our own sources ignore those that do not
            apply to them.

    Returns:
        A dataset of (PIL image, int target) with the attributes `transform` and `target_transform`, both `None` unless
        given. Reading a broken file of a folder or tar of images raises a `BrokenImageError`, unless `skip_broken`.

    Raises:
        ValueError: If the dataset or its split is unknown or missing, or a folder has too few classes of images.
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
    decoder = Decoder(own.get('input_img_mode', 'RGB'), upright)
    is_torch_folder = source == 'torch' and rest.lower() in ('image_folder', 'folder')
    is_files = is_torch_folder or source not in TIMM_SOURCES
    if is_files and not os.path.exists(root or ''):
        raise ValueError(
            f"dataset {name!r}: the data folder {root!r} does not exist; give a folder that holds SPLIT/CLASS/IMAGE "
            "files, or use the dataset 'sklearn/digits'")
    try:
        if is_files:
            options = {name: value for name, value in kwargs.items() if name not in NOT_FOR_FILES}
            order = str if is_torch_folder else natural_key  # torchvision's order of classes is not natural
            return _open_files(root, split, decoder, skip_broken, order, min_classes, **options)
        if source in ('wds', 'hfids'):
            kwargs['input_img_mode'] = ''  # the mode is set by the decoder
        dataset = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, TypeError, ValueError, OSError, tarfile.TarError) as error:
        raise ValueError(
            f'cannot open dataset {name!r} in {root!r}: {one_line(error)}; check --dataset and --data-dir') from error
    if source == 'hfds':
        return ImageFiles(dataset.reader, decoder, skip_broken, **transforms_of(dataset))
    if source in ('wds', 'hfids'):
        return ImageStream(dataset.reader, decoder, **transforms_of(dataset))
    if hasattr(dataset, 'loader'):  # torchvision's datasets of files
        dataset.loader = functools.partial(_load, decoder)
    return dataset


def _open_files(
        root: str,
        split: str,
        decoder: Decoder,
        skip_broken: bool,
        order: Callable[[str], Any],
        min_classes: int,
        class_map: str | Mapping[str, int] | None = None,
        search_split: bool = True,
        input_key: str | None = None,
        **options: Any,
) -> ImageFiles:
    """A dataset of a folder or tar of images; the arguments are those of timm."""
    extensions = input_key.lower().split(';') if input_key else None
    reader = ImageReader(root, split if search_split else '', class_map, extensions, order, labelled=min_classes > 0)
    if len(reader) == 0 or len(reader.class_to_idx) < min_classes:
        raise ValueError(
            f'{reader.root!r} has {len(reader)} images in {len(reader.class_to_idx)} class; give at least two classes, '
            'each in its own folder: SPLIT/CLASS/IMAGE')
    return ImageFiles(reader, decoder, skip_broken, **options)


def transforms_of(dataset: Any) -> dict[str, Any]:
    """The transforms of one of timm's datasets, as arguments of another."""
    return dict(transform=dataset.transform, target_transform=dataset.target_transform)


def class_names(dataset: Dataset) -> dict[int, str]:
    """Names of the classes of a dataset by index, as far as they are known; the first if a class map gives several."""
    indices = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if indices:
        return {int(index): str(name) for name, index in reversed(indices.items())}
    classes = getattr(dataset, 'classes', ())  # our own sources and torchvision, whose ImageNet has tuples of synonyms
    return {index: name if isinstance(name, str) else ', '.join(name) for index, name in enumerate(classes)}


# -- images in files ---------------------------------------------------------------------------------------------------


class ImageFiles(ImageDataset):
    """timm's dataset of image files, with our decoder, and with an error that names a file that cannot be read.

    timm logs a warning and returns the *next* image instead, which changes the training data without notice.

    Args:
        reader: Open files with targets, as timm's readers give them.
        decoder: Reads an image of a file. It measures the range of grey levels on some of the files.
        skip_broken: Return the next image, as timm does, with a warning that names the file.
        load_bytes: Return the bytes of a file instead of an image.
        **transforms: `transform` of the image and `target_transform`, as in timm.
    """

    def __init__(
            self, reader: Reader, decoder: Decoder, skip_broken: bool = False, load_bytes: bool = False,
            **transforms: Callable | None) -> None:
        super().__init__(reader.root, reader, load_bytes=load_bytes, input_img_mode=decoder.mode, **transforms)
        self.decoder = decoder
        self.skip_broken = skip_broken
        self._warned: set[int] = set()  # every worker warns once about each file
        if not load_bytes:
            step = max(1, len(reader) // MEASURED)
            decoder.measure(reader[index][0] for index in range(step // 2, len(reader), step))
            for black, white in decoder.ranges.values():
                _logger.info(f'{reader.root}: images with grey levels {black:g} to {white:g} become 8-bit images')

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
        with errors_that_name(lambda: self.filename(index, absolute=True)):
            file, target = self.reader[index]
            with file:
                image = file.read() if self.load_bytes else self.decoder.open(file)
        return image, -1 if target is None else target


class ImageStream(IterableImageDataset):
    """timm's dataset of streamed images, with our decoder.

    Args:
        reader: Images with targets, as timm's readers give them if no mode is asked for.
        decoder: Converts an image.
        **transforms: `transform` of the image and `target_transform`, as in timm.
    """

    def __init__(self, reader: Reader, decoder: Decoder, **transforms: Callable | None) -> None:
        super().__init__(None, reader, **transforms)
        self.decoder = decoder

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, target in self.reader:
            yield apply_transforms(self, self.decoder.convert(image), target)


def _load(decoder: Decoder, path: str) -> Image.Image:
    """The image in a file."""
    with errors_that_name(lambda: path):
        return decoder.open(path)


@contextmanager
def errors_that_name(path: Callable[[], str]) -> Iterator[None]:
    """Raise a `BrokenImageError` that names a file for any error in reading it."""
    try:
        yield
    except Exception as error:  # what decoders raise: OSError, SyntaxError, struct.error, IndexError, ...
        unknown = isinstance(error, UnidentifiedImageError)
        reason = 'not a known image format' if unknown else one_line(error) or type(error).__name__
        raise BrokenImageError(
            f'cannot read the image {path()!r} ({reason}); repair or remove it, or give --skip-broken-images'
        ) from error


# -- images of scikit-learn --------------------------------------------------------------------------------------------


class Digits(PixelImages):
    """scikit-learn's 1,797 real 8 x 8 images of handwritten digits, as PIL images with targets 0..9.

    Four fifths are 'train' and one fifth is 'validation', with equal shares of every digit. The split is fixed.

    Args:
        split: 'train' or 'validation', or one of timm's synonyms for them.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB', 'L', ...
        transform: Applied to the image.
        target_transform: Applied to the target.

    Raises:
        ValueError: If the split is unknown.
        ImportError: If scikit-learn is not installed.
    """
    classes = '0123456789'

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
