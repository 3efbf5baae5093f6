#!/usr/bin/env python3
"""Train a supernet with ShiftNAS, with the flags of timm's training script.

    python train.py --data-dir /data/imagenet --model shiftformer_tiny_supernet --epochs 300 --output runs

Every `--val-interval` epochs and at the end it evaluates the smallest and the largest subnet and one subnet per budget
group, and writes to `<output>/<experiment>`: `summary.csv`, `budgets.csv`, `shift.csv`, `accuracy.png`, `shift.png`,
checkpoints, and `model/`, which `timm_shiftnas.from_pretrained` and `timm.create_model('local-dir:...')` load.
"""
from __future__ import annotations

import sys

if __name__ == '__main__':  # Ctrl-C while the imports below take their seconds
    sys.excepthook = lambda kind, error, trace: (
        print('train.py: interrupted', file=sys.stderr) if issubclass(kind, KeyboardInterrupt)
        else sys.__excepthook__(kind, error, trace))

import argparse
import logging
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub.utils import tqdm
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, Mixup, create_loader, resolve_input_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    AverageMeter, CheckpointSaver, NativeScaler, ParseKwargs, dispatch_clip_grad, get_outdir, random_seed,
    setup_default_logging, update_summary,
)
from timm.utils.summary import trim_summary

import timm_shiftnas
from timm_shiftnas import report
from timm_shiftnas.calibration import BatchNormCalibration, has_batch_norm
from timm_shiftnas.complexity import format_count, macs, parse_count
from timm_shiftnas.data import DatasetView, StepBatches, create_dataset, preprocessing, split_held_out
from timm_shiftnas.evaluation import evaluate_budgets, search_archs
from timm_shiftnas.generator import ArchitectureGenerator
from timm_shiftnas.hub import check_repo_id, save_pretrained
from timm_shiftnas.publish import push_directory
from timm_shiftnas.sampling import BudgetGroups, stream
from timm_shiftnas.task import (
    ShiftNASConfig, ShiftNASTask, check_checkpoint, load_task_ema_checkpoint, resume_task_checkpoint,
)

_logger = logging.getLogger('train')


# -- flags -------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Train a supernet with ShiftNAS, with the flags of timm\'s training script.')
    add = parser.add_argument
    add('-c', '--config', metavar='FILE', help='YAML file of defaults for these flags; flags on the command line win')
    add('--traceback', action='store_true', help='show the whole traceback of an error')

    group = parser.add_argument_group('data')
    add = group.add_argument
    add('data', nargs='?', metavar='DIR', help='path to the dataset (positional form of --data-dir)')
    add('--data-dir', metavar='DIR', help='path to the dataset: DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE')
    add('--dataset', default='', metavar='NAME', help="dataset type and name as in timm, 'sklearn/digits' or 'glyphs'")
    add('--train-split', default='train', metavar='NAME')
    add('--val-split', default='validation', metavar='NAME')
    add('--dataset-download', action='store_true', help='allow the download of torch/ and hfds/ datasets')
    add('--class-map', default='', metavar='FILE', help='class to index mapping file')
    add('--glyph-images', type=int, default=12_000, metavar='N', help='training images of --dataset glyphs')
    add('--glyph-difficulty', type=float, default=0.5, metavar='X', help='from 0 (upright, clean) to 1')
    add('--glyph-pixels', type=int, default=32, metavar='N', help='height and width that glyphs are rendered at')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (RGB, or L for one channel)')
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes')
    add('--pin-mem', action='store_true', help='pin CPU memory in the data loaders')
    add('--no-prefetcher', action='store_true', help='normalise and erase in the workers instead of on the device')

    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', default='shiftformer_tiny_supernet', metavar='NAME', help='a supernet of timm_shiftnas')
    add('--pretrained', action='store_true', help='start from the published weights of the model')
    add('--pretrained-path', metavar='FILE', help='start from these weights, adapted as published ones are')
    add('--initial-checkpoint', default='', metavar='FILE', help='start from this checkpoint, taken as it is')
    add('--resume', default='', metavar='FILE', help='resume weights, optimizer, generator and shift from a checkpoint')
    add('--no-resume-opt', action='store_true', help='do not resume the optimizer')
    add('--num-classes', type=int, metavar='N', help='classes (default: as many as the dataset has)')
    add('--gp', metavar='POOL', help='global pooling of the model')
    add('--img-size', type=int, metavar='N', help='image size (default: the model\'s)')
    add('--in-chans', type=int, metavar='N', help='image channels (default: 3)')
    add('--input-size', nargs=3, type=int, metavar='N', help='channels, height and width')
    add('--crop-pct', type=float, metavar='X', help='share of the resized image that evaluation crops')
    add('--mean', type=float, nargs='+', metavar='X')
    add('--std', type=float, nargs='+', metavar='X')
    add('--interpolation', default='', metavar='NAME', help='resize interpolation of evaluation')
    add('-b', '--batch-size', type=int, default=128, metavar='N')
    add('-vb', '--validation-batch-size', type=int, metavar='N')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='micro-batches per update')
    add('--grad-checkpointing', action='store_true')
    add('--channels-last', action='store_true')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--drop', type=float, default=0., metavar='P', help='dropout before the classifier')
    add('--drop-path', type=float, metavar='P', help='drop path')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))

    group = parser.add_argument_group('optimizer')
    add = group.add_argument
    add('--opt', default='adamw', metavar='NAME', help='any of timm.optim')
    add('--opt-eps', type=float, metavar='X')
    add('--opt-betas', type=float, nargs='+', metavar='X')
    add('--momentum', type=float, default=0.9, metavar='X')
    add('--weight-decay', type=float, default=0.05, metavar='X')
    add('--clip-grad', type=float, metavar='X')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    add('--layer-decay', type=float, metavar='X')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V')

    group = parser.add_argument_group('learning rate')
    add = group.add_argument
    add('--lr', type=float, metavar='LR', help='overrides --lr-base')
    add('--lr-base', type=float, default=5e-4, metavar='LR', help='lr = lr-base * global batch size / lr-base-size')
    add('--lr-base-size', type=int, default=512, metavar='N')
    add('--lr-base-scale', default='linear', choices=('linear', 'sqrt'))
    add('--sched', default='cosine', metavar='NAME')
    add('--sched-on-updates', action='store_true')
    add('--epochs', type=int, default=300, metavar='N')
    add('--start-epoch', type=int, metavar='N')
    add('--warmup-epochs', type=int, default=5, metavar='N')
    add('--warmup-lr', type=float, default=1e-6, metavar='LR')
    add('--warmup-prefix', action='store_true')
    add('--min-lr', type=float, default=0., metavar='LR')
    add('--cooldown-epochs', type=int, default=0, metavar='N')
    add('--patience-epochs', type=int, default=10, metavar='N')
    add('--decay-epochs', type=float, default=90, metavar='N')
    add('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='X')
    add('--lr-noise', type=float, nargs='+', metavar='X')
    add('--lr-noise-pct', type=float, default=0.67, metavar='X')
    add('--lr-noise-std', type=float, default=1.0, metavar='X')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='X')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='X')
    add('--lr-cycle-limit', type=int, default=1, metavar='N')
    add('--lr-k-decay', type=float, default=1.0, metavar='X')

    group = parser.add_argument_group('augmentation and regularisation')
    add = group.add_argument
    add('--no-aug', action='store_true')
    add('--train-crop-mode', metavar='NAME')
    add('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='X')
    add('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], metavar='X')
    add('--hflip', type=float, default=0.5, metavar='P')
    add('--vflip', type=float, default=0., metavar='P')
    add('--color-jitter', type=float, default=0.4, metavar='X')
    add('--color-jitter-prob', type=float, metavar='P')
    add('--aa', metavar='NAME', help='auto-augment policy')
    add('--aug-repeats', type=float, default=0, metavar='N', help='repeated augmentation (several processes only)')
    add('--reprob', type=float, default=0., metavar='P', help='random erasing')
    add('--remode', default='pixel', metavar='NAME')
    add('--recount', type=int, default=1, metavar='N')
    add('--train-interpolation', default='random', metavar='NAME')
    add('--mixup', type=float, default=0., metavar='X')
    add('--cutmix', type=float, default=0., metavar='X')
    add('--cutmix-minmax', type=float, nargs='+', metavar='X')
    add('--mixup-prob', type=float, default=1., metavar='P')
    add('--mixup-switch-prob', type=float, default=0.5, metavar='P')
    add('--mixup-mode', default='batch', metavar='NAME')
    add('--mixup-off-epoch', type=int, default=0, metavar='N')
    add('--smoothing', type=float, default=0.1, metavar='X')
    add('--bce-loss', action='store_true')
    add('--bce-sum', action='store_true')
    add('--bce-target-thresh', type=float, metavar='X')

    group = parser.add_argument_group('weight averaging')
    add = group.add_argument
    add('--model-ema', action='store_true', help='evaluate and save an exponential moving average of the weights')
    add('--model-ema-decay', type=float, default=0.9998, metavar='X')
    add('--model-ema-warmup', action='store_true')
    add('--model-ema-force-cpu', action='store_true')

    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--seed', type=int, default=42, metavar='N')
    add('--log-interval', type=int, default=50, metavar='N', help='updates between two lines, off a terminal')
    add('--val-interval', type=int, default=10, metavar='N', help='epochs between two evaluations')
    add('--checkpoint-hist', type=int, default=3, metavar='N', help='checkpoints to keep')
    add('--output', default='./output', metavar='DIR')
    add('--experiment', default='', metavar='NAME', help='folder of this run (default: time and model)')

    group = parser.add_argument_group('Hugging Face Hub')
    add = group.add_argument
    add('--push-to-hub', metavar='REPO', help="publish the model there at the end: 'owner/name', made if need be")
    add('--hub-private', action='store_true', help='make the repository private, if it is made')
    add('--hub-revision', metavar='BRANCH', help='branch of the repository (default: main)')

    group = parser.add_argument_group('ShiftNAS')
    add = group.add_argument
    config = ShiftNASConfig
    add('--sampler', default=config.sampler, choices=('shiftnas', 'uniform'), help='uniform is the one-shot baseline')
    add('--archs-per-step', type=int, default=config.archs_per_step, metavar='N', help='archs trained by one batch')
    add('--sandwich', action='store_true', help='two of them are the largest and the smallest arch')
    add('--search-samples', type=int, default=25, metavar='N', help='archs searched per budget with --sampler uniform')
    add('--warmup-sampler', default=config.warmup_sampler, choices=('generator', 'uniform'),
        help='archs before the shift begins: from the generator at uniform P, or uniform (the paper\'s first step)')
    add('--shift', default=config.shift, choices=('hypergradient', 'grad_norm', 'variation', 'none'),
        help='signal of the probability shift; none keeps P even over the groups (default)')
    add('--group-weights', type=float, nargs='+', metavar='W',
        help='with --shift none: how often each group is trained, one weight for each (default: all alike)')
    add('--shift-warmup-epochs', type=float, metavar='N', help='epochs before the shift begins (default: a tenth)')
    add('--shift-interval', type=int, default=config.shift_interval, metavar='N', help='updates between two shifts')
    add('--shift-batch-size', type=int, default=32, metavar='N', help='training, and held-out, images of a shift')
    add('--shift-lr', type=float, default=config.shift_lr, metavar='X')
    add('--shift-momentum', type=float, default=config.shift_momentum, metavar='X')
    add('--shift-floor', type=float, default=config.shift_floor, metavar='X', help='share of P spread evenly')
    add('--held-out', type=float, metavar='X',
        help='share of the training images that only the shift sees (default: 0.02, or 0.05 below 20,000 images)')
    add('--group-width', metavar='MACS', help="width of a budget group (default: '0.1G', or 8 groups if more)")
    add('--num-groups', type=int, metavar='N', help='number of budget groups instead')
    add('--generator-fit-steps', type=int, default=1000, metavar='N', help='steps on the resource term before training')
    add('--generator-interval', type=int, default=config.generator_interval, metavar='N',
        help='updates between two steps of the generator; 0 leaves it as it was fitted')
    add('--generator-images', type=int, default=config.generator_images, metavar='N')
    add('--generator-lr', type=float, default=config.generator_lr, metavar='LR')
    add('--resource-weight', type=float, default=config.resource_weight, metavar='X', help='lambda')
    add('--resource-batch', type=int, default=config.resource_batch, metavar='N', help='budgets in the resource term')
    add('--bn-images', type=int, default=2000, metavar='N',
        help='training images that the BatchNorm statistics of a subnet are taken from')
    add('--tau', type=float, nargs=2, default=list(config.tau), metavar='X', help='Gumbel temperature, first and last')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the YAML file of `--config` over the defaults."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args(argv)
    if known.config:
        argv = [*read_config(parser, known.config), f'--config={known.config}', *argv]
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    for name in ('batch_size', 'epochs', 'grad_accum_steps', 'val_interval', 'log_interval', 'checkpoint_hist',
                 'search_samples', 'generator_fit_steps', 'bn_images'):
        if getattr(args, name) < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
    for name in ('initial_checkpoint', 'pretrained_path'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            parser.error(f'--{name.replace("_", "-")}: there is no file {getattr(args, name)!r}')
    if args.push_to_hub:
        try:
            check_repo_id(args.push_to_hub)
        except ValueError as error:
            parser.error(f'--push-to-hub: {error}')
    return args


def training_facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a model card tells of a run. Folders of this machine stay out of it."""
    parser, words = build_parser(), ['python train.py']
    private = {'data', 'data_dir', 'output', 'experiment', 'config', 'resume', 'num_classes', 'lr', 'traceback',
               'push_to_hub', 'hub_private', 'hub_revision', 'initial_checkpoint', 'pretrained_path', 'class_map'}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in private or action.dest == 'help' or value == parser.get_default(action.dest):
            continue
        if any(_is_path(item) for item in (value.values() if isinstance(value, dict) else [value])):
            continue
        flag = '--' + action.dest.replace('_', '-')
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(value, dict):
            words.append(shlex.join([flag, *(f'{k}={v}' for k, v in value.items())]))
        elif value is not None:
            words.append(shlex.join([flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]))
    words.append(f'--lr {args.lr:g}')
    versions = dict(timm_shiftnas=timm_shiftnas.__version__, timm=timm.__version__, torch=torch.__version__)
    dataset = 'image folder' if not args.dataset or _is_path(args.dataset) else args.dataset
    return dict(command=' '.join(words), dataset=dataset, versions=versions)


def _is_path(value: Any) -> bool:
    """Whether a flag names a place on this machine."""
    return isinstance(value, str) and (value.startswith(('/', '~', '.')) or '//' in value or '\\' in value)


def read_config(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """A YAML file of `flag: value` lines as command-line arguments, so that its values are checked as those are."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f'cannot read the config file: {" ".join(str(error).split())}')
    if not isinstance(values, dict):
        parser.error(f'{path}: it must hold "flag: value" lines; see python train.py --help')
    actions = {action.dest: action for action in parser._actions}
    argv = []
    for name, value in values.items():
        dest = {'data': 'data_dir'}.get(name, str(name).replace('-', '_'))
        if dest not in actions:
            parser.error(f'{path}: unknown flag {name!r}; see python train.py --help')
        flag = '--' + dest.replace('_', '-')
        if isinstance(actions[dest], argparse._StoreTrueAction):
            if not isinstance(value, bool):
                parser.error(f'{path}: {name} must be true or false, not {value!r}')
            argv += [flag] * value
        elif isinstance(value, dict):
            argv += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None and dest != 'config':
            argv.append(f'{flag}={value}')
    return argv


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a run reads."""
    train: torch.utils.data.Dataset  # what the weights are trained on
    held_out: DatasetView | None  # split off the training data, for the shift or the search
    validation: torch.utils.data.Dataset  # what accuracy is reported on
    num_classes: int | None


def open_data(args: argparse.Namespace) -> Data:
    """The datasets, without transforms."""
    mode = args.input_img_mode or ('L' if (args.in_chans or (args.input_size or [3])[0]) == 1 else 'RGB')
    open_split = partial(
        create_dataset, args.dataset, args.data_dir, class_map=args.class_map, download=args.dataset_download,
        batch_size=args.batch_size, seed=args.seed, input_img_mode=mode, glyphs=dict(
            images=args.glyph_images, difficulty=args.glyph_difficulty, pixels=args.glyph_pixels))
    train = open_split(split=args.train_split, is_training=True)
    validation = open_split(split=args.val_split, is_training=False)
    classes = [getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) for dataset in (train, validation)]
    if None not in classes and classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise ValueError(f'training and validation images are of different classes: {odd[0]!r} is in one of them only')
    num_classes = count_classes(train)
    held_out = None
    if args.held_out is not None or args.sampler == 'uniform' or args.shift != 'none':
        share = args.held_out if args.held_out is not None else 0.02 if len(train) >= 20_000 else 0.05
        train, held_out = split_held_out(train, share, args.seed)
    if len(train) < args.batch_size:
        raise ValueError(f'--batch-size {args.batch_size} is more than the {len(train)} training images; lower it')
    return Data(train, held_out, validation, num_classes)


def count_classes(dataset: torch.utils.data.Dataset) -> int | None:
    """Number of classes, where the dataset tells."""
    reader = getattr(dataset, 'reader', None)
    classes = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    targets = getattr(dataset, 'targets', None)
    if classes:
        return len(classes)
    return max(targets) + 1 if isinstance(targets, list) and targets else None


def create_loaders(args: argparse.Namespace, data: Data, config: dict[str, Any], device: torch.device):
    """Loaders for training, validation and (where data is held out) the search, and the mixup function if any.

    Workers live for one epoch: together with seeding at its start, an epoch is a function of (seed, epoch).
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
    if args.aug_repeats:
        _logger.warning('--aug-repeats needs several processes; it is ignored in this one')
    if (args.aa or '').startswith(('rand', 'v0')) and 'mmax' not in args.aa and not posterizes_to_nothing():
        _logger.warning(
            f'--aa {args.aa}: sooner or later timm posterizes an image to 0 bits, which this Pillow refuses ("bits '
            'must be between or equal to 1 and 8"); give a rand- policy with -mmax9, or install Pillow below 13')
    interpolation = config['interpolation'] if args.no_aug or not args.train_interpolation else args.train_interpolation
    train = create_loader(
        data.train, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode=args.remode, re_count=args.recount, train_crop_mode=args.train_crop_mode, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob, auto_augment=args.aa, interpolation=interpolation,
        collate_fn=mixup if not args.no_prefetcher else None, worker_seeding='all', **common)
    evaluation = partial(
        create_loader, batch_size=args.validation_batch_size or args.batch_size, interpolation=config['interpolation'],
        crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], **common)
    held_out = evaluation(data.held_out.with_transform(None)) if args.sampler == 'uniform' else None
    return train, evaluation(data.validation), held_out, mixup


def posterizes_to_nothing() -> bool:
    """Whether Pillow makes a black image of 0 bits, as timm's policies expect at their largest magnitude."""
    try:
        ImageOps.posterize(Image.new('L', (1, 1)), 0)
        return True
    except ValueError:
        return False


def create_calibration_loader(args: argparse.Namespace, data: Data, config: dict[str, Any], device: torch.device):
    """`--bn-images` training images, preprocessed as for evaluation, to take BatchNorm statistics from."""
    order = torch.randperm(len(data.train), generator=stream(args.seed, 'calibration', 0))
    batch_size = args.validation_batch_size or args.batch_size
    count = min(args.bn_images, len(order))
    if count > batch_size:
        count = count // batch_size * batch_size  # batches count alike
    images = DatasetView(data.train.base, data.train.indices[order[:count]])
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


# -- model and task ----------------------------------------------------------------------------------------------------


def create_supernet(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    supernets = timm.list_models('*supernet')
    if args.model.partition('.')[0] not in supernets and ':' not in args.model:
        raise ValueError(f'--model {args.model} is not a supernet; choose one of {", ".join(supernets)}')
    size = args.input_size[1:] if args.input_size else args.img_size
    given = dict(
        num_classes=args.num_classes, in_chans=args.input_size[0] if args.input_size else args.in_chans, img_size=size,
        global_pool=args.gp, drop_rate=args.drop, drop_path_rate=args.drop_path)
    overlay = dict(file=args.pretrained_path, num_classes=args.num_classes) if args.pretrained_path else None
    net = timm.create_model(
        args.model, pretrained=args.pretrained or bool(args.pretrained_path), pretrained_cfg_overlay=overlay,
        checkpoint_path=args.initial_checkpoint or None, **dict(given, **args.model_kwargs))
    if not hasattr(net, 'space'):
        raise ValueError(f'--model {args.model} is not a supernet; choose one of {", ".join(supernets)}')
    net.set_grad_checkpointing(args.grad_checkpointing)
    net.to(device=device)
    return net.to(memory_format=torch.channels_last) if args.channels_last else net


def create_task(args: argparse.Namespace, net: torch.nn.Module, shift_batches: ShiftBatches | None,
                updates_per_epoch: int, device: torch.device) -> ShiftNASTask:
    space = net.space
    width = None if args.group_width is None else parse_count(args.group_width, '--group-width')
    groups = BudgetGroups.of_space(space, width=width, count=args.num_groups)
    warmup = args.epochs / 10 if args.shift_warmup_epochs is None else args.shift_warmup_epochs
    task_config = ShiftNASConfig(
        sampler=args.sampler, archs_per_step=args.archs_per_step, sandwich=args.sandwich,
        group_weights=args.group_weights and tuple(args.group_weights),
        warmup_sampler=args.warmup_sampler, warmup_updates=round(warmup * updates_per_epoch),
        total_updates=args.epochs * updates_per_epoch, shift=args.shift, shift_interval=args.shift_interval,
        shift_lr=args.shift_lr, shift_momentum=args.shift_momentum, shift_floor=args.shift_floor,
        generator_interval=args.generator_interval, generator_images=args.generator_images,
        generator_lr=args.generator_lr, resource_weight=args.resource_weight, resource_batch=args.resource_batch,
        tau=tuple(args.tau), accum_steps=args.grad_accum_steps, seed=args.seed)
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    criterion = dict(loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=mixing)
    if args.bce_loss:
        criterion.update(bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum)
    generator = ArchitectureGenerator(space, seed=args.seed)
    low, high = groups.edges[0], groups.edges[-1]
    _logger.info(
        f'{args.model}: {space.size:,} subnets, {format_count(low)} to {format_count(high)} MACs, {len(groups)} groups')
    return ShiftNASTask(
        net, criterion_kwargs=criterion, config=task_config, generator=generator, groups=groups,
        shift_batches=shift_batches, device=device)


def scaled_lr(args: argparse.Namespace) -> float:
    """--lr, or --lr-base scaled to the global batch size as timm does."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (math.sqrt(ratio) if args.lr_base_scale == 'sqrt' else ratio)


def seed_epoch(seed: int, epoch: int) -> None:
    """Set all random states to a function of the arguments."""
    random_seed(stream(seed, 'epoch', epoch).initial_seed() % 2 ** 32)


# -- training ----------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: everything it owns, `fit` over epochs, `train_epoch` over updates."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        random_seed(args.seed)
        data = open_data(args)
        args.num_classes = args.num_classes or data.num_classes
        if data.num_classes and args.num_classes is not None and args.num_classes < data.num_classes:
            raise ValueError(
                f'--num-classes {args.num_classes} is less than the {data.num_classes} classes found; leave it out')
        self.net = create_supernet(args, self.device)
        args.num_classes = self.net.num_classes
        config = self.data_config = resolve_input_data_config(self.net, vars(args))
        if calibrated := has_batch_norm(self.net):
            resolution = self.net.space.largest.resolution
            if min(config['input_size'][1:]) < resolution:
                _logger.warning(
                    f'images of {config["input_size"][1:]} are enlarged to the {resolution} pixels of the largest '
                    f'subnet; give --img-size {resolution}')
            data.train = data.train if isinstance(data.train, DatasetView) else DatasetView(
                data.train, torch.arange(len(data.train)))
        self.train_loader, self.val_loader, self.held_out_loader, self.mixup = create_loaders(
            args, data, config, self.device)
        self.calibration_loader = create_calibration_loader(args, data, config, self.device) if calibrated else None
        self.updates_per_epoch = -(-len(self.train_loader) // args.grad_accum_steps)
        args.lr = scaled_lr(args)
        learned = args.sampler == 'shiftnas' and args.shift != 'none'
        self.shift_batches = ShiftBatches(args, data, config) if learned else None
        self.task = create_task(args, self.net, self.shift_batches, self.updates_per_epoch, self.device)
        self.optimizer = create_optimizer_v2(self.net, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        self.autocast = partial(
            torch.autocast, self.device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else nullcontext
        self.scaler = NativeScaler(device=self.device.type) if args.amp and args.amp_dtype == 'float16' else None
        self.start_epoch = self.resume() if args.resume else 0
        if args.start_epoch is not None:
            self.start_epoch = args.start_epoch
        if args.model_ema:
            ema_device = torch.device('cpu') if args.model_ema_force_cpu else None
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=ema_device)
            if args.resume:
                load_task_ema_checkpoint(self.task, args.resume)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args), updates_per_epoch=self.updates_per_epoch)
        self.step_scheduler(self.start_epoch, 0)
        self.output = Path(self.output_dir())
        self.saver = CheckpointSaver(
            self.net, self.optimizer, args=args, amp_scaler=self.scaler, task=self.task,
            checkpoint_dir=str(self.output), recovery_dir=str(self.output), max_history=args.checkpoint_hist)
        if args.resume and Path(args.resume).resolve().parent == self.output.resolve():
            self.saver.load_state_dict_from_checkpoint(args.resume)
        trim_summary(str(self.output / 'summary.csv'), self.start_epoch)
        (self.output / 'args.yaml').write_text(yaml.safe_dump(vars(args), sort_keys=False))

    def output_dir(self) -> str:
        name = self.args.experiment or '-'.join([time.strftime('%Y%m%d-%H%M%S'), self.args.model.replace('/', '_')])
        if self.args.resume and not self.args.experiment:
            return str(Path(self.args.resume).resolve().parent)  # a resumed run goes on where it was
        return get_outdir(self.args.output, name)

    def resume(self) -> int:
        saved = check_checkpoint(self.args.resume, self.net.space)
        # another split, or other images, would put some into the held-out part that the weights have been trained on;
        # another optimizer has another state
        names = ['seed', 'held_out', 'group_weights', 'glyph_images', 'glyph_difficulty', 'glyph_pixels']
        for name in names if self.args.no_resume_opt else [*names, 'opt']:
            if name in saved and saved[name] != getattr(self.args, name):
                raise ValueError(
                    f'the checkpoint was trained with {name}={saved[name]} and not {getattr(self.args, name)}; resume '
                    f'with the flags of the run: -c {Path(self.args.resume).with_name("args.yaml")}')
        optimizer = None if self.args.no_resume_opt else self.optimizer
        epoch = resume_task_checkpoint(
            self.task, self.args.resume, optimizer=optimizer, loss_scaler=None if optimizer is None else self.scaler)
        return epoch or 0

    def step_scheduler(self, epoch: int, update: int, metric: float | None = None) -> None:
        """Bring the learning rate to an epoch (update 0) or, with --sched-on-updates, to an update of it."""
        if self.args.sched_on_updates:
            self.scheduler.step_update(epoch * self.updates_per_epoch + update)
        elif update == 0:
            self.scheduler.step(epoch, metric)

    def fit(self) -> None:
        args = self.args
        if not args.resume:
            _logger.info(f'fitting the generator to the budgets ({args.generator_fit_steps} steps, no images)')
            self.task.generator.fit(steps=args.generator_fit_steps, seed=args.seed)
        if self.start_epoch >= self.epochs:
            _logger.info(f'{self.start_epoch} of {self.epochs} epochs are done already: evaluating only')
            self.evaluate(self.start_epoch - 1)
        for epoch in range(self.start_epoch, self.epochs):
            if self.mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                self.mixup.mixup_enabled = False
            metrics = self.train_epoch(epoch)
            last = epoch + 1 == self.epochs
            results = self.evaluate(epoch) if last or (epoch + 1) % args.val_interval == 0 else None
            lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
            columns = results or dict.fromkeys(('top1', 'top1_smallest', 'top1_largest'), '')
            update_summary(epoch, metrics, columns, str(self.output / 'summary.csv'), lr=lr)
            self.step_scheduler(epoch + 1, 0, results and results['top1'])
            self.saver.save_checkpoint(epoch, metric=results and results['top1'])
        if self.shift_batches is not None:
            self.shift_batches.close()
        if args.push_to_hub:
            try:
                address = push_directory(
                    self.output, args.push_to_hub, private=args.hub_private or None, revision=args.hub_revision)
            except Exception:
                flags = ' --private' * args.hub_private
                flags += f' --revision {shlex.quote(args.hub_revision)}' if args.hub_revision else ''
                _logger.error(
                    f'the training is done, but not published; do so by timm-shiftnas push '
                    f'{shlex.quote(str(self.output))} {args.push_to_hub}{flags}')
                raise
            _logger.info(f'published: {address}')
        _logger.info(f'done; the model directory is {self.output / "model"}')

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch: a function of (seed, epoch) and of the state at its start."""
        args, task, accum = self.args, self.task, self.args.grad_accum_steps
        seed_epoch(args.seed, epoch)
        losses, started = AverageMeter(), time.perf_counter()
        task.get_trainable_module().train()
        self.optimizer.zero_grad()
        batches = len(self.train_loader)
        for i, (input, target) in enumerate(self.progress(epoch, losses)):
            if args.no_prefetcher:
                input, target = input.to(self.device), target.to(self.device)
                if self.mixup is not None:  # switched off, it still makes the soft targets that the loss expects
                    input, target = self.mixup(input, target)
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            ends_update = (i + 1) % accum == 0 or i + 1 == batches
            micro_batches = accum if i < batches - batches % accum else batches % accum
            with self.autocast():
                loss = task(input, target)['loss']
            losses.update(float(loss.detach()), len(input))
            self.backward(loss / micro_batches, ends_update)
            if ends_update:
                update = i // accum + 1
                task.end_update()
                task.update_ema(step=epoch * self.updates_per_epoch + update)
                self.step_scheduler(epoch, update)
        if not math.isfinite(losses.avg):
            raise ValueError(
                f'the training loss became {losses.avg} in epoch {epoch + 1}; lower --lr or clip with --clip-grad 1')
        return dict(loss=losses.avg, seconds=time.perf_counter() - started)

    def backward(self, loss: torch.Tensor, ends_update: bool) -> None:
        args, parameters = self.args, self.task.get_clip_parameters(exclude_head='agc' in self.args.clip_mode)
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
                        need_update=ends_update)
        else:
            loss.backward()
            if ends_update:
                if args.clip_grad is not None:
                    dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
                self.optimizer.step()
        if ends_update:
            self.optimizer.zero_grad()

    def progress(self, epoch: int, losses: AverageMeter) -> Iterator:
        """The batches of an epoch, with rate and time left: a bar on a terminal, else a line now and then."""
        title, started, total = f'epoch {epoch + 1}/{self.epochs}', time.monotonic(), len(self.train_loader)
        if sys.stderr.isatty():
            with tqdm(self.train_loader, desc=title, unit='batch', leave=False, dynamic_ncols=True) as bar:
                for batch in bar:
                    yield batch
                    bar.set_postfix(loss=f'{losses.avg:.3f}', lr=f'{self.optimizer.param_groups[0]["lr"]:.2e}')
            return
        every = self.args.log_interval * self.args.grad_accum_steps
        for i, batch in enumerate(self.train_loader):
            yield batch
            if (i + 1) % every == 0 or i + 1 == total:
                elapsed = time.monotonic() - started
                _logger.info(
                    f'{title}  batch {i + 1}/{total}  loss {losses.avg:.3f}  '
                    f'lr {self.optimizer.param_groups[0]["lr"]:.2e}  {losses.count / elapsed:.0f} images/s  '
                    f'{(total - i - 1) * elapsed / (i + 1):.0f} s left in the epoch')

    # -- evaluation and what is written --------------------------------------------------------------------------------

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Table, CSV, pictures and model directory of this epoch; accuracies for the summary."""
        args, task = self.args, self.task
        ema = task.get_trainable_module(ema=True)
        net = self.net if ema is None else ema.module
        options = dict(device=self.device, autocast=self.autocast(), channels_last=args.channels_last)
        if self.calibration_loader is not None:
            options['calibration'] = BatchNormCalibration(self.calibration_loader, args.bn_images)
        if args.sampler == 'uniform':
            searched = archs = search_archs(
                net.space, task.generator, task.groups, args.search_samples, net, self.held_out_loader, seed=args.seed,
                **options)
        else:
            searched, archs = None, task.generator.propose_many(task.groups.budgets)
        rows = evaluate_budgets(net, task.groups, archs, self.val_loader, **options)
        print(report.format_table(rows), flush=True)
        report.write_budgets_csv(self.output / 'budgets.csv', rows)
        report.plot_accuracy(self.output / 'accuracy.png', rows)
        report.write_shift_csv(self.output / 'shift.csv', task.history)
        noise = stream(args.seed, 'histogram', 0)
        uniform = macs(net.space, [net.space.sample(noise) for _ in range(2000)]).tolist()
        report.plot_shift(self.output / 'shift.png', task.history, task.groups.edges, uniform)
        save_pretrained(
            self.output / 'model', net, task.generator, groups=task.groups.edges,
            probabilities=task.shift.probabilities.tolist(), results=rows, searched=searched,
            training=training_facts(args), data_config=self.data_config,
            bn_stats=self.served_statistics(net, rows, options.get('calibration')))
        groups = [row['top1'] for row in rows[1:-1]]
        return dict(top1=sum(groups) / len(groups), top1_smallest=rows[0]['top1'], top1_largest=rows[-1]['top1'])

    @staticmethod
    def served_statistics(net: torch.nn.Module, rows: list[dict], calibration: BatchNormCalibration | None):
        """BatchNorm statistics of the subnets in the table (not of all that a search tried)."""
        archs = dict.fromkeys(net.space.from_dict(row['arch']) for row in rows)
        return None if calibration is None else {arch: calibration.statistics[arch] for arch in archs}


def main(argv: list[str] | None = None) -> int:
    """Run; users' mistakes end in one line and exit code 2, Ctrl-C in one line and 130."""
    args = parse_args(argv)
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)  # it lists all files after every epoch
    trainer = None
    try:
        trainer = Trainer(args)
        trainer.fit()
        return 0
    except KeyboardInterrupt:
        last = trainer and trainer.output / 'last.pth.tar'
        hint = f'; continue with --resume {last}' if last and last.exists() else ''
        print(f'train.py: interrupted{hint}', file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback:
            raise
        expected = isinstance(error, (ValueError, OSError, ImportError)) and str(error)
        hint = '' if expected else f'{type(error).__name__} (--traceback shows where): '
        print(f'train.py: error: {hint}{" ".join(str(error).split())}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    setup_default_logging()
    sys.exit(main())
