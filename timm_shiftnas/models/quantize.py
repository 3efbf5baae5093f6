"""ONNX files in 8-bit integers, through the quantisation of ONNX Runtime."""
from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..utils.files import atomic_write

__all__ = ['quantize_onnx']


def quantize_onnx(source: str | os.PathLike, path: str | os.PathLike, images: Iterable[Tensor] | None = None) -> None:
    """Write an int8 version of an ONNX file.

    Weights get a scale for every output channel. Without images, quantisation is dynamic: the inputs of linear layers
    are quantised by their range in each call, and convolutions stay in single precision, which suits ViTs. With
    images, it is static: ranges of all activations are those of the images, which suits CNNs.

    Args:
        source: The ONNX file, with one input.
        path: The file to write; replaced if it exists.
        images: Batches [B, C, H, W], preprocessed as in training; a few hundred images are enough.

    Raises:
        ValueError: If onnxruntime is not installed.
    """
    if find_spec('onnxruntime') is None or find_spec('onnx') is None:
        raise ValueError("int8 files need onnx and onnxruntime; run pip install 'timm_shiftnas[onnx]'")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    with TemporaryDirectory() as folder, atomic_write(path) as temporary:
        prepared, written = Path(folder) / 'prepared.onnx', Path(folder) / 'int8.onnx'
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # folds BatchNorm into convolutions
        if images is None:
            quantization.quantize_dynamic(
                prepared, written, per_channel=True, weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=['MatMul', 'Gemm'])
        else:
            quantization.quantize_static(
                prepared, written, _reader(prepared, images), quant_format=quantization.QuantFormat.QDQ,
                per_channel=True, activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8)
        temporary.write_bytes(written.read_bytes())


def _reader(path: Path, images: Iterable[Tensor]) -> Any:
    """The images as ONNX Runtime reads them."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader
    name, batches = onnx.load(path, load_external_data=False).graph.input[0].name, iter(images)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()
