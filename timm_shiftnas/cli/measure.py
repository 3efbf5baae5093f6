"""`timm-shiftnas measure`: latencies of subnets."""
from __future__ import annotations

import argparse
import re
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..evaluation.backends import versions_of
from ..evaluation.foreign_devices import export_subnets, read_latencies
from ..evaluation.latency import (
    Setup,
    UnpredictableError,
    archs_to_measure,
    create_device,
    machine,
    measure_archs,
)
from ..hub.format import device_file
from ..hub.load import SavedModel
from ..hub.save import add_device
from ..space.latency import Device, operator_features
from ..utils.units import format_quantity

__all__ = ['run_measure']


def run_measure(args: argparse.Namespace) -> None:
    """Measure latencies of subnets on this machine, or on another one by ONNX files, and write a device file."""
    saved = SavedModel(args.directory)
    saved.check()  # what could not be stored in the end is refused now
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet; latencies of many subnets are measured: give a supernet')
    net = saved.network()
    operator_features(net.space, net.space.one_hot(net.space.smallest))  # refused here, not after hours of measuring
    setup = Setup(args.backend, args.device or 'cpu', args.threads or torch.get_num_threads(), args.batch_size)
    if args.export:
        archs = archs_to_measure(net.space, args.archs, args.seed)
        print(f'{export_subnets(net, archs, args.export, args.batch_size)}: run these {len(archs)} files, and fill in '
              f'the column milliseconds; then give --import, with --name, --backend and --threads')
        return
    words = f'{setup.backend}_{setup.device}_{setup.threads}_threads_batch_{setup.batch_size}'
    name = args.name or re.sub(r'[^\w.-]', '_', words)  # such as cuda:0
    output = args.output or args.directory / device_file(name)
    if output.exists() and not args.overwrite:
        raise ValueError(f'{output} exists already; give another --name, or --overwrite')
    if saved.record.device == name and not args.output:  # `add_device` refuses it, but after measuring
        raise ValueError(
            f'the generator of {saved} was trained with the device file {output.name}; give another --name')
    partial = output.with_name(f'{output.name}.partial')
    if args.import_csv:
        archs, seconds = read_latencies(args.import_csv, net.space, args.batch_size)
        device = create_device(net.space, archs, seconds, name, setup)
    else:
        device = measured_device(net, setup, name, partial, args)
    if args.output:
        device.write(output)
    else:
        add_device(args.directory, device)
    if not args.import_csv:
        partial.unlink(missing_ok=True)
    low, high = (format_quantity(each, 'seconds') for each in device.resource(net.space).range(net.space))
    error = device.error
    print(f'{output}: at most {low} to {high}, predicted from {device.archs} subnets; held-out error: median '
          f'{error["median"]:.1%}, 95th percentile {error["p95"]:.1%}, rank correlation {error["spearman"]:.3f}')


def measured_device(net: Any, setup: Setup, name: str, partial: Path, args: argparse.Namespace) -> Device:
    """Measure subnets on this machine; results are kept in `partial`, so that a killed command can continue."""
    archs = archs_to_measure(net.space, args.archs, args.seed)
    timings = measure_archs(net, archs, setup, partial, args.max_spread)
    reference = median(timing.reference for timing in timings)
    try:
        return create_device(
            net.space, archs, [timing.ratio * reference for timing in timings], name, setup, machine=machine(),
            versions=versions_of(setup.backend), spread=median(timing.spread for timing in timings))
    except UnpredictableError:  # the same command would read these timings again
        partial.unlink(missing_ok=True)
        raise
