"""Distillation: the logits of a teacher, and the divergence from them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher
from torch import Tensor, nn

from ..utils.text import one_line
from .config import ShiftNASConfig

__all__ = ['Teacher', 'check_logits', 'distilled', 'divergence']


class Teacher:
    """A pretrained network that gives its logits for the images of the supernet: timm's `DistillationTeacher`.

    Args:
        model: Name of a timm model with pretrained weights, or a network.
        net: The supernet, for the number of classes and input channels.
        mean, std: Normalisation of the images that the supernet sees, per channel.
        path: File with the teacher's weights, instead of the published ones.
        device: Device of the images.

    Raises:
        ValueError: If timm cannot create the teacher.
    """

    def __init__(self, model: str | nn.Module, net: Any, *, mean: Sequence[float], std: Sequence[float],
                 path: str | None = None, device: torch.device | None = None) -> None:
        try:
            self.teacher = DistillationTeacher(
                model, num_classes=net.num_classes, in_chans=net.in_chans, pretrained_path=path, device=device)
        except Exception as error:  # unknown names, files without weights, ...: torch and timm raise many types
            what = f'{model!r}' if path is None else f'{model!r} with the weights in {path!r}'
            reason = one_line(error, 300).partition('; ')[0]
            raise ValueError(
                f'cannot create the teacher {what} ({reason}); give a model of timm.list_models(pretrained=True), or a '
                f'file with its weights for {net.num_classes} classes') from None
        self.teacher.to(device).requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.teacher(self.teacher.normalize_input(images, self.mean, self.std))


def check_logits(output: Any) -> None:
    """Raise a `ValueError` unless an output is logits of images, [B, classes]."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError(
            f'distillation needs logits of shape [batch, classes], not {getattr(output, "shape", type(output))}; leave '
            'out inplace_distillation and the teacher, or distil in your own loss')


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.) -> Tensor:
    """Distillation loss of Hinton et al. (2015): `T**2 * KL(softmax(teacher / T) || softmax(logits / T))`.

    Args:
        logits, teacher: Logits of the student and the teacher, [B, classes].
        temperature: T.

    Returns:
        The mean over the batch; its gradient does not reach the teacher.

    Raises:
        ValueError: If these are not logits of images, [B, classes].
    """
    check_logits(logits)
    loss = F.kl_div(
        (logits.float() / temperature).log_softmax(-1), (teacher.detach().float() / temperature).log_softmax(-1),
        reduction='batchmean', log_target=True)
    return loss * temperature ** 2


def distilled(loss: Tensor, logits: Tensor, teacher: Tensor, config: ShiftNASConfig) -> Tensor:
    """Loss with a teacher: `task_weight * loss + distill_weight * divergence`.

    Args:
        loss: Loss on the targets.
        logits, teacher: As for `divergence`.
        config: The weights and the temperature.
    """
    task_weight, distill_weight = config.loss_weights
    return task_weight * loss + distill_weight * divergence(logits, teacher, config.temperature)
