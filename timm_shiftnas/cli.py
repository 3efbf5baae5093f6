"""The command line: `timm-shiftnas info DIR`, `extract`, `evaluate`, `push` and `convert`.

A mistake of the user ends in one line on stderr and exit code 2, Ctrl-C in one line and 130.
"""
from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.data import create_loader, resolve_data_config

from . import __version__
from .data.datasets import create_dataset
from .data.shift_batches import preprocessing
from .data.views import DatasetView
from .evaluation.accuracy import evaluate
from .evaluation.tables import format_table
from .hub.download import check_repo_id
from .hub.load import SavedModel, from_pretrained
from .hub.push import push_directory
from .hub.save import save_pretrained
from .models import static_counts
from .models.calibration import ResizedInput, has_batch_norm
from .training.checkpoints import load_checkpoint
from .utils.text import one_line
from .utils.units import format_count

__all__ = ['main']

PROG = 'timm-shiftnas'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = argparse.Namespace(traceback=False)
    try:
        _parser().parse_args(argv, args)
        args.command(args)
    except KeyboardInterrupt:
        print(f'{PROG}: interrupted', file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f'{PROG}: error: {one_line(error)}', file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong command line is a mistake like any other: one line, and no usage text above it."""
        raise ValueError(f'{message} (see {self.prog} --help)')


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROG, description='Look into saved supernets, take subnets out of them, and publish either.')
    parser.add_argument('--version', action='version', version=f'{PROG} {__version__}')
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    info = commands.add_parser('info', help='tell what a model directory holds')
    info.set_defaults(command=_info)
    info.add_argument('--json', action='store_true', help='print JSON')

    extract = commands.add_parser('extract', help='save the subnet for a budget as a directory of its own')
    extract.set_defaults(command=_extract)
    extract.add_argument('--output', metavar='OUT', type=Path, required=True, help='directory to save the subnet in')
    extract.add_argument('--overwrite', action='store_true', help='replace the model that OUT holds')

    evaluate = commands.add_parser('evaluate', help='accuracy of the subnet for a budget on a folder of images')
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument('--split', metavar='NAME', default='validation', help='folder in --data-dir to evaluate on')
    for command in (extract, evaluate):
        which = command.add_mutually_exclusive_group(required=command is extract)
        which.add_argument('--flops', metavar='N', help='the most MACs it may have, such as 1.4G')
        which.add_argument('--params', metavar='N', help='the most parameters it may have, such as 6M')
        which.add_argument('--arch', metavar='JSON', type=_json, help='the arch itself, such as \'{"depth": 12, ...}\'')
        command.add_argument('--data-dir', metavar='DIR', required=command is evaluate,
                             help='folder of images; those of its train/ (or, without it, all) give the BatchNorm '
                                  'statistics of the subnet if they were not saved')
        command.add_argument('--bn-images', metavar='N', type=int, default=2000,
                             help='how many images for these statistics (default: 2000)')

    push = commands.add_parser('push', help='publish a model directory on the Hugging Face Hub')
    push.set_defaults(command=_push)
    extract.add_argument('--push', metavar='REPO', help='publish it as well')
    for command in (extract, push):
        command.add_argument('--private', action='store_true', default=None, help='make it private, if it is made')
        command.add_argument('--revision', metavar='BRANCH', help='branch of it (default: main)')
        command.add_argument('--token', metavar='TOKEN', help='token of the Hub (default: that of hf auth login)')
        command.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
        command.add_argument('--commit-message', metavar='TEXT')
        command.add_argument('--license', metavar='NAME', help="for the model card, such as 'apache-2.0'")

    for command in (info, extract, evaluate, push):
        command.add_argument('directory', metavar='DIR', type=Path, help='directory of save_pretrained or train.py')
        command.add_argument('--traceback', action='store_true', help='show where in the code an error arose')
    convert = commands.add_parser('convert', help='make a model directory of a checkpoint of a training')
    convert.set_defaults(command=_convert)
    convert.add_argument('checkpoint', metavar='CHECKPOINT', type=Path, help='file of train.py, or of timm\'s own '
                         'script with timm_shiftnas.patch')
    convert.add_argument('output', metavar='OUT', type=Path, help='directory to write')
    convert.add_argument('--no-ema', action='store_true', help='take the weights as trained, not their average')
    convert.add_argument('--overwrite', action='store_true', help='replace the model that OUT holds')
    convert.add_argument('--traceback', action='store_true', help='show where in the code an error arose')
    push.add_argument('repo', metavar='REPO', help="repository 'owner/name'; made if it does not exist")
    return parser


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not JSON: {error}') from None


# -- info --------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    data = describe(_saved(args.directory))
    print(json.dumps(data, indent=2) if args.json else _info_text(data))


def _saved(directory: Path) -> SavedModel:
    if not directory.is_dir():
        raise ValueError(f'{directory} is not a directory; give one that save_pretrained or train.py wrote')
    return SavedModel(directory)


def describe(saved: SavedModel) -> dict[str, Any]:
    """What a saved model is, as JSON-able data; its files are checked.

    Raises:
        ValueError: If a file is not the one that was saved, or the config does not describe a network.
    """
    for name in saved.info['files']:
        saved.read(name)
    net = saved.skeleton()
    data = dict(
        directory=saved.name, kind=saved.kind, architecture=saved.config['architecture'],
        input_size=list(net.pretrained_cfg['input_size']), num_classes=net.num_classes)
    if saved.kind == 'supernet':
        space = net.space
        ends = space.smallest, space.largest
        data.update(
            space=space.unbind().to_dict(), size=space.size,
            macs=[net.macs(arch) for arch in ends], params=[net.params(arch) for arch in ends])
    else:
        macs, params = static_counts(net)
        data.update(arch=net.arch.to_dict(), macs=macs, params=params)
    optional = {name: saved.info[name] for name in ('groups', 'probabilities', 'results') if name in saved.info}
    return dict(data, **optional, files=saved.info['files'])


def _info_text(data: dict[str, Any]) -> str:
    channels, height, width = data['input_size']
    lines = [
        f'{data["directory"]}: {data["kind"]} {data["architecture"]}',
        f'input    {channels} x {height} x {width}, {data["num_classes"]} classes']
    if data['kind'] == 'supernet':
        lines += [f'{unit:<9}{format_count(data[name][0])} to {format_count(data[name][1])}'
                  for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append(f'space    {data["size"]:,} archs')
        lines += [_field(name, values) for name, values in data['space'].items() if name != 'family']
    else:
        lines += [f'{unit:<9}{format_count(data[name])}' for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append('arch')
        lines += [_field(name, value) for name, value in data['arch'].items()]
    if 'groups' in data:
        edges = [format_count(edge) for edge in data['groups']]
        shares = data.get('probabilities', [None] * (len(edges) - 1))
        lines.append(f'groups   {len(shares)}, of MACs')
        lines += [f'  {low} to {high}' + ('' if share is None else f': P = {share:.4f}')
                  for low, high, share in zip(edges, edges[1:], shares)]
    if 'results' in data:
        lines += ['results', *(f'  {line}' for line in format_table(data['results']).splitlines())]
    lines.append('files    as they were saved')
    lines += [f'  {name}: {format_count(entry["size"])}B, sha256 {entry["sha256"][:12]}'
              for name, entry in data['files'].items()]
    return '\n'.join(lines)


def _field(name: str, value: Any) -> str:
    """A line of a space or an arch; layers that have choices of their own are set apart by a bar."""
    return f'  {name:<13}{_plain(value)}'


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return (' | ' if any(isinstance(item, list) for item in value) else ' ').join(map(_plain, value))
    return str(value) if isinstance(value, (str, bool)) else f'{value:g}'


# -- extract -----------------------------------------------------------------------------------------------------------


def _extract(args: argparse.Namespace) -> None:
    saved = _saved(args.directory)
    _check_output(args.output, args.directory, args.overwrite)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet already; extract takes one out of a supernet')
    if args.push is not None:
        check_repo_id(args.push)
    net = _load(saved, args)
    rows = [row for row in saved.info.get('results', ()) if row['arch'] == net.arch.to_dict()]
    save_pretrained(args.output, net, results=rows[:1] or None, training=saved.info.get('training'))
    macs, params = static_counts(net)
    print(f'{args.output}: {format_count(macs)} MACs, {format_count(params)} params')
    print(json.dumps(net.arch.to_dict()))
    if args.push is not None:
        _publish(args, args.output, args.push)


# -- convert -----------------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> None:
    _check_output(args.output, None, args.overwrite, flag='OUT')
    net, generator, state = load_checkpoint(args.checkpoint, use_ema=not args.no_ema)
    save_pretrained(
        args.output, net, generator, groups=state['edges'], probabilities=state['history'][-1][1],
        data_config=resolve_data_config(state['args'], model=net))
    print(f'{args.output}: {format_count(net.macs(net.space.smallest))} to '
          f'{format_count(net.macs(net.space.largest))} MACs, after {state["update"]} updates')


# -- push --------------------------------------------------------------------------------------------------------------


def _push(args: argparse.Namespace) -> None:
    _publish(args, args.directory, args.repo)


def _publish(args: argparse.Namespace, directory: Path, repo: str) -> None:
    print(push_directory(
        directory, repo, private=args.private, revision=args.revision, token=args.token, create_pr=args.create_pr,
        commit_message=args.commit_message, license=args.license))


def _load(saved: SavedModel, args: argparse.Namespace) -> torch.nn.Module:
    """The subnet that is asked for, with BatchNorm statistics of `--data-dir` if its own were not saved."""
    loader = None if args.data_dir is None else _training_images(saved, args.data_dir, args.bn_images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        net = from_pretrained(args.directory, flops=args.flops, params=args.params, arch=args.arch, loader=loader)
    if caught and getattr(args, 'push', None):
        raise ValueError(f'not published: {caught[0].message}'.replace('loader= of training images', '--data-dir'))
    for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        print(f'{PROG}: warning: {message.replace("loader= of training images", "--data-dir")}', file=sys.stderr)
    return net


# -- evaluate ----------------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> None:
    saved = _saved(args.directory)
    net = _load(saved, args)
    if has_batch_norm(net):
        net = ResizedInput(net)
    images = create_dataset('', args.data_dir, split=args.split, is_training=False, input_img_mode=_mode(saved))
    top1, top5 = evaluate(net, _loader(saved, images), torch.device('cpu'))
    print(f'{len(images)} images: top-1 {top1:.2f}%, top-5 {top5:.2f}%')


def _mode(saved: SavedModel) -> str:
    return 'L' if saved.config['pretrained_cfg']['input_size'][0] == 1 else 'RGB'


def _loader(saved: SavedModel, images: torch.utils.data.Dataset) -> Iterable[Any]:
    """Batches, preprocessed as the saved network expects them."""
    config = resolve_data_config(pretrained_cfg=saved.config['pretrained_cfg'])
    return create_loader(
        images, batch_size=64, use_prefetcher=False, num_workers=0,
        **preprocessing(config))


def _training_images(saved: SavedModel, folder: str, count: int) -> Iterable[Any]:
    """Some of the images of a folder, preprocessed as the saved network expects them, in batches."""
    if count < 1:
        raise ValueError(f'--bn-images {count} must be at least 1')
    images = create_dataset('', folder, split='train' if (Path(folder) / 'train').is_dir() else '', is_training=False,
                            input_img_mode=_mode(saved))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return _loader(saved, DatasetView(images, order[:count]))


def _check_output(output: Path, source: Path | None, overwrite: bool, flag: str = '--output') -> None:
    """Refuse to write over anything but, when told so, another model."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return
    if not output.is_dir():
        raise ValueError(f'{flag} {output} is a file; give a directory')
    if source is not None and output.samefile(source):
        raise ValueError(f'{flag} {output} is the supernet itself; give another directory')
    try:
        SavedModel(output)
    except ValueError:
        raise ValueError(f'{flag} {output} is not empty and holds no model; give another directory') from None
    if not overwrite:
        raise ValueError(f'{flag} {output} holds a model already; add --overwrite to replace it')
