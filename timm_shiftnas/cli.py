"""The commands of `timm-shiftnas`: info, extract, evaluate, export, push and convert.

Their parser is in `timm_shiftnas_cli`, which is fast to import.
"""
from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader, resolve_data_config

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
from .models.export import export_onnx
from .training.checkpoints import load_checkpoint
from .utils.units import format_count

__all__ = ['COMMANDS', 'describe']


# -- info --------------------------------------------------------------------------------------------------------------


def run_info(args: argparse.Namespace) -> None:
    """Print what a model directory holds."""
    data = describe(SavedModel(args.directory))
    print(json.dumps(data, indent=2) if args.json else info_text(data))


def describe(saved: SavedModel) -> dict[str, Any]:
    """Describe a saved model as JSON-able data, after checking its files.

    Raises:
        ValueError: If a file has changed since it was saved, or the config does not describe a network.
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


def info_text(data: dict[str, Any]) -> str:
    """The description of a saved model for the terminal."""
    channels, height, width = data['input_size']
    lines = [
        f'{data["directory"]}: {data["kind"]} {data["architecture"]}',
        f'input    {channels} x {height} x {width}, {data["num_classes"]} classes']
    if data['kind'] == 'supernet':
        lines += [f'{unit:<9}{format_count(data[name][0])} to {format_count(data[name][1])}'
                  for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append(f'space    {data["size"]:,} archs')
        lines += [field_line(name, values) for name, values in data['space'].items() if name != 'family']
    else:
        lines += [f'{unit:<9}{format_count(data[name])}' for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append('arch')
        lines += [field_line(name, value) for name, value in data['arch'].items()]
    if 'groups' in data:
        edges = [format_count(edge) for edge in data['groups']]
        shares = data.get('probabilities', [None] * (len(edges) - 1))
        lines.append(f'groups   {len(shares)}, of MACs')
        lines += [f'  {low} to {high}' + ('' if share is None else f': P = {share:.4f}')
                  for low, high, share in zip(edges, edges[1:], shares, strict=False)]
    if 'results' in data:
        lines += ['results', *(f'  {line}' for line in format_table(data['results']).splitlines())]
    lines.append('files    unchanged since they were saved')
    lines += [f'  {name}: {format_count(entry["size"])}B, sha256 {entry["sha256"][:12]}'
              for name, entry in data['files'].items()]
    return '\n'.join(lines)


def field_line(name: str, value: Any) -> str:
    """A field of a space or an arch; a bar separates layers that have their own choices."""
    def plain(value: Any) -> str:
        if isinstance(value, list):
            return (' | ' if any(isinstance(item, list) for item in value) else ' ').join(map(plain, value))
        return str(value) if isinstance(value, (str, bool)) else f'{value:g}'

    return f'  {name:<13}{plain(value)}'


# -- extract, convert, push --------------------------------------------------------------------------------------------


def run_extract(args: argparse.Namespace) -> None:
    """Save the subnet for a budget in its own directory, and publish it with --push."""
    saved = SavedModel(args.directory)
    check_output(args.output, args.directory, args.overwrite)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet already; extract needs a supernet')
    if args.push is not None:
        check_repo_id(args.push)
    net = load_subnet(saved, args)
    rows = [row for row in saved.info.get('results', ()) if row['arch'] == net.arch.to_dict()]
    save_pretrained(args.output, net, results=rows[:1] or None, training=saved.info.get('training'))
    macs, params = static_counts(net)
    print(f'{args.output}: {format_count(macs)} MACs, {format_count(params)} params')
    print(json.dumps(net.arch.to_dict()))
    if args.push is not None:
        publish(args, args.output, args.push)


def run_convert(args: argparse.Namespace) -> None:
    """Convert a training checkpoint into a model directory."""
    check_output(args.output, None, args.overwrite, flag='OUT')
    net, generator, state = load_checkpoint(args.checkpoint, use_ema=not args.no_ema)
    save_pretrained(
        args.output, net, generator, groups=state['edges'], probabilities=state['history'][-1][1],
        data_config=resolve_data_config(state['args'], model=net))
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


def load_subnet(saved: SavedModel, args: argparse.Namespace) -> torch.nn.Module:
    """Load the subnet of --flops, --params or --arch; BatchNorm statistics that were not saved come from --data-dir."""
    loader = None if args.data_dir is None else training_images(saved, args.data_dir, args.bn_images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        net = from_pretrained(args.directory, flops=args.flops, params=args.params, arch=args.arch, loader=loader)
    messages = dict.fromkeys(
        str(warning.message).replace('loader= of training images', '--data-dir')
        for warning in caught if warning.category is UserWarning)
    if messages and getattr(args, 'push', None):
        raise ValueError(f'not published: {next(iter(messages))}')
    for message in messages:
        print(f'timm-shiftnas: warning: {message}', file=sys.stderr)
    return net


# -- export ------------------------------------------------------------------------------------------------------------


def run_export(args: argparse.Namespace) -> None:
    """Write the subnet for a budget as an ONNX file."""
    output = args.output.expanduser()
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise ValueError(f'--output {output} exists already; give another file, or add --overwrite to replace a file')
    output.parent.mkdir(parents=True, exist_ok=True)
    net = load_subnet(SavedModel(args.directory), args)
    written = export_onnx(net, output, opset=args.opset, batch_size=args.batch_size, input_name=args.input_name)
    size = ' x '.join(map(str, [args.batch_size or 'batch', *written['input_size']]))
    difference = written['difference']
    checked = 'not checked, because onnxruntime is not installed' if difference is None else (
        f'onnxruntime agrees to {difference:.1g}')
    print(f'{output}: {format_count(static_counts(net)[0])} MACs, {args.input_name} {size}, opset {written["opset"]}, '
          f'{checked}')


# -- evaluate ----------------------------------------------------------------------------------------------------------


def run_evaluate(args: argparse.Namespace) -> None:
    """Print the accuracy of a subnet on a folder of images."""
    saved = SavedModel(args.directory)
    net = load_subnet(saved, args)
    if has_batch_norm(net):
        net = ResizedInput(net)
    images = open_images(saved, args.data_dir, args.split)
    top1, top5 = evaluate(net, batches(saved, images), torch.device('cpu'))
    print(f'{len(images)} images: top-1 {top1:.2f}%, top-5 {top5:.2f}%')


def open_images(saved: SavedModel, folder: str, split: str) -> torch.utils.data.Dataset:
    """A folder of images, in the color mode of a saved network."""
    mode = 'L' if saved.config['pretrained_cfg']['input_size'][0] == 1 else 'RGB'
    return create_dataset('', folder, split=split, is_training=False, input_img_mode=mode)


def training_images(saved: SavedModel, folder: str, count: int) -> Iterable[Any]:
    """Batches of some images of a folder: of its train/, if there is one."""
    images = open_images(saved, folder, 'train' if (Path(folder) / 'train').is_dir() else '')
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return batches(saved, DatasetView(images, order[:count]))


def batches(saved: SavedModel, images: torch.utils.data.Dataset) -> Iterable[Any]:
    """Batches of images, preprocessed as a saved network expects them."""
    config = resolve_data_config(pretrained_cfg=saved.config['pretrained_cfg'])
    return create_loader(images, batch_size=64, use_prefetcher=False, num_workers=0, **preprocessing(config))


COMMANDS = dict(
    info=run_info, extract=run_extract, convert=run_convert, push=run_push, evaluate=run_evaluate, export=run_export)
