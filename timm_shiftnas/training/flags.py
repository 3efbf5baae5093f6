"""The command line of training: timm's flags, those of ShiftNAS, and YAML files of either."""
from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from .. import __version__
from ..hub.download import check_repo_id
from ..method.config import RunConfig, Setting, ShiftNASConfig, find_conflict, settings_of
from ..utils.text import one_line
from .timm_flags import FLAGS, convert

__all__ = ['as_flag', 'build_parser', 'dest_of', 'parse_args', 'settings_table', 'training_facts']

SETTINGS = (*settings_of(ShiftNASConfig), *settings_of(RunConfig))
OF_A_TEACHER = ('task_loss_weight', 'distill_loss_weight', 'temperature')  # timm's script has these flags, too
# What a model card leaves out: files and names of this machine, and what the command on the card does not need.
PRIVATE = {
    'data', 'data_dir', 'output', 'experiment', 'config', 'resume', 'num_classes', 'lr', 'traceback', 'push_to_hub',
    'hub_private', 'hub_revision', 'initial_checkpoint', 'pretrained_path', 'class_map', 'kd_model_path', 'log_wandb',
    'wandb_project', 'wandb_tags', 'wandb_resume_id', 'log_tensorboard', 'save_images', 'help'}


# -- parser ------------------------------------------------------------------------------------------------------------


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with timm's flags, which keep timm's names and meanings, and those of ShiftNAS."""
    parser = argparse.ArgumentParser(
        prog, description="Train a supernet with ShiftNAS, with the flags of timm's training script.",
        allow_abbrev=False)
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of defaults for these flags; flags on the command line win')
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    groups = {title: parser.add_argument_group(title) for title in FLAGS}
    for title, rows in FLAGS.items():
        if title == 'ShiftNAS':
            for setting in SETTINGS:
                if setting.flag is not None:
                    add_setting(groups['distillation' if setting.name in OF_A_TEACHER else title], setting)
        for names, kind, default, help in rows:
            groups[title].add_argument(*names.split(), **kind, default=default, help=help.replace('%', '%%'))
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
    typed, _ = parser.parse_known_args(argv)
    if typed.config:
        argv = [*_read_config(parser, typed.config), f'--config={typed.config}', *argv]
    args = parser.parse_args(argv)
    no_folder = args.dataset.startswith('sklearn/')
    if args.data and (typed.data_dir or no_folder):  # probably one value too many for the flag before it
        parser.error(f'unexpected value {args.data!r}: the data is {typed.data_dir or args.dataset!r} already')
    args.data_dir = args.data or args.data_dir
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
    if conflict := find_conflict(settings, as_flag):
        yield conflict
    try:
        if args.push_to_hub:
            check_repo_id(args.push_to_hub)
    except ValueError as error:
        yield f'--push-to-hub: {error}'


def _read_config(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Read a YAML file of `flag: value` lines as command-line arguments, so that its values get the same checks."""
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
    # files of timm's script may hold flags that do not exist here, if they are off
    unknown = [name for name in values if names[name] not in actions and values[name] not in (None, False, '')]
    if unknown:
        parser.error(
            f"{path}: there is no flag {', '.join(map(repr, unknown))} (docs/training.md lists timm's flags that are "
            'not supported, and why); remove the lines')
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


# -- model cards -------------------------------------------------------------------------------------------------------


def training_facts(args: argparse.Namespace, processes: int = 1) -> dict[str, Any]:
    """What a model card says about a run: command, dataset, versions. Paths of this machine are left out."""
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
    return isinstance(value, str) and (value.startswith(('/', '~', '.')) or '//' in value or '\\' in value)
