"""ONNX files of static networks."""
from __future__ import annotations

import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..utils.files import atomic_write
from ..utils.text import one_line

__all__ = ['export_onnx']

MAX_DIFFERENCE = 1e-3  # of logits in single precision
OLDEST_OPSET = 14  # with attention
DYNAMO_OPSET = 18  # the oldest one of torch's newer exporter


@torch.no_grad()
def export_onnx(net: nn.Module, path: str | os.PathLike, *, opset: int | None = None, batch_size: int | None = None,
                input_name: str = 'images', check: bool = True) -> dict[str, Any]:
    """Write a static network as one ONNX file, and compare it with the network.

    Args:
        net: An extracted subnet. It is exported in eval mode and single precision, and changed to both.
        path: The file; replaced if it exists.
        opset: Version of ONNX's operators. The default is that of torch's exporter; below 18 torch's older exporter,
            which is based on TorchScript, writes the file.
        batch_size: Images of a batch; the default is any number.
        input_name: Name of the input [batch, C, H, W]. The output [batch, classes] is called 'logits'.
        check: Compare the file with the network, where onnxruntime is installed.

    Returns:
        'opset'; 'input_size' of an image; 'difference', the largest one between logits of the file in onnxruntime and
        of the network for random images, relative to the largest logit (`None` without a comparison).

    Raises:
        ValueError: If the file cannot be written that way, or computes something else than the network.
    """
    missing = [name for name in ('onnx', 'onnxscript') if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX files need {' and '.join(missing)}; run pip install 'timm_shiftnas[onnx]'")
    import onnx
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f'opset={opset} cannot be written; choose {OLDEST_OPSET} to {newest}, or leave it out')
    net, path = net.eval().float(), Path(path)
    input_size = list(net.pretrained_cfg['input_size'])

    def images(batch: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(batch)
        return torch.randn(batch, *input_size, generator=noise).to(next(net.parameters()))

    with atomic_write(path) as temporary:
        written = _write(net, images(batch_size or 2), temporary, opset, batch_size is None, input_name)
        if opset not in (None, written):
            raise ValueError(f'opset={opset}: torch wrote opset {written} instead; choose another one, or leave it out')
        difference = None
        if check and find_spec('onnxruntime') is not None:
            batches = [images(batch) for batch in ([1, 3] if batch_size is None else [batch_size])]
            difference = max(_difference(net, batch, temporary, input_name) for batch in batches)
            if not difference <= MAX_DIFFERENCE:
                raise ValueError(
                    f'the ONNX file computes other logits than the network: they differ by {difference:.1g} of the '
                    'largest; it was not kept')
    return dict(opset=written, input_size=input_size, difference=difference)


def _write(net: nn.Module, images: torch.Tensor, path: Path, opset: int | None, dynamic: bool, input_name: str) -> int:
    """Export; returns the opset of the file."""
    import onnx
    names: dict[str, Any] = dict(input_names=[input_name], output_names=['logits'], opset_version=opset)
    if opset is None or opset >= DYNAMO_OPSET:
        shapes = ({0: torch.export.Dim('batch')},) if dynamic else None
        options = dict(names, dynamo=True, dynamic_shapes=shapes, external_data=False)
    else:
        axes = {input_name: {0: 'batch'}, 'logits': {0: 'batch'}} if dynamic else None
        options = dict(names, dynamo=False, dynamic_axes=axes)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(net, (images,), path, verbose=False, **options)
    except Exception as error:  # of many types, by exporter, tracer and operators
        raise ValueError(f'torch.onnx.export failed: {type(error).__name__}: {one_line(error)[:200]}') from error
    finally:
        logging.disable(logging.NOTSET)
    return next(each.version for each in onnx.load(path).opset_import if each.domain in ('', 'ai.onnx'))


def _difference(net: nn.Module, images: torch.Tensor, path: Path, input_name: str) -> float:
    """The largest difference between logits of the file and of the network, relative to the largest logit."""
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    logits, expected = session.run(None, {input_name: images.cpu().numpy()})[0], net(images).cpu()
    return float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
