"""Distillation: the logits of a teacher, and the divergence from them."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher
from torch import Tensor, nn

from ..utils.text import one_line

__all__ = ['Teacher', 'divergence']


class Teacher:
    """Logits of another network for the images of a supernet's batches: timm's teacher, behind one call.

    Args:
        model: A name that timm can create with pretrained weights, or a network.
        net: The supernet: gives classes and channels.
        mean, std: What the images were normalised with.
        path: File of the teacher's weights, instead of published ones.

    Raises:
        ValueError: If timm cannot create it.
    """

    def __init__(self, model: str | nn.Module, net: nn.Module, *, mean: Sequence[float], std: Sequence[float],
                 path: str | None = None, device: torch.device | None = None) -> None:
        try:
            self.teacher = DistillationTeacher(
                model, num_classes=net.num_classes, in_chans=net.in_chans, pretrained_path=path, device=device)
        except Exception as error:  # unknown names, files that hold no weights (whatever torch makes of them), ...
            what = f'{model!r}' if path is None else f'{model!r} with the weights in {path!r}'
            raise ValueError(
                f'cannot create the teacher {what} ({one_line(error, 300)}); give a model of '
                'timm.list_models(pretrained=True), or a file of its weights') from None
        self.teacher.to(device).requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.teacher(self.teacher.normalize_input(images, self.mean, self.std))


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.) -> Tensor:
    """Mean over the batch of KL(teacher || student) at a temperature, times its square; of logits [B, classes]."""
    loss = F.kl_div(
        (logits.float() / temperature).log_softmax(-1), (teacher.float() / temperature).log_softmax(-1),
        reduction='batchmean', log_target=True)
    return loss * temperature ** 2
