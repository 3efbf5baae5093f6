"""MACs and parameters of an arch, as pure arithmetic: no network is built and nothing is run.

Both are polynomials in one-hot encodings and use only `+` and `*`, so the same lines give an exact integer for an
`Arch`, a vector for a batch of archs, and a differentiable number for the one-hots of the architecture generator. The
polynomials are in the file of each family.

**MACs** are multiply-accumulates per image at batch 1, of the convolutions and matrix products that really run
(what papers and timm's tables call FLOPs; `torch.utils.flop_counter.FlopCounterMode` counts two per MAC).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from .core import Arch, OneHots, SearchSpace
from .families import family_of
from .heads import head_macs, head_params

__all__ = ['evaluate', 'macs', 'params']

CONVENTIONS = ('fused', 'reference')


@overload
def macs(space: SearchSpace, arch: Arch, convention: str = ...) -> int: ...
@overload
def macs(space: SearchSpace, arch: Sequence[Arch] | OneHots, convention: str = ...) -> torch.Tensor: ...


def macs(space: SearchSpace, arch: Arch | Sequence[Arch] | OneHots, convention: str = 'fused') -> int | torch.Tensor:
    """Multiply-accumulates per image of an arch.

    >>> from timm_shiftnas import shiftmobilenet_space
    >>> space = shiftmobilenet_space(
    ...     resolution=[16, 32], width=[[8], [8, 16], [32]], depth=[1, 2], kernel_size=[3, 5], expand_ratio=[2, 3],
    ...     stride=[1]).bind(in_chans=3, num_classes=10, global_pool='avg')
    >>> macs(space, space.smallest), macs(space, space.largest)
    (56384, 1222848)
    >>> macs(space, [space.smallest, space.largest])
    tensor([  56384, 1222848])
    >>> macs(space, space.one_hot(space.smallest))
    tensor(56384., dtype=torch.float64)

    Args:
        space: A bound search space (the `space` of a model).
        arch: An `Arch`; a sequence of N archs; or one-hots, one tensor of shape [..., number of values] per choice.
        convention: 'fused' counts what this package runs. 'reference' counts relative position as AutoFormer's
            published code computes it (with tables of N x N x 64), for comparison with published figures.

    Returns:
        An int for one arch, an int64 tensor [N] for a sequence, a differentiable float64 tensor [...] for one-hots.

    Raises:
        ValueError: If the space is unbound, the arch is not in it, or the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f'convention={convention!r} is unknown; choose one of {CONVENTIONS}')
    polynomial = family_of(space).count_macs
    return evaluate(
        space, arch, lambda space, one_hots: polynomial(space, one_hots, convention) + head_macs(space, one_hots))


@overload
def params(space: SearchSpace, arch: Arch) -> int: ...
@overload
def params(space: SearchSpace, arch: Sequence[Arch] | OneHots) -> torch.Tensor: ...


def params(space: SearchSpace, arch: Arch | Sequence[Arch] | OneHots) -> int | torch.Tensor:
    """Number of parameters of the extracted subnet; arguments, return value and errors as for `macs`."""
    polynomial = family_of(space).count_params
    return evaluate(space, arch, lambda space, one_hots: polynomial(space, one_hots) + head_params(space, one_hots))


def evaluate(
        space: SearchSpace,
        arch: Any,
        function: Callable[[SearchSpace, OneHots], torch.Tensor],
        whole: bool = True,
) -> Any:
    """Evaluate a function of one-hots for an arch, a sequence of archs, or one-hots.

    Args:
        space, arch: As for `macs`.
        function: `function(space, one_hots)`, float64 [...].
        whole: Whether it is a whole number for every arch.

    Returns:
        As `macs`; floats instead of whole numbers without `whole`.
    """
    if isinstance(arch, Sequence) and any(isinstance(item, torch.Tensor) for item in arch):
        return function(space, [item.double() for item in arch])
    found = function(space, space.one_hot(arch))
    found = found.round().long() if whole else found
    return found if isinstance(arch, Sequence) else found.item()
