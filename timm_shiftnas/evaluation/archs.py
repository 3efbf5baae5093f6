"""Accuracy of many archs of one supernet: each is measured once, and a file keeps it beyond a kill."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.calibration import BatchNormCalibration
from ..space.core import Arch, SearchSpace
from ..space.latency import fingerprint as space_fingerprint
from ..utils.distributed import Ranks
from ..utils.files import atomic_write
from .accuracy import Loader, at_arch, evaluate

__all__ = ['AccuracyFile', 'ArchAccuracy', 'fingerprint']

Accuracy = tuple[float, float]  # top-1 and top-5, in percent


class ArchAccuracy:
    """Measures archs of a supernet; an arch that was measured before, or is in the file, is not measured again.

    Args:
        net: The supernet.
        loader: Batches of images and class indices; in several processes, all images in each.
        device: Device of the network.
        calibration: Computes the BatchNorm statistics of archs, if there is BatchNorm.
        ranks: The processes that split the archs.
        file: Where accuracies are kept; for a single process.
        **kwargs: As for `evaluate`.
    """

    def __init__(
            self,
            net: nn.Module,
            loader: Loader,
            device: torch.device,
            calibration: BatchNormCalibration | None = None,
            ranks: Ranks = Ranks(),
            file: AccuracyFile | None = None,
            **kwargs: Any,
    ) -> None:
        self.net, self.loader, self.device, self.calibration = net, loader, device, calibration
        self.ranks, self.file, self.kwargs = ranks, file, kwargs
        self.known: dict[Arch, Accuracy] = {} if file is None else file.read(net.space)

    def __call__(self, archs: Sequence[Arch]) -> list[Accuracy]:
        """The accuracies of some archs, in their order."""
        missing = [arch for arch in dict.fromkeys(archs) if arch not in self.known]
        mine: dict[Arch, Accuracy] = {}
        for arch in self.ranks.shard(missing):
            mine[arch] = evaluate(
                at_arch(self.net, arch, self.calibration), self.loader, self.device, **self.kwargs)
            if self.file is not None:
                self.file.append(arch, mine[arch])
        for part in self.ranks.gather(mine):
            self.known |= part
        return [self.known[arch] for arch in archs]


class AccuracyFile:
    """Accuracies by arch in a file of JSON lines, each written as soon as it is known.

    The first line says what they were measured with. A kill may cut off the last line, which is then ignored.

    Args:
        path: The file; created if missing.
        measured_with: JSON data of what accuracies depend on, besides the arch; see `fingerprint`.

    Raises:
        ValueError: If the file holds accuracies that were measured with something else.
    """

    def __init__(self, path: str | os.PathLike, measured_with: Mapping[str, Any]) -> None:
        self.path = Path(path)
        text = self.path.read_text(encoding='utf-8') if self.path.exists() else ''
        header, *rows = text[:text.rfind('\n') + 1].splitlines() or ['']
        found: Any = None
        with suppress(ValueError):
            found = json.loads(header)
        if not header:
            rows, header = [], json.dumps(dict(measured_with))
        elif not isinstance(found, dict) or found != measured_with:
            different = [name for name in measured_with if not isinstance(found, dict) or (
                found.get(name) != measured_with[name])]
            raise ValueError(
                f'{self.path} holds accuracies that were measured with other {" and ".join(different) or "settings"}; '
                'give another place, or remove the file')
        self._rows = rows
        if (whole := '\n'.join([header, *rows, ''])) != text:
            with atomic_write(self.path) as temporary:
                temporary.write_text(whole, encoding='utf-8')

    def read(self, space: SearchSpace) -> dict[Arch, Accuracy]:
        """The accuracies that were in the file when it was opened."""
        rows = map(json.loads, self._rows)
        return {space.from_dict(row['arch']): (row['top1'], row['top5']) for row in rows}

    def append(self, arch: Arch, accuracy: Accuracy) -> None:
        """Write the accuracy of an arch."""
        row = dict(zip(('top1', 'top5'), accuracy), arch=arch.to_dict())
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')


def fingerprint(
        net: nn.Module,
        loader: Loader,
        train_loader: Iterable[Any] | None,
        bn_images: int,
        autocast: Any,
) -> dict[str, Any]:
    """What the accuracies of archs depend on, as short JSON data.

    Of a loader it is the number of images, if that is known, and the first batch: loaders have to give the same images
    every time. Training images count only where there is BatchNorm.

    Args:
        net: The supernet.
        loader: The images to evaluate.
        train_loader: Those for BatchNorm statistics, or `None`.
        bn_images: How many of these each arch uses.
        autocast: Context of the forward passes, or `None`.
    """
    def images(batches: Iterable[Any]) -> list[Any]:
        dataset = getattr(batches, 'dataset', None)
        return [len(dataset) if hasattr(dataset, '__len__') else None, _digest(next(iter(batches), ()))]

    facts = dict(
        space=space_fingerprint(net.space),
        weights=_digest(net.state_dict().values()),
        images=images(loader),
        precision=str(getattr(autocast, 'fast_dtype', None)))
    return facts if train_loader is None else dict(facts, training_images=[bn_images, *images(train_loader)])


def _digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of the values of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
