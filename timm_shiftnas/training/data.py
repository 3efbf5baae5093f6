"""Datasets and loaders of a run, created from its flags with timm's loaders.

A training batch is a function of (seed, epoch, position in the epoch): every image is augmented with the seed of its
position, whichever worker or process reads it. So a run can resume from any batch without reading those before it, and
several processes read the same images as one process.
"""
from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.datasets import ImageFiles, class_names, create_dataset
from ..data.loader import TrainLoader
from ..data.modes import choose_mode
from ..data.shift_batches import StepBatches, preprocessing
from ..data.views import DatasetView, default_share, split_held_out
from ..method.config import default_interval
from ..method.samplers import SAMPLERS
from ..utils.distributed import Ranks
from ..utils.streams import seed_process, stream

__all__ = [
    'Data', 'Loaders', 'ShiftBatches', 'create_calibration_loader', 'create_loaders', 'open_data', 'read_batches',
    'uses_mixup', 'without_useless_shift',
]

_logger = logging.getLogger('train')


# -- datasets ----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The datasets of a run, without transforms.

    Args:
        train: Images for the weights.
        held_out: Split off the training images, for the shift or the search.
        validation: Images for the reported accuracy.
        calibration: Training images without augmentation, for BatchNorm statistics.
        num_classes: Number of classes, if the training data tells.
        class_names: Their names, by index, as far as the training data tells.
        shift_by_default: Whether the shift is on although no flag asks for it.
    """
    train: Dataset
    held_out: DatasetView | None
    validation: Dataset
    calibration: Dataset
    num_classes: int | None
    class_names: dict[int, str]
    shift_by_default: bool = False


def open_data(args: argparse.Namespace) -> Data:
    """Open the datasets.

    Raises:
        ValueError: If they cannot be opened, do not fit together, or are too small.
    """
    keys = {name: getattr(args, name) for name in ('input_key', 'target_key') if getattr(args, name)}
    open_split = partial(
        create_dataset, args.dataset, args.data_dir, class_map=args.class_map, download=args.dataset_download,
        batch_size=args.batch_size, seed=args.seed, input_img_mode=image_mode(args),
        skip_broken=args.skip_broken_images, upright=not args.ignore_exif_orientation,
        trust_remote_code=args.dataset_trust_remote_code, glyphs=dict(
            images=args.glyph_images, difficulty=args.glyph_difficulty, pixels=args.glyph_pixels), **keys)
    train = open_split(
        split=args.train_split, is_training=True, num_samples=args.train_num_samples, repeats=args.epoch_repeats)
    validation = open_split(split=args.val_split, is_training=False, num_samples=args.val_num_samples)
    if isinstance(train, ImageFiles) and isinstance(validation, ImageFiles):
        validation.decoder.ranges.update(train.decoder.ranges)
        if (len(train), train.filename(0, absolute=True)) == (len(validation), validation.filename(0, absolute=True)):
            _logger.warning(
                f'the splits {args.train_split!r} and {args.val_split!r} hold the same images: accuracies are those of '
                'training images')
    names, others = class_names(train), class_names(validation)
    if names and others and (odd := sorted({*names.values()} ^ {*others.values()})):
        raise ValueError(f'training and validation images have different classes: {odd[0]!r} is in one of them only')
    num_classes, held_out = count_classes(train), None
    shift_by_default = args.shift is None and shifts_by_default(args, train)
    if args.shift is None:
        args.shift = 'hypergradient' if shift_by_default else 'none'
    if args.held_out is not None or SAMPLERS[args.sampler].searches or args.shift != 'none':
        train, held_out = split_held_out(train, share_to_hold_out(args, train), args.seed)
    if isinstance(train, IterableDataset):
        calibration = open_split(split=args.train_split, is_training=False, num_samples=args.train_num_samples)
    else:  # views of one dataset have their own transforms
        train = train if isinstance(train, DatasetView) else DatasetView(train, torch.arange(len(train)))
        calibration = train.with_transform(None)
    processes = Ranks.current().size
    images = len(train)
    if shift_by_default and args.held_out is None:  # `without_useless_shift` may give the others back
        images += len(held_out)
    if images < args.batch_size * processes:
        times = f' in each of {processes} processes' if processes > 1 else ''
        raise ValueError(
            f'--batch-size {args.batch_size}{times} is more than the {images} training images; lower it')
    return Data(train, held_out, validation, calibration, num_classes, names, shift_by_default)


def share_to_hold_out(args: argparse.Namespace, train: Dataset) -> float:
    return default_share(train) if args.held_out is None else args.held_out


def shifts_by_default(args: argparse.Namespace, train: Dataset) -> bool:
    """Whether the probability shift is on where no flag says it.

    It is off where P is fixed, and where nothing or too little can be held out; see also `without_useless_shift`.
    """
    if args.sampler != 'shiftnas' or args.group_weights is not None:
        return False
    if isinstance(train, IterableDataset):
        _logger.info('the probability shift is off: no images of a stream can be held out for it')
        return False
    held_out = round(len(train) * share_to_hold_out(args, train))
    if held_out < args.shift_batch_size:
        _logger.info(f'the probability shift is off: {held_out} images would be held out, and it needs '
                     f'{args.shift_batch_size} (--held-out, --shift-batch-size)')
        return False
    return True


def without_useless_shift(args: argparse.Namespace, data: Data, groups: int) -> Data:
    """Turn the default shift off where P would hardly move, and train on the images that were held out for it.

    The first shift only measures the noise, so a run has to have three. How many updates lie between two depends on
    the number of groups, which is known after the network is created.
    """
    if not data.shift_by_default:
        return data
    held_out = cast(DatasetView, data.held_out)
    batches = len(cast(DatasetView, data.train)) // (args.batch_size * Ranks.current().size)
    updates = args.epochs * -(-batches // args.grad_accum_steps)
    interval = args.shift_interval or default_interval(groups)
    if updates >= 3 * interval:
        return data
    _logger.info(f'the probability shift is off: P would hardly move in {updates:,} updates, with {interval:,} between '
                 'two shifts (--shift-interval)')
    args.shift = 'none'
    if args.held_out is not None:
        return data
    train = DatasetView(held_out.base, torch.arange(len(held_out.base)))
    return replace(data, train=train, held_out=None, calibration=train.with_transform(None))


def image_mode(args: argparse.Namespace) -> str:
    """Mode of the PIL images, such as 'RGB'.

    Raises:
        ValueError: If images of this mode have another number of channels than the model.
    """
    flag = '--input-size' if args.input_size else '--in-chans'
    return choose_mode(
        args.input_img_mode, args.input_size[0] if args.input_size else args.in_chans or 3, f'{flag} asks for')


def count_classes(dataset: Dataset) -> int | None:
    """Number of classes, if the dataset tells: 1 more than the largest index, since a class map may have gaps."""
    indices = class_names(dataset) or getattr(dataset, 'targets', None)
    return max(indices) + 1 if isinstance(indices, (dict, list)) and indices else None


# -- loaders -----------------------------------------------------------------------------------------------------------


class ShiftBatches:
    """The (images, targets) of the n-th shift, from training data and from held-out data, without augmentation."""

    def __init__(self, args: argparse.Namespace, data: Data, config: dict[str, Any]) -> None:
        create = partial(
            StepBatches, batch_size=args.shift_batch_size, workers=min(args.workers, 1), **preprocessing(config))
        self.train = create(data.train.with_transform(None), seed=2 * args.seed)
        self.held_out = create(data.held_out, seed=2 * args.seed + 1)

    def __call__(self, n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return self.train.batch(n), self.held_out.batch(n)

    def close(self) -> None:
        """Stop the workers."""
        self.train.close()
        self.held_out.close()


@dataclass
class Loaders:
    """Batches of a run.

    Args:
        train: Training batches; `read_batches` moves them to the device.
        validation: Validation images; in a distributed run, the part of this process.
        held_out: Held-out images for the search, with a --sampler that needs one.
        calibration: Training images for BatchNorm statistics.
        mixup: Mixes the images of a training batch.
        shift: Batches for a learned shift.
        split: How images were held out, if they were: the `HeldOut` of a saved model.
    """
    train: TrainLoader
    validation: DataLoader | PrefetchLoader
    held_out: DataLoader | PrefetchLoader | None
    calibration: DataLoader | PrefetchLoader | None
    mixup: Mixup | FastCollateMixup | None
    shift: ShiftBatches | None
    split: dict[str, Any] | None


def create_loaders(
        args: argparse.Namespace,
        data: Data,
        config: dict[str, Any],
        device: torch.device,
        ranks: Ranks | None = None,
        calibrated: bool = False,
) -> Loaders:
    """Create the loaders of a run.

    Args:
        args: The flags, with the number of classes.
        data: The datasets.
        config: timm's data config.
        device: Device of the batches.
        ranks: The processes that share the images (default: this one alone).
        calibrated: Create `Loaders.calibration`.

    Raises:
        ValueError: If mixup cannot pair the images of a batch.
    """
    ranks = ranks or Ranks()
    warn_about_augmentation(args, ranks)
    common = dict(
        input_size=config['input_size'], mean=config['mean'], std=config['std'], num_workers=args.workers,
        device=device, pin_memory=args.pin_mem, use_prefetcher=not args.no_prefetcher, persistent_workers=False)
    mixup = create_mixup(args) if uses_mixup(args) else None
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
    return Loaders(
        train=TrainLoader(train, args.seed, ranks, args.aug_repeats if ranks.size > 1 else 0),
        validation=evaluation(data.validation, distributed=ranks.size > 1),
        held_out=evaluation(data.held_out.with_transform(None)) if SAMPLERS[args.sampler].searches else None,
        calibration=create_calibration_loader(args, data, config, device) if calibrated else None,
        mixup=mixup,
        shift=ShiftBatches(args, data, config) if args.sampler == 'shiftnas' and args.shift != 'none' else None,
        split=None if data.held_out is None else dict(
            share=len(data.held_out) / (len(data.train) + len(data.held_out)), seed=args.seed,
            images=len(data.train) + len(data.held_out)))


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether the images of a batch are mixed, so that targets are probabilities."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_mixup(args: argparse.Namespace) -> Mixup | FastCollateMixup:
    """timm's mixup and cutmix, in the workers or, with --no-prefetcher, on the device."""
    if args.batch_size % 2:
        raise ValueError(f'mixup and cutmix pair images: --batch-size {args.batch_size} must be even')
    return (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax, prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob, mode=args.mixup_mode, label_smoothing=args.smoothing,
        num_classes=args.num_classes)


def warn_about_augmentation(args: argparse.Namespace, ranks: Ranks) -> None:
    """Log which augmentation flags have no effect, or will fail with the installed Pillow."""
    if args.aug_repeats and ranks.size == 1:
        _logger.warning('--aug-repeats needs several processes; it is ignored')
    risky = (args.aa or '').startswith(('rand', 'v0')) and 'mmax' not in args.aa
    if risky and ranks.primary and not can_posterize_to_zero():
        _logger.warning(
            f'--aa {args.aa}: timm will posterize some images to 0 bits, which this Pillow refuses ("bits must be '
            'between or equal to 1 and 8"); give a rand- policy with -mmax9, or install Pillow below 13')


def can_posterize_to_zero() -> bool:
    """Whether Pillow posterizes to 0 bits, as timm's policies do at their largest magnitude."""
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
    """Create a loader of `--bn-images` training images for BatchNorm statistics, preprocessed as for evaluation.

    The images are the same in every process, so that the statistics of a subnet are, too.
    """
    batch_size, images = args.validation_batch_size or args.batch_size, data.calibration
    if not isinstance(images, IterableDataset):
        order = torch.randperm(len(images), generator=stream(args.seed, 'calibration', 0))
        count = min(args.bn_images, len(order))
        if count > batch_size:
            count = count // batch_size * batch_size  # full batches: each has the same weight in the mean
        images = DatasetView(images.base, images.indices[order[:count]])
    return create_loader(
        images, batch_size=batch_size, num_workers=args.workers, device=device,
        pin_memory=args.pin_mem, use_prefetcher=not args.no_prefetcher, persistent_workers=False,
        **preprocessing(config))


def read_batches(
        args: argparse.Namespace,
        loaders: Loaders,
        device: torch.device,
        epoch: int,
        start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the (images, targets) of an epoch on the device, from the `start`-th batch on.

    Each batch sets the random state of the process for the training step that follows.
    """
    mixup = loaders.mixup
    if mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
        mixup.mixup_enabled = False
    for number, (images, targets) in enumerate(loaders.train.epoch(epoch, start), start):
        seed_process(args.seed, f'step/{epoch}/{loaders.train.ranks.rank}', number)
        if args.no_prefetcher:
            images, targets = images.to(device), targets.to(device)
            if mixup is not None:  # after --mixup-off-epoch, it still creates the soft targets that the loss expects
                images, targets = mixup(images, targets)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, targets
