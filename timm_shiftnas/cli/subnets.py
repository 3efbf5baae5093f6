"""`timm-shiftnas extract`, `convert` and `push`."""
from __future__ import annotations

import argparse
import copy
import json
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from timm.data import resolve_data_config

from ..hub.download import check_repo_id
from ..hub.format import ONNX
from ..hub.load import SavedModel, from_pretrained
from ..hub.push import push_directory
from ..hub.save import save_pretrained
from ..method.proposals import BudgetWarning
from ..models import describe_images, static_counts
from ..space.resources import LATENCY, RESOURCES
from ..training.checkpoints import load_checkpoint
from ..utils.files import atomic_write
from ..utils.units import format_count
from .images import Expected, read_class_map, training_batches
from .onnx_files import write_onnx
from .shared import warn

__all__ = ['check_output', 'load_subnet', 'run_convert', 'run_extract', 'run_push']

BUDGETS = dict.fromkeys(resource.keyword for resource in (*RESOURCES.values(), LATENCY))


def run_extract(args: argparse.Namespace) -> None:
    """Save the subnet for a budget in its own directory, with --onnx also as an ONNX file; publish it with --push."""
    saved = SavedModel(args.directory)
    check_output(args.output, args.directory, args.overwrite)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet already; extract needs a supernet')
    if args.push is not None:
        check_repo_id(args.push)
    net = load_subnet(saved, args)
    rows = [row for row in saved.record.results if saved.space.from_dict(row['arch']) == net.arch]
    if saved.record.resource is not None:  # the budget is of a resource that a saved subnet does not know
        rows = [dict(row, budget=None) for row in rows]
    with TemporaryDirectory() as folder:  # an ONNX file that cannot be written leaves no directory behind
        file = Path(folder) / ONNX
        about = write_onnx(saved, copy.deepcopy(net), file, args) if args.onnx else ''
        save_pretrained(args.output, net, results=rows[:1], training=saved.record.training)
        if args.onnx:
            with atomic_write(args.output / ONNX) as temporary:
                shutil.copyfile(file, temporary)
    macs, params = static_counts(net)
    print(f'{args.output}: {format_count(macs)} MACs, {format_count(params)} params')
    print(json.dumps(net.arch.to_dict()))
    if args.onnx:
        print(f'{args.output / ONNX}: {about}')
    if args.push is not None:
        publish(args, args.output, args.push)


def run_convert(args: argparse.Namespace) -> None:
    """Convert a training checkpoint into a model directory."""
    check_output(args.output, None, args.overwrite, flag='OUT')
    net, generator, state = load_checkpoint(args.checkpoint, use_ema=not args.no_ema)
    if args.class_map:
        indices = read_class_map(args.class_map, net.num_classes)
        describe_images(net, {index: name for name, index in reversed(indices.items())})
    data_config = resolve_data_config(state['args'], model=net)
    if generator is None:
        save_pretrained(args.output, net, data_config=data_config)
        print(f'{args.output}: {format_count(static_counts(net)[0])} MACs')
        return
    save_pretrained(
        args.output, net, generator, groups=state['edges'], probabilities=state['history'][-1][1],
        data_config=data_config)
    print(f'{args.output}: {format_count(net.macs(net.space.smallest))} to '
          f'{format_count(net.macs(net.space.largest))} MACs, after {state["update"]} updates')


def check_output(output: Path, source: Path | None, overwrite: bool, flag: str = '--output') -> None:
    """Refuse to write over anything but, with --overwrite, another model.

    Args:
        output: Directory to write.
        source: Directory to read.
        overwrite: Whether --overwrite was given.
        flag: Where `output` was given.

    Raises:
        ValueError: If something else is there.
    """
    problem = None
    if output.exists() and not output.is_dir():
        problem = 'is a file; give a directory'
    elif source is not None and output.exists() and output.samefile(source):
        problem = 'is the supernet itself; give another directory'
    elif output.exists() and any(output.iterdir()):
        try:
            SavedModel(output)
            problem = None if overwrite else 'holds a model already; add --overwrite to replace it'
        except ValueError:
            problem = 'is not empty and holds no model; give another directory'
    if problem:
        raise ValueError(f'{flag} {output} {problem}')


def run_push(args: argparse.Namespace) -> None:
    """Publish a model directory."""
    publish(args, args.directory, args.repo)


def publish(args: argparse.Namespace, directory: Path, repo: str) -> None:
    print(push_directory(
        directory, repo, private=args.private, revision=args.revision, token=args.token, create_pr=args.create_pr,
        commit_message=args.commit_message, license=args.license))


def load_subnet(saved: SavedModel, args: argparse.Namespace, device: torch.device | None = None) -> torch.nn.Module:
    """Load the subnet of the budgets or --arch; BatchNorm statistics that were not saved come from the images."""
    budgets = {name: getattr(args, name) for name in BUDGETS}
    if saved.kind == 'supernet' and args.arch is None and not any(budgets.values()):
        raise ValueError(
            f'{saved} holds a supernet; choose a subnet with --flops 1.4G (MACs), --params 6M, --size 5MB, '
            '--memory 64MB, --latency 8ms or --arch JSON')
    loader = training_batches(Expected.by(saved), args) if args.dataset or args.data_dir else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        net = from_pretrained(
            args.directory, arch=args.arch, precision=args.precision, device_file=args.device_file, loader=loader,
            device=device, **budgets)
    messages = {
        str(warning.message).replace('loader= of training images', '--data-dir or --dataset'): warning.category
        for warning in caught if warning.category in (UserWarning, BudgetWarning)}
    faults = [message for message, category in messages.items() if category is UserWarning]
    if faults and getattr(args, 'push', None):
        raise ValueError(f'not published: {faults[0]}')
    for message in messages:
        warn(message)
    return net
