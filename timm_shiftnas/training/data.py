"""What a training reads: datasets and loaders out of its flags, and batches that it can go on from.

timm makes the loaders. Training batches are a function of (seed, epoch, position in the epoch): an image is augmented
from a seed of its own position, whichever worker or process reads it. So a run that was stopped goes on from any batch
without reading those before it, and several processes read what one would.
"""
from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.datasets import create_dataset
from ..data.loader import TrainLoader
from ..data.shift_batches import StepBatches, preprocessing
from ..data.views import DatasetView, split_held_out
from ..utils.distributed import Ranks
from ..utils.streams import stream

__all__ = ['Data', 'Loaders', 'ShiftBatches', 'create_calibration_loader', 'create_loaders', 'open_data']

_logger = logging.getLogger('train')


# -- datasets ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run reads."""
    train: Dataset  # what the weights are trained on
    held_out: DatasetView | None  # split off the training data, for the shift or the search
    validation: Dataset  # what accuracy is reported on
    calibration: Dataset  # training images without augmentation, for BatchNorm statistics
    num_classes: int | None


def open_data(args: argparse.Namespace) -> Data:
    """The datasets, without transforms.

    Raises:
        ValueError: If they cannot be opened, do not fit together, or are too small.
    """
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    mode = args.input_img_mode or ('L' if channels == 1 else 'RGB')
    if (bands := len(Image.new(mode, (1, 1)).getbands())) != channels:
        flag = '--input-size' if args.input_size else '--in-chans'
        raise ValueError(
            f'{flag} asks for {channels} channels, and images of the mode {mode} have {bands}; change it, or give an '
            '--input-img-mode with as many: L (1), RGB (3), RGBA (4)')
    keys = {name: getattr(args, name) for name in ('input_key', 'target_key') if getattr(args, name)}
    open_split = partial(
        create_dataset, args.dataset, args.data_dir, class_map=args.class_map, download=args.dataset_download,
        batch_size=args.batch_size, seed=args.seed, input_img_mode=mode, skip_broken=args.skip_broken_images,
        trust_remote_code=args.dataset_trust_remote_code, glyphs=dict(
            images=args.glyph_images, difficulty=args.glyph_difficulty, pixels=args.glyph_pixels), **keys)
    train = open_split(
        split=args.train_split, is_training=True, num_samples=args.train_num_samples, repeats=args.epoch_repeats)
    validation = open_split(split=args.val_split, is_training=False, num_samples=args.val_num_samples)
    classes = [getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) for dataset in (train, validation)]
    if None not in classes and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise ValueError(f'training and validation images are of different classes: {odd[0]!r} is in one of them only')
    num_classes = count_classes(train)
    held_out = None
    if args.held_out is not None or args.sampler == 'uniform' or args.shift != 'none':
        share = args.held_out if args.held_out is not None else 0.02 if len(train) >= 20_000 else 0.05
        train, held_out = split_held_out(train, share, args.seed)
    if isinstance(train, IterableDataset):
        calibration = open_split(split=args.train_split, is_training=False, num_samples=args.train_num_samples)
    else:
        # several views of one dataset have transforms of their own
        train = train if isinstance(train, DatasetView) else DatasetView(train, torch.arange(len(train)))
        calibration = train.with_transform(None)
    ranks = Ranks.current()
    if len(train) < args.batch_size * ranks.size:
        times = f' in each of {ranks.size} processes' if ranks.size > 1 else ''
        raise ValueError(f'--batch-size {args.batch_size}{times} is more than the {len(train)} training images; '
                         'lower it')
    return Data(train, held_out, validation, calibration, num_classes)


def count_classes(dataset: Dataset) -> int | None:
    """Number of classes, where the dataset tells."""
    reader = getattr(dataset, 'reader', None)
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    targets = getattr(dataset, 'targets', None)
    if classes:
        return len(classes)
    return max(targets) + 1 if isinstance(targets, list) and targets else None


# -- loaders -----------------------------------------------------------------------------------------------------------


@dataclass
class Loaders:
    """Batches of a run. All but `train` are read from their beginning each time."""
    train: TrainLoader
    validation: DataLoader | PrefetchLoader  # of this process, in a distributed run
    held_out: DataLoader | PrefetchLoader | None  # for the search of --sampler uniform
    mixup: Mixup | FastCollateMixup | None


def create_loaders(
        args: argparse.Namespace,
        data: Data,
        config: dict[str, Any],
        device: torch.device,
        ranks: Ranks = Ranks(),
) -> Loaders:
    """Loaders for training, validation and, where data is held out, the search.

    Raises:
        ValueError: If mixup cannot pair the images of a batch.
    """
    common = dict(
        input_size=config['input_size'], mean=config['mean'], std=config['std'], num_workers=args.workers,
        device=device, pin_memory=args.pin_mem, use_prefetcher=not args.no_prefetcher, persistent_workers=False)
    mixup = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        if args.batch_size % 2:
            raise ValueError(f'mixup and cutmix pair images: --batch-size {args.batch_size} must be even')
        mixup = (Mixup if args.no_prefetcher else FastCollateMixup)(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
            num_classes=args.num_classes)
    if args.aug_repeats and ranks.size == 1:
        _logger.warning('--aug-repeats needs several processes; it is ignored in this one')
    risky = (args.aa or '').startswith(('rand', 'v0')) and 'mmax' not in args.aa
    if risky and ranks.primary and not posterizes_to_nothing():
        _logger.warning(
            f'--aa {args.aa}: sooner or later timm posterizes an image to 0 bits, which this Pillow refuses ("bits '
            'must be between or equal to 1 and 8"); give a rand- policy with -mmax9, or install Pillow below 13')
    interpolation = config['interpolation'] if args.no_aug or not args.train_interpolation else args.train_interpolation
    train = create_loader(
        data.train, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob, grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob, auto_augment=args.aa, interpolation=interpolation,
        collate_fn=mixup if not args.no_prefetcher else None, worker_seeding='all', **common)
    evaluation = partial(
        create_loader, batch_size=args.validation_batch_size or args.batch_size, interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], **common)
    held_out = evaluation(data.held_out.with_transform(None)) if args.sampler == 'uniform' else None
    return Loaders(
        TrainLoader(train, args.seed, ranks, args.aug_repeats if ranks.size > 1 else 0),
        evaluation(data.validation, distributed=ranks.size > 1), held_out, mixup)


def posterizes_to_nothing() -> bool:
    """Whether Pillow makes a black image of 0 bits, as timm's policies expect at their largest magnitude."""
    try:
        ImageOps.posterize(Image.new('L', (1, 1)), 0)
        return True
    except ValueError:
        return False


def create_calibration_loader(
        args: argparse.Namespace,
        data: Data,
        config: dict[str, Any],
        device: torch.device,
) -> DataLoader | PrefetchLoader:
    """`--bn-images` training images, preprocessed as for evaluation, to take BatchNorm statistics from.

    The same in every process: a subnet has the same statistics wherever they are taken.
    """
    batch_size, images = args.validation_batch_size or args.batch_size, data.calibration
    if not isinstance(images, IterableDataset):
        order = torch.randperm(len(images), generator=stream(args.seed, 'calibration', 0))
        count = min(args.bn_images, len(order))
        if count > batch_size:
            count = count // batch_size * batch_size  # batches count alike
        images = DatasetView(images.base, images.indices[order[:count]])
    return create_loader(
        images, batch_size=batch_size, num_workers=args.workers, device=device,
        pin_memory=args.pin_mem, use_prefetcher=not args.no_prefetcher, persistent_workers=False,
        **preprocessing(config))


class ShiftBatches:
    """The n-th shift's (images, targets) from training data and from held-out data, without augmentation or mixup."""

    def __init__(self, args: argparse.Namespace, data: Data, config: dict[str, Any]) -> None:
        make = partial(
            StepBatches, batch_size=args.shift_batch_size, workers=min(args.workers, 1),
            **preprocessing(config))
        self.train = make(data.train.with_transform(None), seed=2 * args.seed)
        self.held_out = make(data.held_out, seed=2 * args.seed + 1)

    def __call__(self, n: int):
        return self.train.batch(n), self.held_out.batch(n)

    def close(self) -> None:
        """Stop the workers."""
        self.train.close()
        self.held_out.close()


# -- epochs that can begin anywhere ------------------------------------------------------------------------------------


