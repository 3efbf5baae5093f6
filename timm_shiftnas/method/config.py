"""The settings of ShiftNAS, each declared once."""
from __future__ import annotations

from dataclasses import dataclass

from .signals import ESTIMATORS

__all__ = ['ShiftNASConfig']


@dataclass(frozen=True)
class ShiftNASConfig:
    """How archs are drawn and what is learned about drawing them. Intervals and lengths count optimizer updates.

    Args:
        sampler: 'shiftnas', or 'uniform' for the baseline (archs uniform, nothing learned).
        archs_per_step: Archs that a micro-batch trains; its loss is the mean of theirs.
        sandwich: Two of them are the largest and the smallest (Yu & Huang, Universally Slimmable Networks, ICCV 2019).
        inplace_distillation: Of a sandwich, only the largest learns from the targets; the others learn from its
            probabilities (the same paper; BigNAS, Yu et al., ECCV 2020).
        arch_per_rank: In a distributed run, every process trains archs of its own, whose gradients are averaged;
            otherwise all train the same ones on images of their own.
        task_loss_weight: With a teacher, weight of the loss on the targets.
        distill_loss_weight: Weight of the divergence from the teacher.
        temperature: Of the softmax of both in that divergence, which counts by its square (Hinton et al., 2015).
        warmup_sampler: During warm-up, archs from the 'generator' at uniform P, or 'uniform' (the paper's first step).
        warmup_updates: Length of the warm-up, in which P stays uniform.
        total_updates: Length of the training; the Gumbel temperature falls over it.
        shift: Signal of the probability shift ('hypergradient', 'grad_norm', 'variation'), or 'none': P stays uniform.
        group_weights: With 'none', the fixed P is proportional to these, one for each group; `None` is uniform.
        shift_interval: Updates between two shifts.
        shift_lr: Rate of the shift, see `sampling.ProbabilityShift`.
        shift_momentum: Decay of the moving averages of the signal.
        shift_floor: Share of probability spread evenly over the groups.
        shift_epsilon: Length, in weight space, of the finite difference that the hypergradient is taken with.
        generator_interval: Updates between two steps of the generator; 0 leaves it as it was fitted.
        generator_images: Images of a micro-batch that the generator's task loss sees, over all processes; `None` is an
            eighth of them, and no more than 32: a masked network costs what the full one does. At least two.
        generator_lr: Learning rate of the generator (Adam).
        resource_weight: Weight of the resource term beside the task loss (lambda).
        resource_batch: Budgets in the resource term.
        tau: Gumbel temperature at the first and at the last update.
        accum_steps: Micro-batches per update; `None` if that is not known: then `end_update()` tells.
        seed: Of everything that is drawn.
    """
    sampler: str = 'shiftnas'
    archs_per_step: int = 1
    sandwich: bool = False
    inplace_distillation: bool = False
    arch_per_rank: bool = False
    task_loss_weight: float = 1.
    distill_loss_weight: float = 1.
    temperature: float = 4.
    warmup_sampler: str = 'generator'
    warmup_updates: int = 0
    total_updates: int = 1
    shift: str = 'none'
    group_weights: tuple[float, ...] | None = None
    shift_interval: int = 100
    shift_lr: float = 0.01
    shift_momentum: float = 0.8
    shift_floor: float = 0.2
    shift_epsilon: float = 1e-3
    generator_interval: int = 10
    generator_images: int | None = None
    generator_lr: float = 1e-3
    resource_weight: float = 1000.
    resource_batch: int = 64
    tau: tuple[float, float] = (1., .3)
    accum_steps: int | None = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (('sampler', ('shiftnas', 'uniform')), ('warmup_sampler', ('generator', 'uniform')),
                              ('shift', (*ESTIMATORS, 'none'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown; choose one of {allowed}')
        for name in ('archs_per_step', 'total_updates', 'shift_interval', 'generator_images', 'resource_batch',
                     'accum_steps'):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        if not self.temperature > 0:
            raise ValueError(f'temperature={self.temperature} must be positive, such as 4')
        if self.generator_interval < 0:
            raise ValueError(f'generator_interval={self.generator_interval} must be at least 1, or 0 for never')
        if self.sandwich and self.archs_per_step < 3:
            raise ValueError(
                f'archs_per_step={self.archs_per_step} leaves a sandwich without filling: the largest and the smallest '
                'arch are two of them; give 3 or more, such as 4')
        if self.inplace_distillation and not self.sandwich:
            raise ValueError(
                'inplace_distillation needs the largest arch in every step, to learn from; give sandwich=True too, and '
                'archs_per_step=4')
        if self.group_weights is not None and (self.shift != 'none' or self.sampler != 'shiftnas'):
            raise ValueError(
                f"group_weights={self.group_weights} fix P, which needs sampler='shiftnas' and shift='none', not "
                f'{self.sampler!r} and {self.shift!r}')

    def images_for_generator(self, images: int) -> int:
        """How many of the images of a micro-batch the generator's task loss sees, over all processes."""
        return self.generator_images or min(images // 8, 32)
