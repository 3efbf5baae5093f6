"""The flags of `train.py`: timm's, ours, and files of them."""
from __future__ import annotations

import argparse
import difflib
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

from .. import __version__
from ..hub.download import check_repo_id
from ..method.config import RunConfig, Setting, ShiftNASConfig, find_conflict, settings_of
from ..utils.text import one_line

__all__ = ['build_parser', 'as_flag', 'parse_args', 'training_facts']


# -- kinds of values ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """Numbers of a range, as argparse's `type`.

    Args:
        least, most: The range.
        above, below: Without `least` itself, without `most` itself.
        whole: Integers.
    """
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = self.least <= value <= self.most and not (
            self.above and value == self.least or self.below and value == self.most)
        if not math.isfinite(value) or not inside or self.whole and not value.is_integer():
            raise argparse.ArgumentTypeError(f'{text!r} must be {self}')
        return int(value) if self.whole else value

    def __str__(self) -> str:
        kind = 'a whole number' if self.whole else 'a number'
        if self.least == -math.inf:
            return kind
        low = f'above {self.least}' if self.above else f'of {self.least} or more'
        if self.most == math.inf:
            return f'{kind} {low}'
        return f'{kind} from {self.least} to less than {self.most}' if self.below else (
            f'{kind} from {self.least} to {self.most}')


COUNT, NATURAL = Number(1, whole=True), Number(0, whole=True)
SHARE, NOT_NEGATIVE, POSITIVE = Number(0, 1), Number(0), Number(0, above=True)
INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')  # '' is the model's
SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')


def optimizer(text: str) -> str:
    """A name that timm makes an optimizer of."""
    known = list_optimizers()
    if text.lower().removeprefix('lookahead_') in known:
        return text
    near = difflib.get_close_matches(text.lower(), known) or ['adamw', 'lamb', 'muon', 'sgd']
    raise argparse.ArgumentTypeError(
        f'timm has no optimizer {text!r}; choose one such as {", ".join(near)} (timm.optim.list_optimizers() has all)')


def auto_augment(text: str) -> str:
    """A policy that timm can read."""
    try:
        create_transform(32, is_training=True, auto_augment=text or None)
    except Exception as error:  # what its parsing comes to: AssertionError, ValueError, IndexError, ...
        raise argparse.ArgumentTypeError(
            f'{text!r} is no policy of timm ({error}); give one such as rand-m9-mstd0.5-inc1-mmax9, original, v0, 3a '
            'or augmix-m3-w3') from None
    return text


def image_mode(text: str) -> str:
    """A mode of PIL images."""
    try:
        Image.new(text, (1, 1))
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f'{text!r} is no mode of PIL images; give RGB, L, RGBA or CMYK') from None
    return text


def device(text: str) -> str:
    """A device that torch knows by name; whether it is here is another question."""
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f'torch knows no device {text!r}; give cpu, cuda or cuda:0') from None
    return text


def backend(text: str) -> str:
    """A backend of `torch.compile`."""
    known = torch.compiler.list_backends(exclude_tags=())
    if text not in known:
        raise argparse.ArgumentTypeError(f'torch has no backend {text!r}; choose one of {", ".join(known)}')
    return text


# -- flags -------------------------------------------------------------------------------------------------------------


OF_A_TEACHER = ('task_loss_weight', 'distill_loss_weight', 'temperature')  # timm has these flags too
SETTINGS = (*settings_of(ShiftNASConfig), *settings_of(RunConfig))


def add_setting(group: Any, setting: Setting) -> None:
    """The flag of a setting of ShiftNAS, with its help, kind and range."""
    if setting.kind is bool:
        group.add_argument(setting.flag, action='store_true', help=setting.help)
        return

    def convert(text: str) -> Any:
        try:
            return setting.convert_item(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f'{text!r} {error}') from None

    metavar = setting.metavar or {int: 'N', float: 'X', str: 'NAME'}[setting.kind]
    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    nargs = '+' if setting.count is None else None if setting.count == 1 else setting.count
    group.add_argument(
        setting.flag, type=convert, default=default, nargs=nargs, choices=setting.choices or None,
        metavar=None if setting.choices else metavar, help=setting.help.replace('%', '%%'))


def build_parser() -> argparse.ArgumentParser:
    """The flags: timm's under timm's names and meanings (`docs/training.md` has the table), and ours."""
    parser = argparse.ArgumentParser(
        description='Train a supernet with ShiftNAS, with the flags of timm\'s training script.', allow_abbrev=False)
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
    add('--train-num-samples', type=COUNT, metavar='N', help='images of a training set that is streamed (wds/)')
    add('--val-num-samples', type=COUNT, metavar='N', help='images of a validation set that is streamed')
    add('--epoch-repeats', type=NOT_NEGATIVE, default=0., metavar='N', help='times that an epoch reads a streamed set')
    add('--dataset-download', action='store_true', help='allow the download of torch/ and hfds/ datasets')
    add('--dataset-trust-remote-code', action='store_true', help='allow hfds/ datasets to run code of their own')
    add('--input-key', metavar='NAME', help='key of the image in hfds/ and wds/ datasets')
    add('--target-key', metavar='NAME', help='key of the target')
    add('--class-map', default='', metavar='FILE', help='class to index mapping file')
    add('--glyph-images', type=COUNT, default=12_000, metavar='N', help='training images of --dataset glyphs')
    add('--glyph-difficulty', type=SHARE, default=0.5, metavar='X', help='from 0 (upright, clean) to 1')
    add('--glyph-pixels', type=COUNT, default=32, metavar='N', help='height and width that glyphs are rendered at')
    add('--input-img-mode', type=image_mode, metavar='MODE', help='PIL mode of the images (RGB, or L for one channel)')
    add('-j', '--workers', type=NATURAL, default=4, metavar='N', help='data loading processes')
    add('--skip-broken-images', action='store_true',
        help='in the place of an image that cannot be read, take the next one, with a warning')
    add('--pin-mem', action='store_true', help='pin CPU memory in the data loaders')
    add('--no-prefetcher', action='store_true', help='normalise and erase in the workers instead of on the device')

    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--model', default='shiftformer_tiny_supernet', metavar='NAME', help='a supernet of timm_shiftnas')
    add('--pretrained', action='store_true', help='start from the published weights of the model')
    add('--pretrained-path', metavar='FILE', help='start from these weights, adapted as published ones are')
    add('--pretrained-cfg-overlay', nargs='*', default={}, action=ParseKwargs, metavar='K=V',
        help='entries of the pretrained configuration to replace')
    add('--initial-checkpoint', default='', metavar='FILE', help='start from this checkpoint, taken as it is')
    add('--resume', default='', metavar='FILE',
        help="go on from a checkpoint, in the middle of an epoch too; 'auto': from the newest of --experiment, if any")
    add('--no-resume-opt', action='store_true', help='do not resume the optimizer')
    add('--num-classes', type=COUNT, metavar='N', help='classes (default: as many as the dataset has)')
    add('--gp', metavar='POOL', help='global pooling of the model')
    add('--img-size', type=COUNT, metavar='N', help='image size (default: the model\'s)')
    add('--in-chans', type=COUNT, metavar='N', help='image channels (default: 3)')
    add('--input-size', nargs=3, type=COUNT, metavar='N', help='channels, height and width')
    add('--crop-pct', type=POSITIVE, metavar='X',
        help='share of the resized image that evaluation crops')
    add('--mean', type=Number(), nargs='+', metavar='X')
    add('--std', type=POSITIVE, nargs='+', metavar='X')
    add('--interpolation', default='', choices=INTERPOLATIONS, help='resize interpolation of evaluation')
    add('-b', '--batch-size', type=COUNT, default=128, metavar='N')
    add('-vb', '--validation-batch-size', type=COUNT, metavar='N')
    add('--grad-accum-steps', type=COUNT, default=1, metavar='N', help='micro-batches per update')
    add('--grad-checkpointing', action='store_true')
    add('--channels-last', action='store_true')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--drop', type=SHARE, default=0., metavar='P', help='dropout before the classifier')
    add('--drop-path', type=SHARE, metavar='P', help='drop path')
    add('--head-init-scale', type=Number(), metavar='X', help='factor of the initial classifier weights')
    add('--head-init-bias', type=Number(), metavar='X', help='initial classifier bias')

    group = parser.add_argument_group('device and processes')
    add = group.add_argument
    add('--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--device-modules', nargs='+', default=[], metavar='NAME', help='Python modules to import for the device')
    add('--amp', action='store_true', help='mixed precision')
    add('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))
    add('--torchcompile', nargs='?', type=backend, const='inductor', metavar='BACKEND', help='compile the supernet')
    add('--torchcompile-mode', metavar='MODE')
    add('--dist-backend', metavar='NAME', help='of torchrun processes (default: nccl on GPUs, gloo on CPUs)')
    add('--no-ddp-bb', action='store_true', help='leave buffers to each process instead of those of the first')

    group = parser.add_argument_group('optimizer')
    add = group.add_argument
    add('--opt', type=optimizer, default='adamw', metavar='NAME', help='any of timm.optim')
    add('--opt-eps', type=NOT_NEGATIVE, metavar='X')
    add('--opt-betas', type=SHARE, nargs='+', metavar='X')
    add('--momentum', type=SHARE, default=0.9, metavar='X')
    add('--weight-decay', type=NOT_NEGATIVE, default=0.05, metavar='X')
    add('--clip-grad', type=POSITIVE, metavar='X')
    add('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    add('--layer-decay', type=POSITIVE, metavar='X')
    add('--layer-decay-min-scale', type=NOT_NEGATIVE, metavar='X')
    add('--layer-decay-no-opt-scale', type=NOT_NEGATIVE, metavar='X')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V')

    group = parser.add_argument_group('learning rate')
    add = group.add_argument
    add('--lr', type=NOT_NEGATIVE, metavar='LR', help='overrides --lr-base')
    add('--lr-base', type=POSITIVE, default=5e-4, metavar='LR', help='lr = lr-base * global batch size / lr-base-size')
    add('--lr-base-size', type=COUNT, default=512, metavar='N')
    add('--lr-base-scale', default='linear', choices=('', 'linear', 'sqrt'),
        help="how the learning rate grows with the batch; '': sqrt for Ada... and LAMB, else linear, as timm has it")
    add('--sched', default='cosine', choices=SCHEDULES)
    add('--sched-on-updates', action='store_true')
    add('--epochs', type=COUNT, default=300, metavar='N')
    add('--start-epoch', type=NATURAL, metavar='N')
    add('--warmup-epochs', type=NATURAL, default=5, metavar='N')
    add('--warmup-lr', type=NOT_NEGATIVE, default=1e-6, metavar='LR')
    add('--warmup-prefix', action='store_true')
    add('--min-lr', type=NOT_NEGATIVE, default=0., metavar='LR')
    add('--cooldown-epochs', type=NATURAL, default=0, metavar='N')
    add('--patience-epochs', type=NATURAL, default=10, metavar='N')
    add('--decay-epochs', type=POSITIVE, metavar='N',
        help='epochs between two decays of the step schedule (default: 90), or of the last phase of wsd and rsqrt')
    add('--lr-decay-fn', choices=('linear', '1-sqrt', 'cosine', 'power', 'exp'), help='of wsd and rsqrt')
    add('--lr-stable-timescale', type=POSITIVE, metavar='N', help='epochs; of rsqrt')
    add('--decay-milestones', type=NATURAL, nargs='+', default=[90, 180, 270], metavar='N')
    add('--decay-rate', '--dr', type=NOT_NEGATIVE, default=0.1, metavar='X')
    add('--lr-noise', type=SHARE, nargs='+', metavar='X')
    add('--lr-noise-pct', type=SHARE, default=0.67, metavar='X')
    add('--lr-noise-std', type=NOT_NEGATIVE, default=1.0, metavar='X')
    add('--lr-cycle-mul', type=POSITIVE, default=1.0, metavar='X')
    add('--lr-cycle-decay', type=NOT_NEGATIVE, default=0.5, metavar='X')
    add('--lr-cycle-limit', type=COUNT, default=1, metavar='N')
    add('--lr-k-decay', type=POSITIVE, default=1.0, metavar='X')

    group = parser.add_argument_group('augmentation and regularisation')
    add = group.add_argument
    add('--no-aug', action='store_true')
    add('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'))
    add('--scale', type=NOT_NEGATIVE, nargs=2, default=[0.08, 1.0], metavar='X')
    add('--ratio', type=POSITIVE, nargs=2, default=[3 / 4, 4 / 3], metavar='X')
    add('--hflip', type=SHARE, default=0.5, metavar='P')
    add('--vflip', type=SHARE, default=0., metavar='P')
    add('--color-jitter', type=NOT_NEGATIVE, default=0.4, metavar='X')
    add('--color-jitter-prob', type=SHARE, metavar='P')
    add('--grayscale-prob', type=SHARE, default=0., metavar='P')
    add('--gaussian-blur-prob', type=SHARE, default=0., metavar='P')
    add('--aa', type=auto_augment, metavar='NAME', help='auto-augment policy')
    add('--aug-repeats', type=NOT_NEGATIVE, default=0, metavar='N',
        help='repeated augmentation (several processes only)')
    add('--reprob', type=SHARE, default=0., metavar='P', help='random erasing')
    add('--remode', default='pixel', choices=('const', 'rand', 'pixel'))
    add('--recount', type=COUNT, default=1, metavar='N')
    add('--train-interpolation', default='random', choices=('random', *INTERPOLATIONS))
    add('--mixup', type=NOT_NEGATIVE, default=0., metavar='X')
    add('--cutmix', type=NOT_NEGATIVE, default=0., metavar='X')
    add('--cutmix-minmax', type=SHARE, nargs=2, metavar='X')
    add('--mixup-prob', type=SHARE, default=1., metavar='P')
    add('--mixup-switch-prob', type=SHARE, default=0.5, metavar='P')
    add('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    add('--mixup-off-epoch', type=NATURAL, default=0, metavar='N')
    add('--smoothing', type=Number(0, 1, below=True), default=0.1, metavar='X')
    add('--loss', choices=('ce', 'bce', 'asl', 'poly'), help='default: ce')
    add('--asl-gamma-pos', type=NOT_NEGATIVE, default=1., metavar='X')
    add('--asl-gamma-neg', type=NOT_NEGATIVE, default=4., metavar='X')
    add('--poly-epsilon', type=Number(), default=2., metavar='X')
    add('--bce-loss', action='store_true', help='the same as --loss bce')
    add('--bce-sum', action='store_true')
    add('--bce-target-thresh', type=SHARE, metavar='X')
    add('--loss-pos-weight', '--bce-pos-weight', type=POSITIVE, metavar='X')

    group = parser.add_argument_group('weight averaging')
    add = group.add_argument
    add('--model-ema', action='store_true', help='evaluate and save an exponential moving average of the weights')
    add('--model-ema-decay', type=SHARE, default=0.9998, metavar='X')
    add('--model-ema-warmup', action='store_true')
    add('--model-ema-force-cpu', action='store_true')

    distillation = group = parser.add_argument_group('distillation')
    add = group.add_argument
    add('--kd-model', '--kd-model-name', metavar='NAME', help='teacher: a model of timm with pretrained weights')
    add('--kd-model-path', metavar='FILE', help='weights of the teacher, in the place of published ones')

    group = parser.add_argument_group('run')
    add = group.add_argument
    add('--seed', type=Number(0, 2 ** 32 - 1, whole=True), default=42, metavar='N')
    add('--log-interval', type=COUNT, default=50, metavar='N', help='updates between two lines, off a terminal')
    add('--log-tensorboard', action='store_true', help='write TensorBoard events beside the checkpoints')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--wandb-project', metavar='NAME')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG')
    add('--wandb-resume-id', default='', metavar='ID', help='of the run to go on with')
    add('--save-images', action='store_true', help='save the images of a batch at every --log-interval')
    add('--val-interval', type=COUNT, default=10, metavar='N', help='epochs between two evaluations')
    add('--eval-metric', default='top1', choices=('top1', 'top1_smallest', 'top1_largest'),
        help='what ranks checkpoints: the mean over budget groups (default), or an end of the range')
    add('--recovery-interval', type=NATURAL, default=0, metavar='N',
        help='updates between two checkpoints in the middle of an epoch (default: none)')
    add('--skip-nonfinite', type=NATURAL, default=0, metavar='N',
        help='leave out up to N updates in a row whose loss or gradient is not finite (default: stop at the first)')
    add('--checkpoint-hist', type=COUNT, default=3, metavar='N', help='checkpoints to keep')
    add('--output', default='./output', metavar='DIR')
    add('--experiment', default='', metavar='NAME', help='folder of this run (default: time and model)')

    group = parser.add_argument_group('Hugging Face Hub')
    add = group.add_argument
    add('--push-to-hub', metavar='REPO', help="publish the model there at the end: 'owner/name', made if need be")
    add('--hub-private', action='store_true', help='make the repository private, if it is made')
    add('--hub-revision', metavar='BRANCH', help='branch of the repository (default: main)')

    group = parser.add_argument_group('ShiftNAS')
    add = group.add_argument
    for each in SETTINGS:
        if each.flag is not None:
            add_setting(distillation if each.name in OF_A_TEACHER else group, each)
    add('--search-samples', type=COUNT, default=25, metavar='N',
        help='archs searched per budget with --sampler uniform')
    add('--shift-warmup-epochs', type=NOT_NEGATIVE, metavar='N',
        help='epochs before the shift begins (default: a tenth)')
    add('--held-out', type=SHARE, metavar='X',
        help='share of the training images that only the shift sees (default: 0.02, or 0.05 below 20,000 images)')
    add('--bn-images', type=COUNT, default=2000, metavar='N',
        help='training images that the BatchNorm statistics of a subnet are taken from')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the YAML file of `--config` over the defaults."""
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args(argv)
    if known.config:
        argv = [*_read_config(parser, known.config), f'--config={known.config}', *argv]
    args = parser.parse_args(argv)
    without = args.dataset.startswith('sklearn/')  # a folder
    if args.data and (known.data_dir or without):  # an extra value of the flag before it would pass for one
        parser.error(f'{args.data!r} is no value of a flag, and the data is {known.data_dir or args.dataset!r} already')
    args.data_dir = args.data or args.data_dir
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        low, high = getattr(args, name) or (0, 1)
        if low > high or high == 0:
            parser.error(f'--{name.replace("_", "-")} {low} {high}: give the smaller one first, and a second above 0')
    if args.loss == 'asl' and (args.mixup or args.cutmix or args.cutmix_minmax):
        parser.error('--loss asl takes one class per image; leave out --mixup, --cutmix and --cutmix-minmax')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto needs --experiment NAME, so that the folder of the run is the same every time')
    if args.kd_model_path and not args.kd_model:
        parser.error('--kd-model-path needs --kd-model NAME, the model that the weights are of')
    if args.clip_mode != 'norm' and args.clip_grad is None:
        parser.error(f'--clip-mode {args.clip_mode} needs --clip-grad X, such as 0.01 for agc')
    if args.sched == 'plateau' and args.sched_on_updates:
        parser.error('--sched plateau looks at an accuracy, which updates have none of; leave out --sched-on-updates')
    for name in ('initial_checkpoint', 'pretrained_path', 'kd_model_path', 'class_map'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            parser.error(f'--{name.replace("_", "-")}: there is no file {getattr(args, name)!r}')
    values = {each.name: getattr(args, dest_of(each), each.default) for each in SETTINGS}
    if conflict := find_conflict(values, as_flag):
        parser.error(conflict)
    if args.push_to_hub:
        try:
            check_repo_id(args.push_to_hub)
        except ValueError as error:
            parser.error(f'--push-to-hub: {error}')
    return args


def dest_of(setting: Setting) -> str:
    """Where `parse_args` keeps a setting."""
    return (setting.flag or setting.name).lstrip('-').replace('-', '_')


def as_flag(name: str, value: Any) -> str:
    """A setting of ShiftNAS and its value, as they are typed: '--shift none', or '--sandwich'."""
    flag = next(each.flag for each in SETTINGS if each.name == name)
    values = value if isinstance(value, list | tuple) else [value]
    return ' '.join([flag, *('' if value is True else str(each) for each in values)]).strip()


def training_facts(args: argparse.Namespace, processes: int = 1) -> dict[str, Any]:
    """What a model card tells of a run. Folders of this machine stay out of it."""
    parser = build_parser()
    words = ['python train.py' if processes == 1 else f'torchrun --nproc-per-node={processes} train.py']
    private = {'data', 'data_dir', 'output', 'experiment', 'config', 'resume', 'num_classes', 'lr', 'traceback',
               'push_to_hub', 'hub_private', 'hub_revision', 'initial_checkpoint', 'pretrained_path', 'class_map',
               'kd_model_path', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id', 'log_tensorboard',
               'save_images'}
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
    versions = dict(timm_shiftnas=__version__, timm=timm.__version__, torch=torch.__version__)
    dataset = 'image folder' if not args.dataset or _is_path(args.dataset) else args.dataset
    return dict(command=' '.join(words), dataset=dataset, versions=versions)


def _is_path(value: Any) -> bool:
    """Whether a flag names a place on this machine."""
    return isinstance(value, str) and (value.startswith(('/', '~', '.')) or '//' in value or '\\' in value)


def _read_config(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """A YAML file of `flag: value` lines as command-line arguments, so that its values are checked as those are."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f'cannot read the config file: {one_line(error)}')
    if not isinstance(values, dict):
        parser.error(f'{path}: it must hold "flag: value" lines; see python train.py --help')
    actions = {action.dest: action for action in parser._actions}
    for action in parser._actions:
        actions.update({option.lstrip('-').replace('-', '_'): action for option in action.option_strings})
    names = {name: {'data': 'data_dir'}.get(name, str(name).replace('-', '_')) for name in values}
    # a flag of timm that is not here may stand there if it is off
    unknown = [name for name in values if names[name] not in actions and values[name] not in (None, False, '')]
    if unknown:
        parser.error(
            f"{path}: there is no flag {', '.join(map(repr, unknown))} here (docs/training.md says which of timm's are "
            'left out, and why); remove the lines')
    argv = []
    for name, value in values.items():
        if names[name] not in actions:
            continue
        dest = actions[names[name]].dest
        flag = '--' + dest.replace('_', '-')
        if isinstance(actions[dest], argparse._StoreTrueAction):
            if not isinstance(value, bool):
                parser.error(f'{path}: {name} must be true or false, not {value!r}')
            argv += [flag] * value
        elif isinstance(value, bool) and actions[dest].nargs == '?':
            argv += [flag] * value
        elif isinstance(value, list) and actions[dest].nargs is None:
            parser.error(f'{path}: {name} must be one value, not {value}')
        elif isinstance(value, dict):
            argv += [flag, *(f'{k}={v}' for k, v in value.items())]
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)] if value else []
        elif value is not None and dest != 'config':
            argv.append(f'{flag}={value}')
    return argv
