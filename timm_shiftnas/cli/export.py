"""`timm-shiftnas export`: ONNX files."""
from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..evaluation.accuracy import evaluate
from ..evaluation.backends import OnnxNetwork
from ..hub.load import SavedModel
from ..models import static_counts
from ..models.calibration import has_batch_norm, resized
from ..models.export import export_onnx
from ..models.quantize import quantize_onnx
from ..utils.paths import expand_home
from ..utils.units import format_count, format_quantity
from .images import Expected, batches, labelled_images, training_batches
from .subnets import load_subnet

__all__ = ['run_export']


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
        labelled = labelled_images(saved, net.num_classes, args, args.split)[0] if with_images else None
        for name, path in (('fp32', plain), ('int8', output)):
            accuracy = ['', '']
            if labelled is not None:
                top = evaluate(OnnxNetwork(path, net), batches(expected, labelled, args), torch.device('cpu'))
                accuracy = [f'{value:.2f}%' for value in top]
            rows.append((name, format_quantity(path.stat().st_size, 'bytes'), *accuracy))
    print(f'{output}: int8, {"static" if static else "dynamic"} quantisation')
    print('\n'.join('  '.join(cell.rjust(9) for cell in row).rstrip() for row in rows))
