"""Backends that run a network whose latency is measured: torch, or a runtime of ONNX files."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ..models.calibration import resized
from ..models.export import export_onnx

__all__ = ['BACKENDS', 'OPSET', 'OnnxNetwork', 'Run', 'check_backend', 'open_onnx', 'prepared', 'versions_of']

BACKENDS = ('eager', 'compile', 'onnxruntime', 'openvino')
OPSET = 17  # of the faster of torch's exporters
_PACKAGES = {'onnxruntime': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('onnx', 'onnxscript', 'openvino')}

Run = Callable[[], Any]  # one forward pass; returns when its result is ready


def check_backend(backend: str, device: str) -> None:
    """Raise a `ValueError` unless a backend is installed and runs on a device."""
    if backend not in BACKENDS:
        raise ValueError(f'backend={backend!r} is unknown; choose one of {", ".join(BACKENDS)}')
    missing = [name for name in _PACKAGES.get(backend, ()) if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the backend {backend} needs {' and '.join(missing)}; run pip install 'timm_shiftnas[measure]'")
    if backend in _PACKAGES and device != 'cpu':
        raise ValueError(f'the backend {backend} is measured on the device cpu, not on {device}; give --device cpu')


def versions_of(backend: str) -> dict[str, str]:
    """Versions of the packages that a latency depends on."""
    packages = ('timm', 'torch', *(name for name in _PACKAGES.get(backend, ()) if name != 'onnxscript'))
    return {name: version(name) for name in packages}


class OnnxNetwork(nn.Module):
    """An ONNX file as a network on the CPU, for images that are resized as for its static network."""

    def __init__(self, path: str | os.PathLike, net: nn.Module) -> None:
        super().__init__()
        self.run, self.net = open_onnx(path), net

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(resized(self.net, x).numpy()))


@contextmanager
def prepared(net: nn.Module, images: Tensor, backend: str, threads: int) -> Iterator[Run]:
    """A forward pass of a network for some images, ready to be timed.

    Sets torch's number of threads during the block.

    Args:
        net: A static network; changed to eval mode.
        images: [B, C, H, W], on the device of the network.
        backend: One of `BACKENDS`.
        threads: Threads of the backend.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with TemporaryDirectory() as folder:
            if backend in _PACKAGES:
                path = Path(folder) / 'net.onnx'
                export_onnx(net, path, opset=OPSET, batch_size=len(images), check=False)
                run = open_onnx(path, backend, threads)
                array = images.cpu().numpy()
                yield lambda: run(array)
            else:
                yield _torch_run(net.eval(), images, backend)
    finally:
        torch.set_num_threads(before)
        if backend == 'compile':
            torch.compiler.reset()  # its limit of graphs counts those of all networks; a reference compiles again


def _torch_run(net: nn.Module, images: Tensor, backend: str) -> Run:
    forward = torch.compile(net, dynamic=False) if backend == 'compile' else net
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None

    def run() -> None:
        with torch.inference_mode():
            forward(images)
        synchronize()

    return run


def open_onnx(path: str | os.PathLike, backend: str = 'onnxruntime', threads: int = 1) -> Callable[[Any], Any]:
    """An ONNX file as a function from an array of images to logits, on the CPU."""
    if backend == 'openvino':
        import openvino
        model = openvino.Core().compile_model(str(path), 'CPU', {
            'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'})
        return lambda images: model([images])[0]
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]
