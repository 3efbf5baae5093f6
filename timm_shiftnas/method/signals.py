"""Signals for the probability shift: one score per group, from training images and held-out images.

`loss(arch, batch)` is plain cross-entropy of one subnet; every estimator sees the same images for all groups. Weights,
`.grad`, buffers, modes and random states are exactly as before when an estimator returns.

Several processes split the groups among them: all see the same images, and return the same scores as one would.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..space.core import Arch
from ..utils.distributed import Ranks

__all__ = ['ESTIMATORS', 'frozen', 'full_precision', 'gradient_norm', 'held_out_loss', 'hypergradient']

Loss = Callable[[Arch, Any], Tensor]


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Dropout and drop-path off, BatchNorm on batch statistics; modes and buffers come back exactly as they were."""
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(buffer, buffer.clone()) for module in net.modules() if isinstance(module, _BatchNorm)
               for buffer in module.buffers(recurse=False)]
    try:
        net.eval()
        for module, _ in modes:
            if isinstance(module, _BatchNorm):
                module.training = True
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast and TF32 off: scores are small differences of losses, of which low precision leaves little."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def gradient(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of a loss; zeros for parameters outside the subnet. `.grad` stays untouched."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]


def hypergradient(
        net: nn.Module,
        loss: Loss,
        archs: Sequence[Arch],
        train: Any,
        held_out: Any,
        epsilon: float = 1e-3,
        ranks: Ranks = Ranks(),
) -> Tensor:
    """How much held-out loss one gradient step on each group saves, per unit of learning rate.

    With g the mean over groups of the held-out gradient, the score of group k is the inner product of g and the
    training gradient at arch k: minus the derivative, with respect to P_k, of the held-out loss after one unrolled step
    (DARTS, Liu et al., ICLR 2019, applied to the sampling distribution). Taken as a central difference of the training
    loss along g: two forwards per group and no second order.

    All groups see the same training images, so that what is left between their scores is the groups' own. For g, a mean
    over groups, they may see different held-out images: with a K-th of them each, g costs K times less and is as fair.

    Args:
        net: The supernet, unwrapped.
        loss: Cross-entropy of an arch on a batch.
        archs: The arch of each of the K groups.
        train: Training batch.
        held_out: Held-out batch, or a list of K batches, one for each group.
        epsilon: Length of the step along g, in units of weights.
        ranks: The processes that share the work.

    Returns:
        Scores [K], float64.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]
    direction = [torch.zeros_like(p) for p in parameters]
    seen = held_out if isinstance(held_out, list) else [held_out] * len(archs)
    for arch, batch in ranks.share(list(zip(archs, seen))):
        torch._foreach_add_(direction, gradient(loss(arch, batch) / len(archs), parameters))
    ranks.sum_(direction)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction)).double())
    step = epsilon / float(norm) if float(norm) > 0 else 0.
    if step == 0:
        return torch.zeros(len(archs), dtype=torch.float64)
    with torch.no_grad():
        # the weights are put back from a copy: adding and subtracting the step again would not restore every bit
        weights = [p.detach().clone() for p in parameters]
        losses = []
        try:
            for sign in (1, -1):
                torch._foreach_copy_(parameters, torch._foreach_add(weights, direction, alpha=sign * step))
                losses.append(_by_group(archs, lambda arch: loss(arch, train), ranks))
        finally:
            torch._foreach_copy_(parameters, weights)
        return (losses[0] - losses[1]) / (2 * step)


def gradient_norm(
        net: nn.Module,
        loss: Loss,
        archs: Sequence[Arch],
        train: Any,
        held_out: Any,
        ranks: Ranks = Ranks(),
) -> Tensor:
    """Norm of each group's held-out gradient over the square root of the number of weights it reaches; [K], float64."""
    parameters = [p for p in net.parameters() if p.requires_grad]

    def score(arch: Arch) -> Tensor:
        gradients = [g for g in torch.autograd.grad(loss(arch, held_out), parameters, allow_unused=True)
                     if g is not None]
        size = sum(int((g != 0).sum()) for g in gradients)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).double())
        return norm / max(size, 1) ** 0.5

    return _by_group(archs, score, ranks)


def held_out_loss(
        net: nn.Module,
        loss: Loss,
        archs: Sequence[Arch],
        train: Any,
        held_out: Any,
        ranks: Ranks = Ranks(),
) -> Tensor:
    """Held-out loss of each group, [K], float64; 'variation' is its relative change from update to update."""
    with torch.no_grad():
        return _by_group(archs, lambda arch: loss(arch, held_out), ranks)


def _by_group(archs: Sequence[Arch], score: Callable[[Arch], Tensor], ranks: Ranks) -> Tensor:
    """One number for each arch, [K], float64 on the CPU, each computed by one of the processes."""
    mine = [score(arch).double() for arch in ranks.share(archs)]
    scores = torch.zeros(len(archs), dtype=torch.float64)
    if mine:
        scores[ranks.rank::ranks.size] = torch.stack(mine).cpu()
    ranks.sum_([scores])
    return scores


# what each signal measures; `task` turns losses into their relative change for 'variation'
ESTIMATORS = dict(hypergradient=hypergradient, grad_norm=gradient_norm, variation=held_out_loss)
