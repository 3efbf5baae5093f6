"""The flags of timm's training script that `train.py` has, and a few more, as a table.

Those that it does not have are in `TIMM_ONLY`. A row is (names, kind, default, help). A kind holds the arguments of
`ArgumentParser.add_argument` that say what a value is: its type, its range, how many there are.
"""
from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform
from timm.optim import list_optimizers

from ..data.modes import MODES
from ..method.config import Setting, setting
from ..space import families
from ..utils.paths import expand_home

__all__ = [
    'BACKBONE', 'BASE', 'FLAGS', 'Keywords', 'NO_TEACHER', 'OnlyDefault', 'TIMM_ONLY', 'convert', 'names_subnet',
    'path', 'saved_at',
]

BACKBONE = 'backbone'  # what --freeze calls everything but the classifier
BASE, NO_TEACHER = 'base', 'none'  # words of --kd-model

Kind = dict[str, Any]


# -- kinds of values ---------------------------------------------------------------------------------------------------


def convert(setting: Setting, text: str) -> Any:
    """A text as the value of a setting, or one of its items, for argparse.

    Raises:
        argparse.ArgumentTypeError: If it is of another kind or out of range.
    """
    try:
        return setting.convert_item(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} {error}') from None


def number(metavar: str, kind: type = float, **limits: float) -> Kind:
    """Numbers in a range; `limits` as in `setting`."""
    field = Setting('', None, kind, count=1, optional=False, **setting(None, '', **limits).metadata)
    return dict(type=partial(convert, field), metavar=metavar)


def text(metavar: str) -> Kind:
    return dict(metavar=metavar)


def keywords(example: str) -> Kind:
    return dict(nargs='*', action=Keywords, metavar=example)


def one_of(*choices: str) -> Kind:
    return dict(choices=choices)


def several(kind: Kind, count: int | str = '+') -> Kind:
    return dict(kind, nargs=count)


def known(check: Callable[[str], str], metavar: str) -> Kind:
    """A name that timm, torch or PIL checks."""
    return dict(type=check, metavar=metavar)


def path(name: str) -> str:
    """A file or folder; `~` is the home directory."""
    try:
        return expand_home(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output(name: str) -> str:
    """The folder of all runs; as in timm's script, '' is the default."""
    return path(name) or OUTPUT


def network(name: str) -> str:
    """A supernet or subnet of this package, or a saved one: 'local-dir:DIR', 'hf-hub:owner/name'."""
    known = [*timm.list_models('*supernet'), *subnets()]
    if name.partition('.')[0] in known or name.startswith(('hf-hub:', 'hf_hub:')):
        return name
    folder = path(name.removeprefix('local-dir:'))
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f'{name!r} is not a network of timm_shiftnas; choose one of {", ".join(known)}, local-dir:DIR with the '
            'directory of a saved model, or hf-hub:OWNER/NAME; --elastic NAME makes one of a network of timm')
    return f'local-dir:{folder}'


def teacher(name: str) -> str:
    source, colon, place = name.partition(':')
    return f'local-dir:{path(place)}' if source == 'local-dir' else name


def subnets() -> list[str]:
    return [family.subnet for family in families()]


def names_subnet(name: str) -> bool:
    """Whether a name of timm is that of a static subnet of this package."""
    return name.partition('.')[0] in subnets()


def saved_at(name: str) -> str | None:
    """The directory or the repository of a saved model, for a value of --model; `None` for a name of timm."""
    source, colon, place = name.partition(':')
    return place if colon else None


def pooling(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError(
            "'' does not pool, so there is one logit per position; leave it out, or give avg")
    return name


def optimizer(name: str) -> str:
    optimizers = list_optimizers()
    if name.lower().removeprefix('lookahead_') not in optimizers:
        near = difflib.get_close_matches(name.lower(), optimizers) or ['adamw', 'lamb', 'muon', 'sgd']
        raise argparse.ArgumentTypeError(
            f'timm has no optimizer {name!r}; choose one such as {", ".join(near)} (timm.optim.list_optimizers() '
            'lists all)')
    return name


def auto_augment(policy: str) -> str:
    try:
        create_transform(32, is_training=True, auto_augment=policy or None)
    except Exception as error:  # its parser raises AssertionError, ValueError, IndexError, ...
        raise argparse.ArgumentTypeError(
            f'{policy!r} is not an auto-augment policy of timm ({error}); give one such as '
            'rand-m9-mstd0.5-inc1-mmax9, original, v0, 3a or augmix-m3-w3') from None
    return policy


def image_mode(mode: str) -> str:
    if mode not in MODES:
        raise argparse.ArgumentTypeError(f'images of mode {mode!r} are not read; give one of {", ".join(MODES)}')
    return mode


def device(name: str) -> str:
    """A device that torch knows; this machine need not have it."""
    try:
        torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f'torch knows no device {name!r}; give cpu, cuda or cuda:0') from None
    return name


def backend(name: str) -> str:
    """A backend of `torch.compile`."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if name not in backends:
        raise argparse.ArgumentTypeError(f'torch has no backend {name!r}; choose one of {", ".join(backends)}')
    return name


class Keywords(argparse.Action):
    """Collects `NAME=VALUE` in a dict. A value is a Python literal, true or false, or else a text."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        found: dict[str, Any] = {}
        for item in filter(None, values):
            name, equals, value = item.partition('=')
            if not equals or not name.isidentifier():
                raise argparse.ArgumentError(self, f'{item!r} must be NAME=VALUE, such as {self.metavar}')
            if name in found:
                raise argparse.ArgumentError(self, f'{name!r} is given twice')
            found[name] = literal(value)
        setattr(namespace, self.dest, found)


def literal(text: str) -> Any:
    """The value of a Python literal, of `true` or `false` as YAML has them, or else the text."""
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return {'true': True, 'false': False}.get(text.lower(), text)


class OnlyDefault(argparse.Action):
    """A flag of timm's script that `train.py` does not have; the default changes nothing and may be given."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, only: Any) -> None:
        nargs = 0 if only is False else '+' if isinstance(only, list) else None
        super().__init__(option_strings, argparse.SUPPRESS, nargs=nargs, help=argparse.SUPPRESS)
        self.only = only

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        given = list(map(literal, values)) if isinstance(values, list) and values else literal(values or '')
        if self.only is None or self.only is False or given != self.only:
            default = '' if self.only is None or self.only is False else f", or give timm's default, {self.only!r}"
            raise argparse.ArgumentError(
                self, f'this flag of timm is not supported (docs/training.md says why); leave it out{default}')


SWITCH: Kind = dict(action='store_true')
OUTPUT = './output'
NAME = text('NAME')
FILE, DIR = dict(type=path, metavar='FILE'), dict(type=path, metavar='DIR')
COUNT, NATURAL = number('N', int, least=1), number('N', int, least=0)
SHARE, ANY = number('P', least=0, most=1), number('X')
NOT_NEGATIVE, POSITIVE = number('X', least=0), number('X', above=0)
LR = number('LR', least=0)
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # '' is that of the model


# -- flags -------------------------------------------------------------------------------------------------------------


Row = tuple[str, Kind, Any, str]
FLAGS: dict[str, tuple[Row, ...]] = {
    'data': (
        ('data', dict(DIR, nargs='?'), None, 'path to the dataset (positional form of --data-dir)'),
        ('--data-dir', DIR, None, 'path to the dataset: DIR/train/CLASS/IMAGE and DIR/validation/CLASS/IMAGE'),
        ('--dataset', NAME, '', "dataset type and name as in timm, 'sklearn/digits' or 'glyphs'"),
        ('--train-split', NAME, 'train', 'name of the training split'),
        ('--val-split', NAME, 'validation', 'name of the validation split'),
        ('--train-num-samples', COUNT, None, 'images of a streamed training set (wds/)'),
        ('--val-num-samples', COUNT, None, 'images of a streamed validation set'),
        ('--epoch-repeats', NOT_NEGATIVE, 0., 'how often an epoch reads a streamed set'),
        ('--dataset-download', SWITCH, False, 'allow the download of torch/ and hfds/ datasets'),
        ('--dataset-trust-remote-code', SWITCH, False, 'allow hfds/ datasets to run their own code'),
        ('--input-key', NAME, None, 'key of the image in hfds/ and wds/ datasets'),
        ('--target-key', NAME, None, 'key of the target in hfds/ and wds/ datasets'),
        ('--class-map', FILE, '', 'class to index mapping file'),
        ('--glyph-images', COUNT, 12_000, 'training images of --dataset glyphs'),
        ('--glyph-difficulty', SHARE, 0.5, 'from 0 (upright, clean) to 1'),
        ('--glyph-pixels', COUNT, 32, 'height and width of rendered glyphs'),
        ('--input-img-mode', known(image_mode, 'MODE'), None, 'PIL mode of the images (RGB, or L for one channel)'),
        ('-j --workers', NATURAL, 4, 'data loading processes'),
        ('--skip-broken-images', SWITCH, False, 'replace an image that cannot be read by the next one, with a warning'),
        ('--ignore-exif-orientation', SWITCH, False,
         'leave photographs as their pixels are stored, as timm does, instead of turning them upright'),
        ('--pin-mem', SWITCH, False, 'pin CPU memory in the data loaders'),
        ('--no-prefetcher', SWITCH, False, 'normalise and erase in the workers instead of on the device'),
    ),
    'model': (
        ('--model', known(network, 'NAME'), 'shiftformer_tiny_supernet',
         'a supernet or subnet of timm_shiftnas, or the weights of a saved one: local-dir:DIR, hf-hub:OWNER/NAME'),
        ('--elastic', text('BASE'), None,
         'instead of --model: make this network of timm elastic, with its published weights or those of '
         '--pretrained-path; changes the defaults of other flags (docs/elastic.md)'),
        ('--elastic-sort', dict(choices=('taylor', 'magnitude', 'none')), 'taylor',
         'how --elastic finds the most important units, which smaller subnets keep: by the loss on training images, by '
         'their weights, or not at all'),
        ('--pretrained', SWITCH, False, 'start from the published weights of the model'),
        ('--pretrained-path', FILE, None, 'start from these weights, adapted as published ones are'),
        ('--pretrained-cfg-overlay', keywords('crop_pct=0.9'), {},
         'entries of the pretrained configuration to replace'),
        ('--initial-checkpoint', FILE, '', 'start from the weights of this checkpoint, unchanged'),
        ('--resume', FILE, '',
         "resume from a checkpoint, also in the middle of an epoch; 'auto': from the newest of --experiment, if any"),
        ('--no-resume-opt', SWITCH, False, 'do not resume the optimizer'),
        ('--num-classes', COUNT, None, 'number of classes (default: that of the dataset)'),
        ('--gp', known(pooling, 'POOL'), None, 'global pooling of the model'),
        ('--img-size', COUNT, None, "image size (default: the model's)"),
        ('--in-chans', COUNT, None, 'image channels (default: 3)'),
        ('--input-size', several(COUNT, 3), None, 'channels, height and width'),
        ('--crop-pct', POSITIVE, None, 'share of the resized image that evaluation crops'),
        ('--mean', several(ANY), None, "mean of the pixels, per channel (default: the model's)"),
        ('--std', several(POSITIVE), None, "standard deviation of the pixels, per channel (default: the model's)"),
        ('--interpolation', one_of(*INTERPOLATIONS), '', 'resize interpolation of evaluation'),
        ('-b --batch-size', COUNT, 128, 'images of a micro-batch in each process'),
        ('-vb --validation-batch-size', COUNT, None, 'images of a batch in evaluation (default: --batch-size)'),
        ('--grad-accum-steps', COUNT, 1, 'micro-batches per update'),
        ('--grad-checkpointing', SWITCH, False, 'save memory: compute activations again in the backward pass'),
        ('--channels-last', SWITCH, False, 'memory layout of CNNs on GPUs'),
        ('--model-kwargs', keywords('relative_position=false'), {}, 'further arguments of the model'),
        ('--freeze', several(text('MODULE')), [],
         "modules that are not trained, such as 'patch_embed blocks.0'; 'backbone': all but the classifier"),
        ('--drop', SHARE, 0., 'dropout before the classifier'),
        ('--drop-path', SHARE, None, 'drop path (stochastic depth)'),
        ('--head-init-scale', ANY, None, 'factor of the initial classifier weights'),
        ('--head-init-bias', ANY, None, 'initial classifier bias'),
    ),
    'device and processes': (
        ('--device', dict(type=device), 'cuda' if torch.cuda.is_available() else 'cpu', 'device to train on'),
        ('--device-modules', several(NAME), [], 'Python modules to import for the device'),
        ('--amp', SWITCH, False, 'mixed precision'),
        ('--amp-dtype', one_of('float16', 'bfloat16'), 'float16', 'number format of --amp'),
        ('--torchcompile', dict(nargs='?', type=backend, const='inductor', metavar='BACKEND'), None,
         'compile the supernet (default backend: inductor)'),
        ('--torchcompile-mode', text('MODE'), None, 'mode of torch.compile'),
        ('--dist-backend', NAME, None, 'backend of torchrun processes (default: nccl on GPUs, gloo on CPUs)'),
        ('--no-ddp-bb', SWITCH, False, 'do not broadcast buffers from the first process'),
    ),
    'optimizer': (
        ('--opt', known(optimizer, 'NAME'), 'adamw', 'an optimizer of timm.optim'),
        ('--opt-eps', NOT_NEGATIVE, None, "epsilon (default: the optimizer's)"),
        ('--opt-betas', several(SHARE), None, "betas (default: the optimizer's)"),
        ('--momentum', SHARE, 0.9, 'momentum'),
        ('--weight-decay', NOT_NEGATIVE, 0.05, 'weight decay'),
        ('--clip-grad', POSITIVE, None, 'clip gradients at this norm or value'),
        ('--clip-mode', one_of('norm', 'value', 'agc'), 'norm', 'how gradients are clipped'),
        ('--layer-decay', POSITIVE, None, 'factor of the learning rate from layer to layer'),
        ('--layer-decay-min-scale', NOT_NEGATIVE, None, 'smallest factor of --layer-decay'),
        ('--layer-decay-no-opt-scale', NOT_NEGATIVE, None, 'layers with a smaller factor are not trained'),
        ('--opt-kwargs', keywords('nesterov=true'), {}, 'further arguments of the optimizer'),
    ),
    'learning rate': (
        ('--lr', LR, None, 'learning rate; overrides --lr-base'),
        ('--lr-base', number('LR', above=0), 5e-4, 'lr = lr-base * global batch size / lr-base-size'),
        ('--lr-base-size', COUNT, 512, 'global batch size of --lr-base'),
        ('--lr-base-scale', one_of('', 'linear', 'sqrt'), 'linear',
         "how the learning rate grows with the batch; '' is timm's rule: sqrt for Ada... and LAMB, otherwise linear"),
        ('--sched', one_of(*SCHEDULES), 'cosine', 'schedule of the learning rate'),
        ('--sched-on-updates', SWITCH, False, 'change the learning rate after every update instead of every epoch'),
        ('--epochs', COUNT, 300, 'length of the run'),
        ('--start-epoch', NATURAL, None, 'first epoch, from 0 (default: that of the checkpoint)'),
        ('--warmup-epochs', NATURAL, 5, 'epochs of rising learning rate'),
        ('--warmup-lr', LR, 1e-6, 'learning rate at the start of the warm-up'),
        ('--warmup-prefix', SWITCH, False, 'start the schedule after the warm-up'),
        ('--min-lr', LR, 0., 'lowest learning rate'),
        ('--cooldown-epochs', NATURAL, 0, 'epochs at --min-lr after the schedule'),
        ('--patience-epochs', NATURAL, 10, 'patience of the plateau schedule'),
        ('--decay-epochs', number('N', above=0), None,
         'epochs between two decays of the step schedule (default: 90), or of the last phase of wsd and rsqrt'),
        ('--lr-decay-fn', one_of('linear', '1-sqrt', 'cosine', 'power', 'exp'), None, 'last phase of wsd and rsqrt'),
        ('--lr-stable-timescale', number('N', above=0), None, 'epochs; time scale of rsqrt'),
        ('--decay-milestones', several(NATURAL), [90, 180, 270], 'epochs of the multistep schedule'),
        ('--decay-rate --dr', NOT_NEGATIVE, 0.1, 'factor of a decay'),
        ('--lr-noise', several(SHARE), None, 'parts of the run with a noisy learning rate'),
        ('--lr-noise-pct', SHARE, 0.67, 'limit of that noise'),
        ('--lr-noise-std', NOT_NEGATIVE, 1.0, 'standard deviation of that noise'),
        ('--lr-cycle-mul', POSITIVE, 1.0, 'factor of the length of a cycle'),
        ('--lr-cycle-decay', NOT_NEGATIVE, 0.5, 'factor of the learning rate of a cycle'),
        ('--lr-cycle-limit', COUNT, 1, 'number of cycles'),
        ('--lr-k-decay', POSITIVE, 1.0, 'k of the cosine and poly schedules'),
    ),
    'augmentation and regularisation': (
        ('--no-aug', SWITCH, False, 'no augmentation'),
        ('--train-crop-mode', one_of('rrc', 'rkrc', 'rkrr'), None, 'how training images are cropped'),
        ('--scale', several(NOT_NEGATIVE, 2), [0.08, 1.0], 'range of the area of a random crop'),
        ('--ratio', several(POSITIVE, 2), [3 / 4, 4 / 3], 'range of the aspect ratio of a random crop'),
        ('--hflip', SHARE, 0.5, 'probability of a horizontal flip'),
        ('--vflip', SHARE, 0., 'probability of a vertical flip'),
        ('--color-jitter', NOT_NEGATIVE, 0.4, 'strength of color jitter'),
        ('--color-jitter-prob', SHARE, None, 'probability of color jitter'),
        ('--grayscale-prob', SHARE, 0., 'probability of a grey image'),
        ('--gaussian-blur-prob', SHARE, 0., 'probability of blur'),
        ('--aa', known(auto_augment, 'POLICY'), None, 'auto-augment policy'),
        ('--aug-repeats', NOT_NEGATIVE, 0, 'repeated augmentation (several processes only)'),
        ('--reprob', SHARE, 0., 'probability of random erasing'),
        ('--remode', one_of('const', 'rand', 'pixel'), 'pixel', 'what erased pixels become'),
        ('--recount', COUNT, 1, 'erased rectangles per image'),
        ('--train-interpolation', one_of('random', *INTERPOLATIONS), 'random', 'resize interpolation of training'),
        ('--mixup', NOT_NEGATIVE, 0., 'mixup alpha; 0 switches it off'),
        ('--cutmix', NOT_NEGATIVE, 0., 'cutmix alpha; 0 switches it off'),
        ('--cutmix-minmax', several(SHARE, 2), None, 'range of the cutmix ratio, instead of alpha'),
        ('--mixup-prob', SHARE, 1., 'probability of mixup or cutmix'),
        ('--mixup-switch-prob', SHARE, 0.5, 'probability of cutmix, if both are on'),
        ('--mixup-mode', one_of('batch', 'pair', 'elem'), 'batch', 'what has its own mixing ratio'),
        ('--mixup-off-epoch', NATURAL, 0, 'epoch from which images are not mixed'),
        ('--smoothing', number('X', least=0, below=1), 0.1, 'label smoothing'),
        ('--loss', one_of('ce', 'bce', 'asl', 'poly'), None, 'loss (default: ce)'),
        ('--asl-gamma-pos', NOT_NEGATIVE, 1., 'focus on positive targets of --loss asl'),
        ('--asl-gamma-neg', NOT_NEGATIVE, 4., 'focus on negative targets of --loss asl'),
        ('--poly-epsilon', ANY, 2., 'epsilon of --loss poly'),
        ('--bce-loss', SWITCH, False, 'the same as --loss bce'),
        ('--bce-sum', SWITCH, False, 'sum --loss bce over classes instead of the mean'),
        ('--bce-target-thresh', SHARE, None, 'threshold above which a soft target of --loss bce becomes 1'),
        ('--loss-pos-weight --bce-pos-weight', POSITIVE, None, 'weight of the positive targets of --loss bce'),
    ),
    'weight averaging': (
        ('--model-ema', SWITCH, False, 'evaluate and save an exponential moving average of the weights'),
        ('--model-ema-decay', SHARE, 0.9998, 'decay of the average'),
        ('--model-ema-warmup', SWITCH, False, 'start with a lower decay'),
        ('--model-ema-force-cpu', SWITCH, False, 'keep the average in CPU memory'),
    ),
    'distillation': (
        ('--kd-model --kd-model-name', known(teacher, 'NAME'), None,
         "teacher: a model of timm with pretrained weights, or a saved one; 'base' is the network of --elastic before "
         "training, 'none' no teacher"),
        ('--kd-model-path', FILE, None, 'weights of the teacher, instead of published ones'),
    ),
    'run': (
        ('--seed', number('N', int, least=0, most=2 ** 32 - 1), 42, 'seed of everything random'),
        ('--log-interval', COUNT, 50, 'updates between two lines of the log'),
        ('--log-tensorboard', SWITCH, False, 'write TensorBoard events beside the checkpoints'),
        ('--log-wandb', SWITCH, False, 'log to Weights & Biases'),
        ('--wandb-project', NAME, None, 'project in Weights & Biases'),
        ('--wandb-tags', several(text('TAG')), [], 'tags in Weights & Biases'),
        ('--wandb-resume-id', text('ID'), '', 'the run of Weights & Biases to resume'),
        ('--save-images', SWITCH, False, 'save the images of a batch at every --log-interval'),
        ('--val-interval', COUNT, 10, 'epochs between two evaluations'),
        ('--eval-metric', one_of('top1', 'top1_smallest', 'top1_largest'), 'top1',
         'accuracy that ranks checkpoints: the mean over budget groups (default), or an end of the range'),
        ('--recovery-interval', NATURAL, 0,
         'updates between two checkpoints in the middle of an epoch (default: none)'),
        ('--skip-nonfinite', NATURAL, 0,
         'skip up to N updates in a row whose loss or gradient is not finite (default: stop at the first)'),
        ('--checkpoint-hist', COUNT, 3, 'checkpoints to keep'),
        ('--output', dict(type=output, metavar='DIR'), OUTPUT, 'folder of all runs'),
        ('--experiment', dict(type=path, metavar='NAME'), '',
         'folder of this run in --output (default: time and model)'),
    ),
    'Hugging Face Hub': (
        ('--push-to-hub', text('REPO'), None, "repository 'owner/name' to publish the model in; created if missing"),
        ('--hub-private', SWITCH, False, 'create the repository as a private one'),
        ('--hub-revision', text('BRANCH'), None, 'branch of the repository (default: main)'),
    ),
    'ShiftNAS': (
        ('--search-samples', COUNT, 25, 'archs searched per budget with --sampler uniform or attentivenas'),
        ('--shift-warmup-epochs', NOT_NEGATIVE, None, 'epochs before the shift starts (default: a tenth of --epochs)'),
        ('--elastic-warmup', NOT_NEGATIVE, 0.,
         'epochs over which the lowest budget falls from that of the largest subnet to that of the smallest'),
        ('--held-out', SHARE, None,
         'share of the training images held out for a shift or a search (default: 0.02, or 0.05 below 20,000 images)'),
        ('--bn-images', COUNT, 2000, 'training images for the BatchNorm statistics of a subnet'),
    ),
}

# Flags of timm 1.0.31 that `train.py` does not have, and their defaults: `args.yaml` of timm's script holds them all.
TIMM_ONLY: dict[str, Any] = {
    'fuser': '', 'fast_norm': False, 'torchscript': False, 'model_dtype': None, 'synchronize_step': False,
    'local_rank': 0, 'aug_splits': 0, 'jsd_loss': False, 'resplit': False, 'drop_connect': None, 'drop_block': None,
    'bn_momentum': None, 'bn_eps': None, 'sync_bn': False, 'dist_bn': 'reduce', 'split_bn': False,
    'worker_seeding': 'all', 'tta': 0, 'use_multi_epochs_loader': False, 'train_img_sizes': None,
    'train_batch_sizes': None, 'train_size_probs': None, 'train_size_schedule': 'constant',
    'train_size_schedule_spread': 0.65, 'train_size_random_mix': 0.1, 'train_batches_per_epoch': None,
    'variable_batch_loss_scale': 'none', 'naflex_loader': False, 'naflex_train_seq_lens': [128, 256, 576, 784, 1024],
    'naflex_max_seq_len': 576, 'naflex_patch_sizes': None, 'naflex_patch_size_probs': None,
    'naflex_loss_scale': 'linear', 'naflex_patchify_channels_first': False, 'kd_distill_type': 'logit',
    'kd_loss_type': 'kl', 'kd_student_feature_dim': None, 'kd_teacher_feature_dim': None,
    'kd_token_distill_type': 'soft',
    'amp_impl': 'native', 'aot_autograd': False}  # of other releases
