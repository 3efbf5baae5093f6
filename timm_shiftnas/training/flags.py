"""The command line of training: timm's flags, those of ShiftNAS, and YAML files of either."""
from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch

from .. import __version__
from ..hub.download import check_repo_id
from ..method.config import RunConfig, Setting, ShiftNASConfig, find_conflict, settings_of
from ..utils.text import one_line
from ..utils.yaml_files import read_yaml
from .timm_flags import BASE, FLAGS, TIMM_ONLY, Keywords, OnlyDefault, convert, path

__all__ = [
    'build_parser', 'dest_of', 'parse_args', 'reset_supernet_flags', 'settings_table', 'training_facts']

_logger = logging.getLogger('train')

SETTINGS = (*settings_of(ShiftNASConfig), *settings_of(RunConfig))
OF_A_TEACHER = ('task_loss_weight', 'distill_loss_weight', 'temperature')  # timm's script has these flags, too
# Defaults of these flags with --elastic. Groups are few, because a shift measures each of them.
ELASTIC_DEFAULTS: dict[str, Any] = dict(
    model='elastic_supernet', shift_interval=20, shift_lr=0.1, shift_warmup_epochs=0., generator_interval=0,
    num_groups=8)
NOT_TYPED = object()  # stands for a flag that is not on the command line
# Flags left out of the model card: paths and names of this machine, and flags that its command does not need.
PRIVATE = {
    'data', 'data_dir', 'output', 'experiment', 'config', 'resume', 'num_classes', 'lr', 'traceback', 'push_to_hub',
    'hub_private', 'hub_revision', 'initial_checkpoint', 'pretrained_path', 'class_map', 'kd_model_path', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id', 'log_tensorboard', 'save_images', 'help'}


# -- parser ------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage, which fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n')


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with timm's flags, which keep timm's names and meanings, and those of ShiftNAS."""
    parser = Parser(
        prog, description="Train a supernet with ShiftNAS, or one network, with the flags of timm's training script.",
        allow_abbrev=False)
    parser.add_argument(
        '-c', '--config', type=path, metavar='FILE',
        help='YAML file of defaults for these flags; flags on the command line win')
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    groups = {title: parser.add_argument_group(title) for title in FLAGS}
    for title, rows in FLAGS.items():
        if title == 'ShiftNAS':
            for setting in SETTINGS:
                if setting.flag is not None:
                    add_setting(groups['distillation' if setting.name in OF_A_TEACHER else title], setting)
        for names, kind, default, help in rows:
            groups[title].add_argument(*names.split(), **kind, default=default, help=help.replace('%', '%%'))
    for name, only in TIMM_ONLY.items():
        flag = name if name == 'local_rank' else name.replace('_', '-')  # as torch's launchers spell it
        parser.add_argument(f'--{flag}', action=OnlyDefault, only=only)
    # decided when the data is open, see `shifts_by_default`: on if images can be held out, because from scratch it is
    # as good as an even P, and from a pretrained network better (docs/results.md)
    parser.set_defaults(shift=None)
    return parser


def add_setting(group: Any, setting: Setting) -> None:
    """Add the flag of a setting of ShiftNAS."""
    if setting.kind is bool:
        group.add_argument(setting.flag, action='store_true', help=setting.help)
        return
    metavar = setting.metavar or {int: 'N', float: 'X', str: 'NAME'}[setting.kind]
    default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
    nargs = '+' if setting.count is None else None if setting.count == 1 else setting.count
    group.add_argument(
        setting.flag, type=partial(convert, setting), default=default, nargs=nargs, choices=setting.choices or None,
        metavar=None if setting.choices else metavar, help=setting.help.replace('%', '%%'))


def dest_of(setting: Setting) -> str:
    """The attribute of the parsed flags that holds a setting."""
    return (setting.flag or setting.name).lstrip('-').replace('-', '_')


def as_flag(name: str, value: Any) -> str:
    """A setting of ShiftNAS and its value, as users type them: '--shift none', or '--sandwich'."""
    flag = next(each.flag for each in SETTINGS if each.name == name)
    values = value if isinstance(value, list | tuple) else [value]
    return ' '.join([flag, *('' if value is True else str(each) for each in values)]).strip()


def settings_table() -> str:
    """The flags of the settings of ShiftNAS as a Markdown table, for the documentation."""
    rows = ['| flag | value | default | meaning |', '| --- | --- | --- | --- |']
    for setting in SETTINGS:
        if setting.flag is not None:
            switch = setting.kind is bool
            value = 'switch' if switch else setting.describe().removesuffix(' in brackets').removesuffix(' or null')
            values = setting.default if isinstance(setting.default, tuple) else [setting.default]
            default = 'off' if switch else '' if setting.default is None else ' '.join(
                f'{each:g}' if isinstance(each, float) else str(each) for each in values)
            rows.append(f'| `{setting.flag}` | {value} | {default} | {setting.help} |')
    return '\n'.join(rows) + '\n'


# -- parsing -----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Parse flags; those of the command line win over the YAML file of `--config`, which wins over the defaults.

    Args:
        argv: The flags (default: those of the process).
        prog: Name of the program in messages.
    """
    parser = build_parser(prog)
    argv = sys.argv[1:] if argv is None else argv
    typed, _ = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(_dests(parser), NOT_TYPED)))
    if typed.config is not NOT_TYPED:
        try:
            argv = [*_read_config(parser, typed), *argv]
        except ValueError as error:
            parser.error(f'--config: {error}')
    args = parser.parse_args(argv)
    if args.elastic is not None:
        if args.model not in (parser.get_default('model'), ELASTIC_DEFAULTS['model']):
            parser.error(f'--elastic {args.elastic} and --model {args.model} are two networks; leave one of them out')
        parser.set_defaults(**ELASTIC_DEFAULTS)
        if args.group_width is not None:  # says how many groups there are
            parser.set_defaults(num_groups=None)
        args = parser.parse_args(argv)
    no_folder = args.dataset.startswith('sklearn/')
    if args.data and (typed.data_dir is not NOT_TYPED or no_folder):  # one value too many for the flag before it
        data = args.dataset if no_folder else args.data_dir
        parser.error(f'unexpected value {args.data!r}: the data is {data!r} already')
    args.data_dir = args.data or args.data_dir or None
    for mistake in find_mistakes(args):
        parser.error(mistake)
    return args


def find_mistakes(args: argparse.Namespace) -> Iterator[str]:
    """Flags that exclude each other, and files that do not exist."""
    for name in ('scale', 'ratio', 'cutmix_minmax'):
        low, high = getattr(args, name) or (0, 1)
        if low > high or high == 0:
            yield f'--{name.replace("_", "-")} {low} {high}: give the smaller one first, and a second above 0'
    if args.loss == 'asl' and (args.mixup or args.cutmix or args.cutmix_minmax):
        yield '--loss asl takes one class per image; leave out --mixup, --cutmix and --cutmix-minmax'
    if args.resume == 'auto' and not args.experiment:
        yield '--resume auto needs --experiment NAME, so that the folder of the run is the same every time'
    if args.kd_model_path and not args.kd_model:
        yield '--kd-model-path needs --kd-model NAME, the model of these weights'
    if args.kd_model == BASE and args.elastic is None:
        yield f'--kd-model {BASE} is the network of --elastic; give --elastic NAME, or the name of the teacher'
    if args.elastic_warmup and args.sampler != 'shiftnas':
        yield f'--elastic-warmup {args.elastic_warmup:g} narrows the budgets; --sampler {args.sampler} draws none'
    if args.pretrained_path and args.initial_checkpoint and args.elastic is not None:
        yield '--pretrained-path and --initial-checkpoint both give the weights of --elastic; leave one of them out'
    if args.pretrained_cfg_overlay and args.elastic is not None:
        yield ('--pretrained-cfg-overlay changes the configuration of --model; with --elastic give --pretrained-path '
               'FILE for weights, and the flag of any other entry, such as --crop-pct')
    if args.clip_mode != 'norm' and args.clip_grad is None:
        yield f'--clip-mode {args.clip_mode} needs --clip-grad X, such as 0.01 for agc'
    if args.sched == 'plateau' and args.sched_on_updates:
        yield '--sched plateau needs an accuracy, which single updates do not have; leave out --sched-on-updates'
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        yield f'--start-epoch {args.start_epoch} must be less than --epochs, which is {args.epochs}'
    for name in ('initial_checkpoint', 'pretrained_path', 'kd_model_path', 'class_map'):
        if getattr(args, name) and not Path(getattr(args, name)).is_file():
            yield f'--{name.replace("_", "-")}: there is no file {getattr(args, name)!r}'
    settings = {each.name: getattr(args, dest_of(each), each.default) for each in SETTINGS}
    settings['shift'] = args.shift or 'none'  # the default never conflicts
    if conflict := find_conflict(settings, as_flag):
        yield conflict
    try:
        if args.push_to_hub:
            check_repo_id(args.push_to_hub)
    except ValueError as error:
        yield f'--push-to-hub: {error}'


def reset_supernet_flags(args: argparse.Namespace) -> None:
    """Reset the flags that a single network does not use to their defaults, and log them."""
    defaults = {dest_of(each): each.default for each in SETTINGS
                if each.flag is not None and each.name not in OF_A_TEACHER}
    defaults.update({names.lstrip('-').replace('-', '_'): default for names, _, default, _ in FLAGS['ShiftNAS']})
    defaults.update(eval_metric='top1')
    args.shift = args.shift or 'none'
    ignored = []
    for name, default in defaults.items():
        default = list(default) if isinstance(default, tuple) else default
        if getattr(args, name, default) != default:
            ignored.append(f'--{name.replace("_", "-")}')
            setattr(args, name, default)
    if ignored:
        _logger.warning(f'one network is trained, not a supernet: ignored {", ".join(ignored)}')


def _dests(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest != argparse.SUPPRESS]


def _read_config(parser: argparse.ArgumentParser, typed: argparse.Namespace) -> list[str]:
    """Read the YAML file of --config as command-line arguments, so that its values get the same checks.

    Args:
        parser: The parser of the flags.
        typed: The flags of the command line, `NOT_TYPED` where there is none; they replace those of the file.

    Raises:
        ValueError: If the file is not one of `flag: value` lines.
    """
    file, values = typed.config, {name: value for name, value in read_yaml(typed.config).items() if value is not None}
    actions = {option.lstrip('-').replace('-', '_'): each for each in parser._actions for option in each.option_strings}
    actions.update({each.dest: each for each in parser._actions if each.option_strings}, data=actions['data_dir'])
    found = {name: actions.get(str(name).replace('-', '_')) for name in values}
    # files of other releases may hold flags that do not exist here, if they are off
    unknown = [name for name, action in found.items() if action is None and values[name] not in (False, '')]
    if unknown:
        raise ValueError(
            f"{file}: there is no flag {', '.join(map(repr, unknown))} (docs/training.md lists timm's flags that are "
            'not supported, and why); remove the lines')
    argv, names = [], {}
    for name, action in found.items():
        if action is None or action.dest == 'config' or getattr(typed, action.dest, NOT_TYPED) is not NOT_TYPED:
            continue
        if action in names:
            raise ValueError(f'{file}: {names[action]} and {name} are the same flag; remove one of them')
        names[action] = name
        argv += _as_arguments(action, values[name], f'{file}: {name}')
    return argv


def _as_arguments(action: argparse.Action, value: Any, where: str) -> list[str]:
    """A value of a YAML file as command-line arguments.

    Raises:
        ValueError: If the flag takes no value of this kind.
    """
    flag, switch, keywords = max(action.option_strings, key=len), action.nargs == 0, isinstance(action, Keywords)
    fits = {bool: switch or action.nargs == '?', dict: keywords, list: not switch and action.nargs and not keywords}
    if not fits.get(type(value), not switch and not keywords):
        wanted = 'true or false' if switch else 'NAME: VALUE pairs' if keywords else 'a value' if action.nargs else (
            'one value, in quotes if YAML reads it as another type')
        raise ValueError(f'{where} must be {wanted}, not {value!r}')
    if isinstance(value, bool):
        return [flag] * value
    if isinstance(value, dict):
        return [flag, *(f'{name}={each!r}' for name, each in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [f'{flag}={value}']


# -- model cards -------------------------------------------------------------------------------------------------------


def training_facts(args: argparse.Namespace, processes: int = 1) -> dict[str, Any]:
    """Facts about a run for its model card: command, dataset, versions. Paths of this machine are left out."""
    parser = build_parser()
    words = ['python train.py' if processes == 1 else f'torchrun --nproc-per-node={processes} train.py']
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in PRIVATE or value == parser.get_default(action.dest):
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
    """Whether the value of a flag is a path or an address."""
    return isinstance(value, str) and (
        value.startswith(('/', '~', '.', 'local-dir:')) or '//' in value or '\\' in value)
