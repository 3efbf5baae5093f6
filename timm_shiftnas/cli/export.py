"""`timm-shiftnas export`: ONNX files."""
from __future__ import annotations

import argparse
from pathlib import Path

from ..hub.load import SavedModel
from ..utils.files import atomic_write
from ..utils.paths import expand_home
from .onnx_files import write_onnx
from .subnets import load_subnet

__all__ = ['run_export']


def run_export(args: argparse.Namespace) -> None:
    """Write the subnet for a budget as an ONNX file."""
    output = Path(expand_home(args.output))
    if output.is_dir() or (output.exists() and not args.overwrite):
        raise ValueError(f'--output {output} exists already; give another file, or add --overwrite to replace a file')
    saved = SavedModel(args.directory)
    net = load_subnet(saved, args)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:  # a file whose accuracy cannot be measured is not kept
        about = write_onnx(
            saved, net, temporary, args, opset=args.opset, batch_size=args.fixed_batch, input_name=args.input_name)
    print(f'{output}: {about}')
