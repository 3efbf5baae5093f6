"""The images that commands read."""
from __future__ import annotations

import argparse
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from timm.data import create_loader, resolve_data_config
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset, IterableDataset

from ..data.datasets import class_names, create_dataset
from ..data.image_reader import standard_split
from ..data.modes import choose_mode
from ..data.shift_batches import preprocessing
from ..data.views import DatasetView
from ..hub.format import CONFIG, saved_class_names
from ..hub.load import SavedModel
from ..utils.text import one_line
from .shared import warn

__all__ = [
    'Expected', 'batches', 'first_images', 'labelled_images', 'open_images', 'read_class_map', 'training_batches',
]


def labelled_images(
        saved: SavedModel, num_classes: int, args: argparse.Namespace, split: str) -> tuple[Dataset, str]:
    """The images of a split to evaluate on. Their targets are the classes of the network that have the same names.

    Returns:
        The dataset, and a remark if it has images of only a part of the classes.

    Raises:
        ValueError: If a class of the images is none of the network's, or it is not known which one.
    """
    images = open_images(Expected.by(saved), args, split)
    names, where = class_names(images), args.data_dir or args.dataset
    found = {*names.values()}
    if args.class_map:
        indices = read_class_map(args.class_map, num_classes)
        left_out = sorted(found - {*indices})
        if left_out or not names:
            images = open_images(Expected.by(saved), args, split, class_map=args.class_map)
            names = class_names(images)
        if left_out:
            warn(f'{where}: the classes {reprlib.repr(left_out)} are not in {args.class_map}; they are left out')
    else:
        known = saved_class_names(saved.config, num_classes, saved.where(CONFIG))
        if names and not known:
            if len(names) != num_classes:
                raise ValueError(
                    f'{where} has {len(names)} of the {num_classes} classes of {saved}, which was saved without their '
                    'names; give --class-map FILE, a .txt with the name of a class in each line, in the order of '
                    'training')
            warn(f'{saved} was saved without the names of its classes; those of {where} are numbered in their order')
        if not names or not known or names == known:
            return images, ''
        indices = {name: index for index, name in known.items()}
    if unknown := [name for name in names.values() if name not in indices]:
        raise ValueError(
            f'{where}: the class {unknown[0]!r} is none of the {len(indices)} classes of the model '
            f'({reprlib.repr(list(indices))}); rename or remove its folder, or give --class-map FILE')
    images.target_transform = {index: indices[name] for index, name in names.items()}.__getitem__
    known_classes, here = {*indices.values()}, {indices[name] for name in found & {*indices}}
    return images, '' if here == known_classes else f' of {len(here)} of the {len(known_classes)} classes'


def read_class_map(path: str, num_classes: int) -> dict[str, int]:
    """The index of each class by its name, of a file in timm's format: .txt with a name in each line, or .pkl.

    Raises:
        ValueError: If the file cannot be read, or an index is out of range.
    """
    try:
        indices = {str(name): int(index) for name, index in load_class_map(path).items() if name != ''}
        wrong = {name: index for name, index in indices.items() if not 0 <= index < num_classes}
        if wrong:
            raise ValueError(f'{reprlib.repr(wrong)} for a model of {num_classes} classes, from 0')
        return indices
    except (AssertionError, ValueError, TypeError, OSError, EOFError, UnpicklingError) as error:
        raise ValueError(f'--class-map {path} cannot be used: {one_line(error, 200)}') from error


class Expected(NamedTuple):
    """The images that a network expects: timm's configuration, PIL mode, and whether photographs are turned."""
    config: Mapping[str, Any]
    mode: str | None = None
    upright: bool | None = None

    @classmethod
    def by(cls, saved: SavedModel) -> Expected:
        return cls(saved.config['pretrained_cfg'], saved.record.image_mode, saved.record.upright)


def open_images(
        expected: Expected, args: argparse.Namespace, split: str, min_classes: int = 1, **options: Any) -> Dataset:
    """The images of --dataset and --data-dir, in the mode that the network was trained on."""
    mode = choose_mode(args.input_img_mode or expected.mode, expected.config['input_size'][0])
    upright = not args.ignore_exif_orientation and expected.upright is not False
    options |= {name: getattr(args, name) for name in ('input_key', 'target_key') if getattr(args, name)}
    return create_dataset(
        args.dataset, args.data_dir, split=split, is_training=False, input_img_mode=mode, min_classes=min_classes,
        skip_broken=args.skip_broken_images, upright=upright, download=args.dataset_download,
        num_samples=args.num_samples, trust_remote_code=args.dataset_trust_remote_code, glyphs=dict(
            images=args.glyph_images, difficulty=args.glyph_difficulty, pixels=args.glyph_pixels), **options)


def training_batches(expected: Expected, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of --bn-images training images. The dataset is opened when the first one is read."""
    split = args.train_split or ('train' if args.dataset else standard_split(args.data_dir))
    images = open_images(expected, args, split, min_classes=0)
    yield from batches(expected, first_images(images, args.bn_images), args)


def first_images(images: Dataset, count: int) -> Dataset:
    """The first images of a dataset in random order; all of a stream."""
    if isinstance(images, IterableDataset):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return DatasetView(images.base, images.indices[order]) if isinstance(images, DatasetView) else (
        DatasetView(images, order))


def batches(expected: Expected, images: Dataset, args: argparse.Namespace) -> Iterable[Any]:
    """Batches of images, preprocessed as a network expects them."""
    config = resolve_data_config(pretrained_cfg=expected.config)
    return create_loader(
        images, batch_size=args.batch_size, use_prefetcher=False, num_workers=args.workers, **preprocessing(config))
