"""The command line `timm-shiftnas`: its parser, and nothing that takes long to import.

This package stands beside `timm_shiftnas`, because any import from there registers models and so imports torch and
timm, which takes seconds. Help, the version and wrong arguments are answered without it; the commands themselves are in
`timm_shiftnas.cli`, which is imported when one of them runs.

A mistake of the user ends in one line on stderr and exit code 2, Ctrl-C in one line and exit code 130.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from .interrupts import CtrlC

__all__ = ['build_parser', 'main']

PROG = 'timm-shiftnas'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: The arguments. Without them, those of the process, whose Ctrl-C is handled until it ends.
    """
    interruptible = nullcontext if argv is not None else CtrlC(PROG).raised
    argv = sys.argv[1:] if argv is None else list(argv)
    args = argparse.Namespace(traceback=False)
    try:
        try:
            if argv[:1] == ['train']:
                from timm_shiftnas.training.trainer import launch
                with interruptible():
                    return launch(argv[1:], prog=f'{PROG} train')
            build_parser().parse_args(argv, args)
            _check_together(args)
            from timm_shiftnas import cli
            with interruptible():
                cli.COMMANDS[args.command](args)
        finally:
            _flush()
    except KeyboardInterrupt:
        print(f'{PROG}: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        return 128 + 13  # as after SIGPIPE
    except Exception as error:
        if args.traceback:
            import traceback
            traceback.print_exc()
        print(f'{PROG}: error: {_one_line(error)}', file=sys.stderr)
        return 2
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Raise a `ValueError` if arguments do not fit together."""
    if args.command in ('evaluate', 'search') and not (args.dataset or args.data_dir):
        raise ValueError('there are no images: give --data-dir DIR, or --dataset NAME such as sklearn/digits')
    if args.command == 'extract' and args.int8 and not args.onnx:
        raise ValueError('--int8 is a format of ONNX files: give --onnx --int8')


def _flush() -> None:
    """Write the output now: Python itself would report a failure at its very end, with a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise


def _one_line(error: Exception) -> str:
    """An error as one line; control characters of a foreign file do not reach the terminal."""
    text = ' '.join(str(error).split())
    if not isinstance(error, (ValueError, OSError, ImportError)) or not text:
        text = f'{type(error).__name__} (--traceback shows where): {text}'
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong command line like any other mistake: in one line, without the usage."""
        raise ValueError(f'{message} (see {self.prog} --help)')


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version  # of the installed package
        print(f'{PROG} {version("timm_shiftnas")}')
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `train` has its own in `timm_shiftnas.training.flags`."""
    parser = _Parser(prog=PROG, description='Train supernets, inspect them, extract subnets, and publish either.')
    parser.add_argument('--version', action=_Version, nargs=0, help="show the program's version and exit")
    commands = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')

    commands.add_parser('train', help='train a supernet; takes the flags of train.py', add_help=False)

    elastic = commands.add_parser('elastic', help='save a network of timm as a supernet that is to be trained')
    elastic.add_argument('base', metavar='BASE', help="network of timm, such as 'vit_small_patch16_224'")
    elastic.add_argument('--output', metavar='DIR', type=_path, required=True, help='directory to save it in')
    elastic.add_argument('--overwrite', action='store_true', help='replace the model in DIR')
    elastic.add_argument(
        '--pretrained-path', metavar='FILE', type=_path, help='weights of BASE (default: the published ones)')
    elastic.add_argument('--num-classes', metavar='N', type=_count, help='classes to train (default: those of BASE)')
    elastic.add_argument('--img-size', metavar='N', type=_count, help='size of the images (default: that of BASE)')
    elastic.add_argument('--in-chans', metavar='N', type=_count, help='channels of the images (default: 3)')
    elastic.add_argument(
        '--model-kwargs', metavar='NAME=VALUE', type=_keyword, nargs='+', default=[], help='further arguments of BASE')
    elastic.add_argument(
        '--generator-fit-steps', metavar='N', type=partial(_count, least=0), default=1000,
        help='steps in which the generator learns to meet budgets (default: 1000)')
    _add_images(elastic, 'To sort units by their importance; without images they keep the order of BASE.')

    info = commands.add_parser('info', help='show what a model directory holds')
    info.add_argument('--json', action='store_true', help='print JSON')

    extract = commands.add_parser('extract', help='save the subnet for a budget in its own directory')
    extract.add_argument('--output', metavar='OUT', type=_path, required=True, help='directory to save the subnet in')
    extract.add_argument('--overwrite', action='store_true', help='replace the model in OUT')
    extract.add_argument(
        '--push', metavar='REPO', type=_repository, help="publish it, too, in the repository 'owner/name'")
    extract.add_argument(
        '--onnx', action='store_true', help='write it as OUT/model.onnx, too; export OUT has more options')

    evaluate = commands.add_parser('evaluate', help='measure the accuracy of the subnet for a budget on images')
    evaluate.add_argument(
        '--split', metavar='NAME', default='validation', help='split of the images (default: validation)')
    evaluate.add_argument(
        '--class-map', metavar='FILE',
        help='index of each class by its name, as for train.py; only for other names than those of the training')

    search = commands.add_parser('search', help='search for the best archs of a supernet on images, and store them')
    search.add_argument(
        '--strategy', choices=('generator', 'evolutionary', 'random'),
        help='NSGA-II from archs of the generator, NSGA-II from uniformly drawn archs, or uniformly drawn archs '
             '(default: generator if there is one)')
    for name, example, what in (('flops', '1.4G', 'MACs'), ('params', '6M', 'parameters')):
        search.add_argument(f'--{name}', metavar='N', type=_budget(example),
                            help=f'upper limit of {what}, such as {example}; both limits may be given')
    search.add_argument(
        '--cost', choices=('flops', 'params'), default='flops', help='what the front weighs against accuracy')
    search.add_argument(
        '--evaluations', metavar='N', type=_count, default=500, help='archs to measure at most (default: 500)')
    search.add_argument(
        '--population', metavar='N', type=partial(_count, least=2), default=50,
        help='archs of a generation (default: 50)')
    search.add_argument('--seed', metavar='N', type=partial(_count, least=0), default=0, help='seed (default: 0)')
    search.add_argument(
        '--output', metavar='FOLDER', type=_path,
        help='folder of the table, the picture and the accuracies measured so far (default: DIR/search)')
    search.add_argument(
        '--split', metavar='NAME',
        help='split of the images to compare archs on; not that of the test images (default: the held-out part of '
             '--train-split)')
    search.add_argument(
        '--held-out', metavar='SHARE', type=float,
        help='share of the training images to compare archs on (default: the share that the run has held out)')
    search.add_argument('--class-map', metavar='FILE', help='as for evaluate')
    _add_images(search, 'To compare archs on, and for their BatchNorm statistics.')

    for command in (evaluate, search):
        command.add_argument('--device', metavar='NAME', help='device to evaluate on (default: cuda if there is one)')
        command.add_argument('--amp', action='store_true', help='mixed precision')
        command.add_argument(
            '--amp-dtype', choices=('float16', 'bfloat16'), default='float16',
            help='number format of --amp (default: float16)')

    export = commands.add_parser('export', help='write the subnet for a budget as an ONNX file')
    export.add_argument('--output', metavar='FILE', type=Path, required=True, help='file to write, such as x.onnx')
    export.add_argument('--overwrite', action='store_true', help='replace FILE')
    export.add_argument('--opset', metavar='N', type=_count, help="version of ONNX's operators (default: torch's)")
    export.add_argument('--fixed-batch', metavar='N', type=_count, help='fixed size of a batch (default: any)')
    export.add_argument('--input-name', metavar='NAME', default='images', help='name of the input (default: images)')
    for command in (extract, export):
        command.add_argument(
            '--int8', action='store_true',
            help='quantise the ONNX file: networks with BatchNorm by training images, others without; with images, '
                 'accuracy is shown before and after')
        command.add_argument(
            '--split', metavar='NAME', default='validation', help='split of these images (default: validation)')
        command.add_argument('--class-map', metavar='FILE', help='index of each class by its name, as for evaluate')

    measure = commands.add_parser('measure', help='measure the latency of subnets, on this machine or on another one')
    measure.add_argument(
        '--backend', metavar='NAME', default='eager',
        help='what runs them: eager, compile, onnxruntime or openvino; any other name with --import (default: eager)')
    measure.add_argument('--device', metavar='NAME', help='device of torch (default: cpu)')
    measure.add_argument('--threads', metavar='N', type=_count, help="threads (default: torch's)")
    measure.add_argument('--batch-size', metavar='N', type=_count, default=1, help='images in a batch (default: 1)')
    measure.add_argument('--archs', metavar='N', type=_count, default=200, help='number of subnets (default: 200)')
    measure.add_argument(
        '--seed', metavar='N', type=partial(_count, least=0), default=0, help='of the choice of subnets (default: 0)')
    measure.add_argument(
        '--max-spread', metavar='X', type=float, default=.05,
        help='largest uncertainty of a latency, relative to it (default: 0.05)')
    measure.add_argument('--name', metavar='NAME', help='name of the device (default: backend, device and threads)')
    measure.add_argument('--output', metavar='FILE', type=_path, help='file to write (default: one in DIR)')
    measure.add_argument('--overwrite', action='store_true', help='replace the file')
    other = measure.add_mutually_exclusive_group()
    other.add_argument(
        '--export', metavar='FOLDER', type=_path,
        help='measure nothing; write ONNX files of the subnets, and a CSV to fill in on another device')
    other.add_argument(
        '--import', metavar='CSV', type=_path, dest='import_csv', help='measure nothing; read the CSV of --export')

    report = commands.add_parser('report', help='write the curve and the archs of the evaluated subnets as HTML')
    report.add_argument(
        '--output', metavar='FILE', type=_path,
        help='file to write (default: report.html in the folder of the run, or in DIR)')

    push = commands.add_parser('push', help='publish a model directory on the Hugging Face Hub')

    for command in (extract, evaluate, export):
        which = command.add_argument_group('subnet', 'If several budgets are given, all of them hold.')
        for name, example, most in (
                ('flops', '1.4G', 'most MACs'), ('params', '6M', 'most parameters'),
                ('size', '5MB', 'most bytes of weights'), ('memory', '64MB', 'most bytes of peak memory at batch 1'),
                ('latency', '8ms', 'most time on a device that was measured')):
            which.add_argument(f'--{name}', metavar='N', type=_budget(example), help=f'{most}, such as {example}')
        which.add_argument(
            '--precision', choices=('fp32', 'fp16', 'int8'), default='fp32',
            help='number format that --size counts (default: fp32)')
        which.add_argument(
            '--device-file', metavar='NAME', help='device file of --latency: its name in DIR, or a path')
        which.add_argument('--arch', metavar='JSON', type=_json, help='the arch itself, such as \'{"depth": 12, ...}\'')
        _add_images(command)
    for command in (extract, push):
        command.add_argument('--private', action='store_true', default=None, help='create a private repository')
        command.add_argument('--revision', metavar='BRANCH', help='branch of the repository (default: main)')
        command.add_argument('--token', metavar='TOKEN', help='token of the Hub (default: that of hf auth login)')
        command.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
        command.add_argument('--commit-message', metavar='TEXT', help='message of the commit')
        command.add_argument('--license', metavar='NAME', help="license on the model card, such as 'apache-2.0'")
    for command in (info, extract, evaluate, search, export, measure, report, push):
        command.add_argument(
            'directory', metavar='DIR', type=_directory, help='directory that save_pretrained or train.py wrote')
    push.add_argument('repo', metavar='REPO', type=_repository, help="repository 'owner/name'; created if missing")

    convert = commands.add_parser('convert', help='convert a training checkpoint into a model directory')
    convert.add_argument(
        'checkpoint', metavar='CHECKPOINT', type=_path,
        help="checkpoint of train.py, or of timm's own script with timm_shiftnas.patch")
    convert.add_argument('output', metavar='OUT', type=_path, help='directory to write')
    convert.add_argument('--no-ema', action='store_true', help='take the weights as trained, not their average')
    convert.add_argument(
        '--class-map', metavar='FILE',
        help="names of the classes, as for train.py; checkpoints of timm's own script do not hold them")
    convert.add_argument('--overwrite', action='store_true', help='replace the model in OUT')
    for command in (elastic, info, extract, evaluate, search, export, measure, report, push, convert):
        command.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    return parser


def _add_images(
        command: argparse.ArgumentParser,
        purpose: str = 'For evaluation, and for BatchNorm statistics that were not saved.',
) -> None:
    """Add the flags of a command that reads images; train.py has most of them, too."""
    images = command.add_argument_group('images', purpose)
    images.add_argument(
        '--data-dir', metavar='DIR',
        help='folder or tar of images, or folder of the files of --dataset')
    images.add_argument(
        '--dataset', metavar='NAME', default='', help="dataset as for train.py: 'sklearn/digits', 'glyphs', timm's")
    images.add_argument('--batch-size', metavar='N', type=_count, default=64, help='images in a batch (default: 64)')
    images.add_argument(
        '--workers', metavar='N', type=partial(_count, least=0), default=0, help='data loading processes (default: 0)')
    images.add_argument(
        '--train-split', metavar='NAME',
        help='split of the images for BatchNorm statistics (default: train, or all images where there are no splits)')
    images.add_argument(
        '--bn-images', metavar='N', type=_count, default=2000,
        help='number of images for BatchNorm statistics (default: 2000)')
    images.add_argument('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: that of training)')
    images.add_argument('--skip-broken-images', action='store_true', help='replace an unreadable image by the next one')
    images.add_argument(
        '--ignore-exif-orientation', action='store_true',
        help='leave photographs as their pixels are stored, also if the model was trained on upright ones')
    images.add_argument('--dataset-download', action='store_true', help='allow the download of torch/ datasets')
    images.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='allow hfds/ datasets to run their own code')
    images.add_argument('--input-key', metavar='NAME', help='key of the image in hfds/ and wds/ datasets')
    images.add_argument('--target-key', metavar='NAME', help='key of the target in hfds/ and wds/ datasets')
    images.add_argument('--num-samples', metavar='N', type=_count, help='images of a streamed dataset (wds/)')
    images.add_argument(
        '--glyph-images', metavar='N', type=_count, default=12_000, help='images of glyphs (default: 12000)')
    images.add_argument('--glyph-difficulty', metavar='P', type=float, default=.5, help='of glyphs (default: 0.5)')
    images.add_argument('--glyph-pixels', metavar='N', type=_count, default=32, help='side of glyphs (default: 32)')


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not JSON: {error}') from None


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number of {least} or more')
    return int(text)


def _budget(example: str) -> Callable[[str], str]:
    """A number with a unit, which is parsed where its kind is known."""
    def check(text: str) -> str:
        if not re.fullmatch(r'\s*[0-9.]+(e[+-]?[0-9]+)?\s*[a-zµ]*\s*', text, re.IGNORECASE):
            raise argparse.ArgumentTypeError(f'{text!r} is not a budget; give a number such as {example}')
        return text

    return check


def _repository(text: str) -> str:
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a repository; give 'owner/name'")
    return text


def _keyword(text: str) -> tuple[str, str]:
    name, equals, value = text.partition('=')
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f'{text!r} must be NAME=VALUE, such as patch_size=8')
    return name, value


def _path(text: str) -> Path:
    """A path; shells do not expand the '~' of `--output=~/x`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f'{text!r}: there is no such home directory') from None


def _directory(text: str) -> Path:
    if not _path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f'{text} is not a directory; give one that save_pretrained or train.py wrote')
    return _path(text)
