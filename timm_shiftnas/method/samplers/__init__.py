"""Samplers: where the archs of training steps come from, one file for each method, chosen by `--sampler`.

All are functions of (seed, step) and of what the processes of a run have in common, so every process draws the same.
"""
from .attentive_nas import AttentiveNASSampler, BestUpSampler, WorstUpSampler
from .base import Sampler, Step
from .focus_former import FocusFormerSampler
from .pre_nas import PreNASSampler
from .shiftnas import ShiftNASSampler
from .uniform import UniformSampler

__all__ = [
    'SAMPLERS', 'AttentiveNASSampler', 'BestUpSampler', 'FocusFormerSampler', 'PreNASSampler', 'Sampler',
    'ShiftNASSampler', 'Step', 'UniformSampler', 'WorstUpSampler',
]

SAMPLERS: dict[str, type[Sampler]] = dict(
    shiftnas=ShiftNASSampler,
    uniform=UniformSampler,
    attentivenas_best_up=BestUpSampler,
    attentivenas_worst_up=WorstUpSampler,
    focusformer=FocusFormerSampler,
    prenas=PreNASSampler,
)
