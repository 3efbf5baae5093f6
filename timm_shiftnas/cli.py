"""The commands of `timm-shiftnas`: elastic, info, extract, evaluate, search, export, measure, report, push
and convert.

Their parser is in `timm_shiftnas_cli`, which is fast to import.
"""
from __future__ import annotations

import argparse
import json
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from timm.data import create_loader, resolve_data_config
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset, IterableDataset

from .data.datasets import class_names, create_dataset
from .data.image_reader import standard_split
from .data.modes import choose_mode, default_mode
from .data.shift_batches import preprocessing
from .data.views import DatasetView, default_share, split_held_out
from .evaluation.accuracy import evaluate
from .evaluation.backends import OnnxNetwork, versions_of
from .evaluation.foreign_devices import export_subnets, read_latencies
from .evaluation.latency import Setup, archs_to_measure, create_device, machine, measure_archs
from .evaluation.plots import plot_front
from .evaluation.report import MARK
from .evaluation.search import COSTS, search
from .evaluation.tables import format_table, read_budgets_csv, write_budgets_csv
from .hub.download import check_repo_id
from .hub.format import CONFIG, device_file, saved_class_names
from .hub.load import SavedModel, from_pretrained
from .hub.push import push_directory
from .hub.report import REPORT, write_report
from .hub.save import add_device, save_pretrained
from .hub.searched import save_searched
from .method import ArchitectureGenerator, BudgetGroups
from .method.proposals import BudgetWarning
from .models import describe_images, sort_by_importance, static_counts
from .models.calibration import ResizedInput, has_batch_norm, resized
from .models.export import export_onnx
from .models.quantize import quantize_onnx
from .space import complexity
from .space.latency import operator_features
from .space.resources import RESOURCES, Resource
from .training.checkpoints import load_checkpoint
from .training.elastic import images_of, open_base
from .training.timm_flags import literal
from .utils.files import FolderLock
from .utils.paths import expand_home
from .utils.text import one_line, printable
from .utils.units import format_count, format_quantity

__all__ = ['COMMANDS', 'describe']

LATENCY = Resource('latency', 'latency', 'latency', 'seconds', lambda space, one_hots: one_hots[0])  # to format alone
BUDGETS = ('flops', 'params', 'size', 'memory', 'latency')


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
    net, space, counts = saved.skeleton(), saved.space(), dict(macs=complexity.macs, params=complexity.params)
    data = dict(
        directory=saved.name, kind=saved.kind, architecture=saved.config['architecture'],
        input_size=list(net.pretrained_cfg['input_size']), image_mode=net.image_mode, num_classes=net.num_classes)
    if saved.kind == 'supernet':
        ends = space.smallest, space.largest
        data.update(
            space=space.unbind().to_dict(), size=space.size,
            **{name: [count(space, arch) for arch in ends] for name, count in counts.items()})
        if archs := saved.archs('searched', space):
            data.update(searched=[complexity.macs(space, arch) for arch in archs])
    else:
        data.update(arch=net.arch.to_dict(), **{name: count(space, net.arch) for name, count in counts.items()})
    names = ('groups', 'resource', 'device', 'probabilities', 'results')
    optional = {name: saved.info[name] for name in names if name in saved.info}
    if devices := saved.devices():
        optional['devices'] = {name: str(device) for name, device in devices.items()}
    return dict(data, **optional, files=saved.info['files'])


def info_text(data: dict[str, Any]) -> str:
    """The description of a saved model for the terminal."""
    data = printable(data)
    channels, height, width = data['input_size']
    mode = '' if data['image_mode'] == default_mode(channels) else f' {data["image_mode"]}'
    lines = [
        f'{data["directory"]}: {data["kind"]} {data["architecture"]}',
        f'input    {channels} x {height} x {width}{mode}, {data["num_classes"]} classes']
    if data['kind'] == 'supernet':
        lines += [f'{unit:<9}{format_count(data[name][0])} to {format_count(data[name][1])}'
                  for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append(f'space    {data["size"]:,} archs')
        if 'searched' in data:
            low, high = min(data['searched']), max(data['searched'])
            lines.append(f'searched {len(data["searched"])} archs of {format_count(low)} to {format_count(high)} MACs')
        lines += [field_line(name, values) for name, values in data['space'].items() if name != 'family']
    else:
        lines += [f'{unit:<9}{format_count(data[name])}' for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append('arch')
        lines += [field_line(name, value) for name, value in data['arch'].items()]
    resource = RESOURCES.get(data.get('resource', 'macs'), LATENCY)
    if 'groups' in data:
        edges = [resource.format(edge) for edge in data['groups']]
        shares = data.get('probabilities', [None] * (len(edges) - 1))
        lines.append(f'groups   {len(shares)}, of {resource.label}')
        lines += [f'  {low} to {high}' + ('' if share is None else f': P = {share:.4f}')
                  for low, high, share in zip(edges, edges[1:], shares, strict=False)]
    if 'results' in data:
        lines += ['results', *(f'  {line}' for line in format_table(data['results'], resource).splitlines())]
    lines += [f'device   {device}' for device in data.get('devices', {}).values()]
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


# -- elastic -----------------------------------------------------------------------------------------------------------


def run_elastic(args: argparse.Namespace) -> None:
    """Save a network of timm as a supernet, its units sorted by importance."""
    check_output(args.output, None, args.overwrite)
    model_args = dict(img_size=args.img_size, in_chans=args.in_chans) | {
        name: literal(value) for name, value in args.model_kwargs}
    base = open_base(
        args.base, {name: value for name, value in model_args.items() if value is not None},
        num_classes=args.num_classes, file=args.pretrained_path)
    expected = Expected(base.net.subnet_cfg(base.net.space.largest))
    loader: Iterable[Any] | None = None
    if args.dataset or args.data_dir:
        loader = training_batches(expected, args)
        if not base.knows_classes:
            loader = images_of(loader)
    sort_by_importance(base.net, loader)
    net = base.replace_head()
    generator = ArchitectureGenerator(net.space)
    generator.fit()
    save_pretrained(args.output, net, generator, data_config=resolve_data_config(pretrained_cfg=expected.config))
    low, high = (format_count(net.macs(arch)) for arch in (net.space.smallest, net.space.largest))
    print(f'{args.output}: {net.space.size:,} subnets of {low} to {high} MACs; train them with '
          f'--model local-dir:{args.output}')


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
    if saved.record.resource is not None:  # the budget is of a resource that a saved subnet does not know
        rows = [dict(row, budget=None) for row in rows]
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
    """Load the subnet of --flops, --params or --arch; BatchNorm statistics that were not saved come from its images."""
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


def warn(message: str) -> None:
    print(f'timm-shiftnas: warning: {message}', file=sys.stderr)


# -- export ------------------------------------------------------------------------------------------------------------


def run_export(args: argparse.Namespace) -> None:
    """Write the subnet for a budget as an ONNX file."""
    output = Path(expand_home(args.output))
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise ValueError(f'--output {output} exists already; give another file, or add --overwrite to replace a file')
    output.parent.mkdir(parents=True, exist_ok=True)
    saved = SavedModel(args.directory)
    net = load_subnet(saved, args)
    options = dict(opset=args.opset, batch_size=args.fixed_batch, input_name=args.input_name)
    if args.int8:
        return export_int8(saved, net, output, args, options)
    written = export_onnx(net, output, **options)
    size = ' x '.join(map(str, [args.fixed_batch or 'batch', *written['input_size']]))
    difference = written['difference']
    checked = 'not checked, because onnxruntime is not installed' if difference is None else (
        f'onnxruntime agrees to {difference:.1g}')
    print(f'{output}: {format_count(static_counts(net)[0])} MACs, {args.input_name} {size}, opset {written["opset"]}, '
          f'{checked}')


def export_int8(
        saved: SavedModel, net: torch.nn.Module, output: Path, args: argparse.Namespace, options: dict[str, Any],
) -> None:
    """Write a subnet as an ONNX file in int8, and print its bytes and its accuracy before and after.

    Networks with BatchNorm are quantised statically, by their training images, and others dynamically.
    """
    with_images = bool(args.dataset or args.data_dir)
    if has_batch_norm(net) and not with_images:
        raise ValueError('the activations of this network are quantised by training images: give --data-dir or '
                         '--dataset')
    if args.fixed_batch is not None and with_images:
        if args.fixed_batch > 1:
            raise ValueError(f'--int8 with images reads batches of any size: leave out --fixed-batch {args.fixed_batch}'
                             ', or give --fixed-batch 1')
        args.batch_size = 1
    expected, rows = Expected.by(saved), [('', 'bytes', 'top-1', 'top-5')]
    with TemporaryDirectory() as folder:
        plain = Path(folder) / 'fp32.onnx'
        export_onnx(net, plain, **options)
        static = has_batch_norm(net)
        quantize_onnx(
            plain, output,
            (resized(net, images) for images, _ in training_batches(expected, args)) if static else None)
        for name, path in (('fp32', plain), ('int8', output)):
            accuracy = ['', '']
            if with_images:
                labelled, _ = labelled_images(saved, net.num_classes, args)
                top = evaluate(OnnxNetwork(path, net), batches(expected, labelled, args), torch.device('cpu'))
                accuracy = [f'{value:.2f}%' for value in top]
            rows.append((name, format_quantity(path.stat().st_size, 'bytes'), *accuracy))
    print(f'{output}: int8, {"static" if static else "dynamic"} quantisation')
    print('\n'.join('  '.join(cell.rjust(9) for cell in row).rstrip() for row in rows))


# -- measure -----------------------------------------------------------------------------------------------------------


def run_measure(args: argparse.Namespace) -> None:
    """Measure latencies of subnets on this machine, or on another one by ONNX files, and write a device file."""
    saved = SavedModel(args.directory)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet; latencies of many subnets are measured: give a supernet')
    net = saved.network()
    operator_features(net.space, net.space.one_hot(net.space.smallest))  # refused here, not after hours of measuring
    setup = Setup(args.backend, args.device or 'cpu', args.threads or torch.get_num_threads(), args.batch_size)
    archs = archs_to_measure(net.space, args.archs, args.seed)
    if args.export:
        print(f'{export_subnets(net, archs, args.export, args.batch_size)}: run these {len(archs)} files, and fill in '
              f'the column milliseconds; then give --import, with --name, --backend and --threads')
        return
    name = args.name or f'{setup.backend}_{setup.device}_{setup.threads}_threads_batch_{setup.batch_size}'
    output = args.output or args.directory / device_file(name)
    if output.exists() and not args.overwrite:
        raise ValueError(f'{output} exists already; give another --name, or --overwrite')
    facts: dict[str, Any] = {}
    partial = output.with_name(f'{output.name}.partial')
    if args.import_csv:
        archs, seconds = read_latencies(args.import_csv, net.space, args.batch_size)
    else:
        timings = measure_archs(net, archs, setup, partial, args.max_spread)
        reference = median(timing.reference for timing in timings)
        seconds = [timing.ratio * reference for timing in timings]
        facts = dict(machine=machine(), versions=versions_of(setup.backend),
                     spread=median(timing.spread for timing in timings))
    device = create_device(net.space, archs, seconds, name, setup, **facts)
    if args.output:
        device.write(output)
    else:
        add_device(args.directory, device)
    partial.unlink(missing_ok=True)
    low, high = (format_quantity(each, 'seconds') for each in device.resource(net.space).range(net.space))
    error = device.error
    print(f'{output}: {low} to {high}, predicted from {len(archs)} subnets; held-out error: median '
          f'{error["median"]:.1%}, 95th percentile {error["p95"]:.1%}, rank correlation {error["spearman"]:.3f}')


# -- report ------------------------------------------------------------------------------------------------------------


def run_report(args: argparse.Namespace) -> None:
    """Write what a model directory holds as one HTML file."""
    saved, front = SavedModel(args.directory), args.directory / 'search' / 'front.csv'
    try:
        rows = read_budgets_csv(front) if front.is_file() else []
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{front} is not the table of a search ({one_line(error, 200)}); remove it') from error
    run = args.directory.absolute().parent
    trained = args.directory.absolute().name == 'model' and (run / 'summary.csv').exists()
    output = args.output or (run if trained else args.directory) / REPORT
    if output.is_dir() or (output.exists() and MARK.encode() not in output.read_bytes()[:1000]):
        raise ValueError(f'--output {output} exists already and is not a report; give another file')
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(output, saved, rows)
    print(f'{output}: open it in a browser')


# -- evaluate ----------------------------------------------------------------------------------------------------------


def run_evaluate(args: argparse.Namespace) -> None:
    """Print the accuracy of a subnet on a folder of images, or on another dataset."""
    if not (args.dataset or args.data_dir):
        raise ValueError('there are no images: give --data-dir DIR, or --dataset NAME such as sklearn/digits')
    saved, device = SavedModel(args.directory), open_device(args.device)
    check_classifier(saved)
    net = load_subnet(saved, args, device)
    images, part = labelled_images(saved, net.num_classes, args, args.split)
    if has_batch_norm(net):
        net = ResizedInput(net)
    top1, top5 = evaluate(net, batches(Expected.by(saved), images, args), device, autocast_of(args, device))
    print(f'{len(images)} images{part}: top-1 {top1:.2f}%, top-5 {top5:.2f}%')


def check_classifier(saved: SavedModel) -> None:
    """Raise a `ValueError` if a saved model is a backbone, or a network around one: these have no top-1 accuracy."""
    if saved.record.backbone is not None:
        raise ValueError(
            f'{saved} holds a backbone, or a network around one, and not an image classifier: load it in Python, with '
            'timm_shiftnas.from_pretrained, and measure what it is for')


def autocast_of(args: argparse.Namespace, device: torch.device) -> torch.autocast | None:
    """The mixed precision of --amp."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else None


def open_device(name: str | None) -> torch.device:
    """The device of --device; by default a GPU if there is one.

    Raises:
        ValueError: If torch cannot use it.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise ValueError(f'--device {name} cannot be used ({one_line(error, 200)}); give cpu or cuda') from error


# -- search ------------------------------------------------------------------------------------------------------------


def run_search(args: argparse.Namespace) -> None:
    """Search for the best archs of a supernet, and store them in its directory."""
    if not (args.dataset or args.data_dir):
        raise ValueError('there are no images: give --data-dir DIR, or --dataset NAME such as sklearn/digits')
    saved, device = SavedModel(args.directory), open_device(args.device)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet; search needs a supernet')
    check_classifier(saved)
    net = saved.network().to(device).eval()
    generator, edges = saved.generator(net.space) if saved.has_generator else None, saved.record.groups
    images, train_images, which = search_images(saved, net.num_classes, args)
    expected = Expected.by(saved)
    output = args.output or args.directory / 'search'
    output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(output)
    try:
        print(f'searching on {which}')
        found = search(
            net, batches(expected, images, args), generator=generator, strategy=args.strategy, flops=args.flops,
            params=args.params, cost=args.cost, evaluations=args.evaluations, population=args.population,
            groups=BudgetGroups(tuple(edges), generator.resource) if generator and edges else None,
            train_loader=batches(expected, train_images, args) if has_batch_norm(net) else None,
            bn_images=args.bn_images, seed=args.seed, autocast=autocast_of(args, device),
            file=output / 'evaluations.jsonl')
        write_budgets_csv(output / 'front.csv', found.front)
        plot_front(output / 'front.png', found.front, found.rows, COSTS[args.cost])
        save_searched(saved, found.archs, found.bn_stats, found.limits)
    finally:
        lock.release()
        lock.path.unlink(missing_ok=True)
        with suppress(OSError):
            output.rmdir()  # nothing was measured
    print(format_table(found.front))
    print(f'{len(found.rows)} archs measured; the {len(found.front)} of the front are stored in {saved}, the table in '
          f'{output / "front.csv"}')


def search_images(saved: SavedModel, num_classes: int, args: argparse.Namespace) -> tuple[Dataset, Dataset, str]:
    """The images that archs are compared on, training images for BatchNorm, and a description of the former.

    Without --split, they are the part of the training images that the training has held out, or would have.

    Raises:
        ValueError: If there is no training split, or as for `labelled_images` and `split_held_out`.
    """
    train_split = args.train_split or ('train' if args.dataset else standard_split(args.data_dir))
    if args.split is not None:
        images, part = labelled_images(saved, num_classes, args, args.split)
        train_images = open_images(Expected.by(saved), args, train_split, min_classes=0)
        return images, first_images(train_images, args.bn_images), f'{len(images)} images{part} of {args.split!r}'
    if train_split in ('validation', 'test') and not args.train_split:
        raise ValueError(
            f'{args.data_dir} has no training images to hold some out of; give --split NAME, of images '
            'that no accuracy is reported on')
    images, part = labelled_images(saved, num_classes, args, train_split)
    known = (saved.record.training or {}).get('held_out')
    share, seed = (known['share'], known['seed']) if known else (default_share(images), 0)
    if args.held_out is not None:
        share = args.held_out
    train_images, held_out = split_held_out(images, share, seed)
    if not known or share > known['share']:
        warn('the supernet was trained on images that archs are compared on, which favours large ones; give --split '
             'NAME of images that were not trained on and are not the test images')
    return (held_out, first_images(train_images, args.bn_images),
            f'{len(held_out)} images{part}, held out of {train_split or "all"!r} ({share:.1%}, seed {seed})')


# -- images ------------------------------------------------------------------------------------------------------------


def labelled_images(
        saved: SavedModel, num_classes: int, args: argparse.Namespace, split: str) -> tuple[Dataset, str]:
    """The images of a split to evaluate on. Their targets are the classes of the network that have the same names.

    Returns:
        The dataset, and a remark if it has images of a part of the classes only.

    Raises:
        ValueError: If a class of the images is none of the network's, or it is not known which one.
    """
    images = open_images(Expected.by(saved), args, split)
    names, where = class_names(images), args.data_dir or args.dataset
    found = {*names.values()}
    if args.class_map:
        indices = read_class_map(args.class_map, num_classes)
        left_out = sorted(found - {*indices})
        if left_out or not names:
            images = open_images(Expected.by(saved), args, split, class_map=args.class_map)
            names = class_names(images)
        if left_out:
            warn(f'{where}: the classes {reprlib.repr(left_out)} are not in {args.class_map}; they are left out')
    else:
        known = saved_class_names(saved.config, num_classes, saved.where(CONFIG))
        if names and not known:
            if len(names) != num_classes:
                raise ValueError(
                    f'{where} has {len(names)} of the {num_classes} classes of {saved}, which was saved without their '
                    'names; give --class-map FILE, a .txt with the name of a class in each line, in the order of '
                    'training')
            warn(f'{saved} was saved without the names of its classes; those of {where} are numbered in their order')
        if not names or not known or names == known:
            return images, ''
        indices = {name: index for index, name in known.items()}
    if unknown := [name for name in names.values() if name not in indices]:
        raise ValueError(
            f'{where}: the class {unknown[0]!r} is none of the {len(indices)} classes of the model '
            f'({reprlib.repr(list(indices))}); rename or remove its folder, or give --class-map FILE')
    images.target_transform = {index: indices[name] for index, name in names.items()}.__getitem__
    known_classes, here = {*indices.values()}, {indices[name] for name in found & {*indices}}
    return images, '' if here == known_classes else f' of {len(here)} of the {len(known_classes)} classes'


def read_class_map(path: str, num_classes: int) -> dict[str, int]:
    """The index of each class by its name, of a file in timm's format: .txt with a name in each line, or .pkl.

    Raises:
        ValueError: If the file cannot be read, or an index is out of range.
    """
    try:
        indices = {str(name): int(index) for name, index in load_class_map(path).items() if name != ''}
        wrong = {name: index for name, index in indices.items() if not 0 <= index < num_classes}
        if wrong:
            raise ValueError(f'{reprlib.repr(wrong)} for a model of {num_classes} classes, from 0')
        return indices
    except (AssertionError, ValueError, TypeError, OSError, EOFError, UnpicklingError) as error:
        raise ValueError(f'--class-map {path} cannot be used: {one_line(error, 200)}') from error


class Expected(NamedTuple):
    """The images that a network expects: timm's configuration, PIL mode, and whether photographs are turned."""
    config: Mapping[str, Any]
    mode: str | None = None
    upright: bool | None = None

    @classmethod
    def by(cls, saved: SavedModel) -> Expected:
        return cls(saved.config['pretrained_cfg'], saved.record.image_mode, saved.record.upright)


def open_images(
        expected: Expected, args: argparse.Namespace, split: str, min_classes: int = 1, **options: Any) -> Dataset:
    """The images of --dataset and --data-dir, in the mode that the network was trained on."""
    mode = choose_mode(args.input_img_mode or expected.mode, expected.config['input_size'][0])
    upright = not args.ignore_exif_orientation and expected.upright is not False
    options |= {name: getattr(args, name) for name in ('input_key', 'target_key') if getattr(args, name)}
    return create_dataset(
        args.dataset, args.data_dir, split=split, is_training=False, input_img_mode=mode, min_classes=min_classes,
        skip_broken=args.skip_broken_images, upright=upright, download=args.dataset_download,
        num_samples=args.num_samples, trust_remote_code=args.dataset_trust_remote_code, glyphs=dict(
            images=args.glyph_images, difficulty=args.glyph_difficulty, pixels=args.glyph_pixels), **options)


def training_batches(expected: Expected, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of --bn-images training images. The dataset is opened when the first one is read."""
    split = args.train_split or ('train' if args.dataset else standard_split(args.data_dir))
    images = open_images(expected, args, split, min_classes=0)
    yield from batches(expected, first_images(images, args.bn_images), args)


def first_images(images: Dataset, count: int) -> Dataset:
    """The first images of a dataset in random order; all of a stream."""
    if isinstance(images, IterableDataset):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return DatasetView(images.base, images.indices[order]) if isinstance(images, DatasetView) else (
        DatasetView(images, order))


def batches(expected: Expected, images: Dataset, args: argparse.Namespace) -> Iterable[Any]:
    """Batches of images, preprocessed as a network expects them."""
    config = resolve_data_config(pretrained_cfg=expected.config)
    return create_loader(
        images, batch_size=args.batch_size, use_prefetcher=False, num_workers=args.workers, **preprocessing(config))


COMMANDS = dict(
    elastic=run_elastic, info=run_info, extract=run_extract, convert=run_convert, push=run_push, evaluate=run_evaluate,
    search=run_search, export=run_export, measure=run_measure, report=run_report)
