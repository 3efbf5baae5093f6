"""Accuracy of many archs of one supernet, each measured once."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.calibration import BatchNormCalibration
from ..space.core import Arch
from ..space.latency import fingerprint as space_fingerprint
from ..utils.distributed import Ranks
from .accuracy import Loader, evaluate_archs
from .arch_file import ArchFile

__all__ = ['ArchAccuracy', 'NAMES', 'fingerprint']

Accuracy = tuple[float, ...]  # in percent
NAMES = ('top1', 'top5')


class ArchAccuracy:
    """Measures archs of a supernet; an arch that was measured before, or is in the file, is not measured again.

    Args:
        net: The supernet.
        loader: Batches of images and class indices; in several processes, all images in each.
        device: Device of the network.
        calibration: Computes the BatchNorm statistics of archs, if there is BatchNorm.
        ranks: The processes that split the archs.
        file: Where accuracies are kept, by `NAMES`; for a single process.
        **kwargs: As for `evaluate`.
    """

    def __init__(
            self,
            net: nn.Module,
            loader: Loader,
            device: torch.device,
            calibration: BatchNormCalibration | None = None,
            ranks: Ranks = Ranks(),
            file: ArchFile | None = None,
            **kwargs: Any,
    ) -> None:
        self.net, self.loader, self.device, self.calibration = net, loader, device, calibration
        self.ranks, self.file, self.kwargs = ranks, file, kwargs
        self.known: dict[Arch, Accuracy] = {} if file is None else file.read(net.space)

    def __call__(self, archs: Sequence[Arch]) -> list[Accuracy]:
        """The accuracies of some archs, in their order."""
        missing = [arch for arch in dict.fromkeys(archs) if arch not in self.known]
        mine: dict[Arch, Accuracy] = {}
        own = self.ranks.shard(missing)
        measured = evaluate_archs(self.net, own, self.loader, self.device, self.calibration, **self.kwargs)
        for arch, values in zip(own, measured):
            mine[arch] = values
            if self.file is not None:
                self.file.append(arch, values)
        for of_process in self.ranks.gather(mine):
            self.known |= of_process
        return [self.known[arch] for arch in archs]


def fingerprint(
        net: nn.Module,
        loader: Loader,
        train_loader: Iterable[Any] | None,
        bn_images: int,
        autocast: Any,
) -> dict[str, Any]:
    """The facts that the accuracies of archs depend on, as short JSON data.

    Of a loader it is the number of images, if that is known, and the first one: loaders have to give the same images
    every time. Training images count only where there is BatchNorm, and with the size of their batches: statistics are
    means over batches.

    Args:
        net: The supernet.
        loader: The images to evaluate.
        train_loader: Those for BatchNorm statistics, or `None`.
        bn_images: Number of these that each arch uses.
        autocast: Context of the forward passes, or `None`.
    """
    def images(batches: Iterable[Any], count: int | None = None) -> list[Any]:
        dataset = getattr(batches, 'dataset', None)
        first = [tensor[:count] for tensor in next(iter(batches), ())]
        return [len(dataset) if hasattr(dataset, '__len__') else None, _digest(first)]

    facts = dict(
        space=space_fingerprint(net.space),
        weights=_digest(net.state_dict().values()),
        images=images(loader, count=1),
        precision=str(getattr(autocast, 'fast_dtype', None)))
    return facts if train_loader is None else dict(
        facts, bn_images=bn_images, training_batches=images(train_loader))


def _digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of the values of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
