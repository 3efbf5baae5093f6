"""Signals of the probability shift: one score per budget group, from training and held-out images.

The formulas are `hypergradient`, `grad_norm` and `variation`. A `Signal` calls one of them; all signals have the same
interface, and the one with a memory keeps it as its state.

Everywhere, `loss(arch, batch)` is the plain loss of one subnet (for a classifier the cross-entropy), without label
smoothing and distillation. A score changes nothing: weights, `.grad`, buffers, modes and random states are restored bit
for bit. Several processes share the work: each sees the same images, computes some of the groups, and returns the
scores of all.
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

__all__ = [
    'GradNormSignal', 'HypergradientSignal', 'Signal', 'VariationSignal', 'create_signal', 'frozen', 'full_precision',
    'grad_norm', 'held_out_losses', 'hypergradient', 'variation',
]

Loss = Callable[[Arch, Any], Tensor]
ALONE = Ranks()


# -- conditions of a measurement ---------------------------------------------------------------------------------------


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Turn dropout and drop-path off and use batch statistics in BatchNorm; restore modes and buffers at the end."""
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
    """Turn autocast and TF32 off: scores are small differences of losses, smaller than errors of low precision."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


# -- the formulas ------------------------------------------------------------------------------------------------------


def hypergradient(
        net: nn.Module,
        loss: Loss,
        archs: Sequence[Arch],
        train: Any,
        held_out: Any,
        epsilon: float = 1e-3,
        ranks: Ranks = ALONE,
) -> Tensor:
    """Decrease of the held-out loss by one gradient step on each group, per unit of learning rate.

    `s_k = <g, grad L_train(w; A_k)>` with `g = 1/K * sum_j grad L_val(w; A_j)`, taken as the central difference
    `s_k ~ (L_train(w + h*g; A_k) - L_train(w - h*g; A_k)) / (2*h)` with `h = epsilon / |g|`.

    It is minus the derivative, with respect to P_k, of the held-out loss after one unrolled step (DARTS, Liu et al.,
    ICLR 2019, applied to the sampling distribution). The central difference costs two forwards per group and no second
    derivatives.

    All groups see the same training images, so that their scores differ by the groups alone. The held-out images may
    differ, because g is a mean over groups: if each group sees one K-th of them, g costs K times less.

    Args:
        net: The supernet, unwrapped.
        loss: Cross-entropy of an arch on a batch.
        archs: The arch A_k of each of the K groups.
        train: Training batch.
        held_out: Held-out batch, or a list of K batches, one for each group.
        epsilon: Length of the step along g, in units of the weights.
        ranks: The processes that share the work.

    Returns:
        Scores [K], float64.
    """
    parameters: list[Tensor] = [p for p in net.parameters() if p.requires_grad]
    direction = [torch.zeros_like(p) for p in parameters]
    batches = held_out if isinstance(held_out, list) else [held_out] * len(archs)
    for arch, batch in ranks.shard(list(zip(archs, batches))):
        torch._foreach_add_(direction, _gradient(loss(arch, batch) / len(archs), parameters))
    ranks.sum_(direction)
    norm = _norm(direction)
    step = epsilon / float(norm) if float(norm) > 0 else 0.
    if step == 0:
        return torch.zeros(len(archs), dtype=torch.float64)
    with torch.no_grad():
        # Restore the weights from a copy: adding and subtracting the step again would not restore every bit.
        weights = [p.detach().clone() for p in parameters]
        losses = []
        try:
            for sign in (1, -1):
                torch._foreach_copy_(parameters, torch._foreach_add(weights, direction, alpha=sign * step))
                losses.append(_by_group(archs, lambda arch: loss(arch, train), ranks))
        finally:
            torch._foreach_copy_(parameters, weights)
        return (losses[0] - losses[1]) / (2 * step)


def grad_norm(net: nn.Module, loss: Loss, archs: Sequence[Arch], held_out: Any, ranks: Ranks = ALONE) -> Tensor:
    """Size of each group's held-out gradient: `s_k = |grad L_val(w; A_k)| / sqrt(n_k)`, [K], float64.

    n_k is the number of weights with a gradient that is not 0, so that large subnets have no larger scores by size
    alone. Arguments are those of `hypergradient`.
    """
    parameters: list[Tensor] = [p for p in net.parameters() if p.requires_grad]

    def score(arch: Arch) -> Tensor:
        gradients = [g for g in torch.autograd.grad(loss(arch, held_out), parameters, allow_unused=True)
                     if g is not None]
        size = sum(int((g != 0).sum()) for g in gradients)
        return _norm(gradients) / max(size, 1) ** 0.5

    return _by_group(archs, score, ranks)


def variation(losses: Tensor, before: Tensor) -> Tensor:
    """Relative change of each group's held-out loss since the last shift: `s_k = |L_k - L'_k| / L_k`, [K].

    Args:
        losses: L, the held-out losses now, [K]; see `held_out_losses`.
        before: L', those of the last shift, on the same images, [K].
    """
    return (losses - before).abs() / losses


def held_out_losses(loss: Loss, archs: Sequence[Arch], held_out: Any, ranks: Ranks = ALONE) -> Tensor:
    """Held-out loss of each group, [K], float64."""
    with torch.no_grad():
        return _by_group(archs, lambda arch: loss(arch, held_out), ranks)


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of a loss, with zeros for parameters outside the subnet; `.grad` stays untouched."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]


def _norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm of all entries, float64."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)).double())


def _by_group(archs: Sequence[Arch], score: Callable[[Arch], Tensor], ranks: Ranks) -> Tensor:
    """One number for each arch, [K], float64 on the CPU, each computed by one of the processes."""
    mine = [score(arch).double() for arch in ranks.shard(archs)]
    scores = torch.zeros(len(archs), dtype=torch.float64)
    if mine:
        scores[ranks.rank::ranks.size] = torch.stack(mine).cpu()
    ranks.sum_([scores])
    return scores


# -- one interface -----------------------------------------------------------------------------------------------------


class Signal:
    """A signal of the probability shift. Calling it gives scores; the arguments are those of `hypergradient`.

    This class itself is the signal 'none': it has no scores.
    """

    def __call__(self, net: nn.Module, loss: Loss, archs: Sequence[Arch], train: Any, held_out: Any,
                 ranks: Ranks = ALONE) -> Tensor:
        """Scores [K], float64; NaN where there is none yet, which the shift ignores."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and `None`, under the names of the task's state."""
        return dict(held_out_loss=None, held_out=None)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; other entries are ignored."""


class HypergradientSignal(Signal):
    """The signal of `hypergradient`. Each group sees one K-th of the held-out images, but at least two.

    Args:
        epsilon: Length of the finite difference.
    """

    def __init__(self, epsilon: float = 1e-3) -> None:
        self.epsilon = epsilon

    def __call__(self, net: nn.Module, loss: Loss, archs: Sequence[Arch], train: Any, held_out: Any,
                 ranks: Ranks = ALONE) -> Tensor:
        groups, count = len(archs), len(held_out[1])
        images = [[*range(k % count, count, groups)] for k in range(groups)]
        # BatchNorm after pooling has no statistics of one image
        images = [part if len(part) > 1 else [part[0], (part[0] + 1) % count] for part in images]
        parts = [tuple(tensor[part] for tensor in held_out) for part in images]
        return hypergradient(net, loss, archs, train, parts, self.epsilon, ranks)


class GradNormSignal(Signal):
    """The signal of `grad_norm`."""

    def __call__(self, net: nn.Module, loss: Loss, archs: Sequence[Arch], train: Any, held_out: Any,
                 ranks: Ranks = ALONE) -> Tensor:
        return grad_norm(net, loss, archs, held_out, ranks)


class VariationSignal(Signal):
    """The signal of `variation`. It always uses the first held-out batch, because other images have another loss."""

    def __init__(self) -> None:
        self._losses: Tensor | None = None
        self._held_out: Any = None

    def __call__(self, net: nn.Module, loss: Loss, archs: Sequence[Arch], train: Any, held_out: Any,
                 ranks: Ranks = ALONE) -> Tensor:
        if self._held_out is None:
            self._held_out = held_out
        before, self._losses = self._losses, held_out_losses(loss, archs, self._held_out, ranks)
        return torch.full_like(self._losses, torch.nan) if before is None else variation(self._losses, before)

    def state_dict(self) -> dict[str, Any]:
        return dict(held_out_loss=self._losses, held_out=self._held_out)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._held_out = state['held_out_loss'], state['held_out']


def create_signal(name: str, epsilon: float = 1e-3) -> Signal:
    """The signal with a name of `ShiftNASConfig.shift`; `epsilon` is the finite difference of 'hypergradient'."""
    if name == 'hypergradient':
        return HypergradientSignal(epsilon)
    return dict(grad_norm=GradNormSignal, variation=VariationSignal, none=Signal)[name]()
