"""ONNX files that `timm-shiftnas export` and `extract --onnx` write."""
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
from ..utils.units import format_count, format_quantity
from .images import Expected, batches, labelled_images, training_batches

__all__ = ['write_onnx']


def write_onnx(
        saved: SavedModel, net: torch.nn.Module, path: Path, args: argparse.Namespace, *, opset: int | None = None,
        batch_size: int | None = None, input_name: str = 'images',
) -> str:
    """Write a subnet as an ONNX file, in 8-bit integers with --int8.

    Args:
        saved: The saved model that it comes from.
        net: The subnet, which is changed to eval mode and single precision.
        path: The file.
        args: The flags `int8` and those of the images.
        opset, batch_size, input_name: As for `export_onnx`.

    Returns:
        What was written, for the terminal.

    Raises:
        ValueError: If packages or images are missing, or as for `export_onnx`.
    """
    options = dict(opset=opset, batch_size=batch_size, input_name=input_name)
    if args.int8:
        return _write_int8(saved, net, path, args, options)
    written = export_onnx(net, path, **options)
    size = ' x '.join(map(str, [batch_size or 'batch', *written['input_size']]))
    difference = written['difference']
    checked = 'not checked, because onnxruntime is not installed' if difference is None else (
        f'onnxruntime agrees to {difference:.1g}')
    return f'{format_count(static_counts(net)[0])} MACs, {input_name} {size}, opset {written["opset"]}, {checked}'


def _write_int8(
        saved: SavedModel, net: torch.nn.Module, path: Path, args: argparse.Namespace, options: dict[str, Any]) -> str:
    """Write an int8 file; returns its bytes and its accuracy before and after.

    Networks with BatchNorm are quantised statically, by their training images, and others dynamically.
    """
    static, with_images = has_batch_norm(net), bool(args.dataset or args.data_dir)
    if static and not with_images:
        raise ValueError('the activations of this network are quantised by training images: give --data-dir or '
                         '--dataset')
    if options['batch_size'] is not None and with_images:
        if options['batch_size'] > 1:
            raise ValueError(f'--int8 with images reads batches of any size: leave out --fixed-batch '
                             f'{options["batch_size"]}, or give --fixed-batch 1')
        args.batch_size = 1
    expected, rows = Expected.by(saved), [('', 'bytes', 'top-1', 'top-5')]
    labelled = labelled_images(saved, net.num_classes, args, args.split)[0] if with_images else None
    with TemporaryDirectory() as folder:
        plain = Path(folder) / 'fp32.onnx'
        export_onnx(net, plain, **options)
        quantize_onnx(
            plain, path, (resized(net, images) for images, _ in training_batches(expected, args)) if static else None)
        for name, file in (('fp32', plain), ('int8', path)):
            accuracy = ['', '']
            if labelled is not None:
                top = evaluate(OnnxNetwork(file, net), batches(expected, labelled, args), torch.device('cpu'))
                accuracy = [f'{value:.2f}%' for value in top]
            rows.append((name, format_quantity(file.stat().st_size, 'bytes'), *accuracy))
    return '\n'.join([
        f'int8, {"static" if static else "dynamic"} quantisation',
        *('  '.join(cell.rjust(9) for cell in row).rstrip() for row in rows)])
