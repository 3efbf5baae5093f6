"""`ShiftNASTask`: timm's classification task that trains a supernet with ShiftNAS (Zhang et al., ICCV 2023).

Each micro-batch trains the archs that a sampler draws (`samplers`): that of ShiftNAS, or of a method for comparison.
All random draws are functions of (seed, step), so all processes of a distributed run draw the same; what they learn
from is summed over them.

`timm.task` is imported here, in `distillation` and in `timm_shiftnas.patch`, and nowhere else.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import (
    ClassificationEvaluator,
    ClassificationTask,
    evaluation_sample_limit,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..space.core import Arch, SearchSpace
from ..space.resources import MACS, Resource
from ..utils.distributed import Ranks
from .config import ShiftNASConfig
from .distillation import check_logits, distilled, divergence
from .generator import ArchitectureGenerator
from .groups import BudgetGroups
from .samplers import SAMPLERS, Step
from .samplers.base import ShiftBatches
from .shift import ProbabilityShift

__all__ = [
    'ClassificationEvaluator', 'ClassificationTask', 'ShiftNASTask', 'check_same_space', 'evaluation_sample_limit',
    'load_task_ema_checkpoint', 'resume_task_checkpoint',
]


class EveryArch(nn.Module):
    """A supernet that runs several archs in one call, because DDP allows one forward call before each backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, archs: Arch | Sequence[Arch] | None = None) -> Tensor | list[Tensor]:
        if isinstance(archs, Sequence):
            return [self.module(x, arch) for arch in archs]
        return self.module(x, archs)


class ShiftNASTask(ClassificationTask):
    """Train a supernet with ShiftNAS: `task(input, target)['loss'].backward()`, as with any task of timm.

    The task owns the generator, which stays on the CPU, and its optimizer. It counts micro-batches and updates.
    `loop_state` is saved in checkpoints for the loop around the task: plain values and tensors.

    Args:
        model: A supernet.
        criterion: Loss of the supernet. Arguments that are not listed are those of timm's `ClassificationTask`.
        config: Settings of the method.
        generator: The generator, usually fitted to the resource constraint before.
        groups: Budget groups.
        shift_batches: `shift_batches(n)` returns the (images, targets) of the training data and of the held-out data
            for the n-th shift, without mixup and the same in every process. Required unless `shift` is 'none'.
        teacher: `teacher(images)` returns logits to distil from.
        held_out_loss: `held_out_loss(output, targets)`: the loss that the shift measures.

    Raises:
        ValueError: If `shift_batches` is missing, or generator, model and groups do not belong together.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | Callable | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            *,
            config: ShiftNASConfig,
            generator: ArchitectureGenerator,
            groups: BudgetGroups,
            shift_batches: ShiftBatches | None = None,
            teacher: Callable[[Tensor], Tensor] | None = None,
            held_out_loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
            device: torch.device | None = None, dtype: torch.dtype | None = None, verbose: bool = True,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        net = unwrap_model(model)
        self.space: SearchSpace = net.space
        check_generator(generator, self.space, groups)
        self.config, self.groups = config, groups
        # not a module, so that `.parameters()` and `.to(device)` of the task leave the generator out
        self.sampler = SAMPLERS[config.sampler](config, generator, groups, shift_batches)
        if self.shift.signal != 'none' and shift_batches is None:
            raise ValueError(
                f"shift={config.shift!r} needs shift_batches (training and held-out images); give them or shift='none'")
        self._teacher, self._held_out_loss = teacher, held_out_loss
        self.network = dict(  # arguments of `create_model` and names of the classes, for readers of a checkpoint
            architecture=net.pretrained_cfg['architecture'], label_names=net.pretrained_cfg.get('label_names'),
            model_args=dict(net.model_args, space=self.space.unbind().to_dict()))
        self._one_call = False  # whether one forward call runs all archs of a step
        self.ranks = Ranks()
        self.loop_state: dict[str, Any] = {}
        self._update = 0  # completed updates
        self._micro = 0  # micro-batches of the current update
        self._micro_step = 0  # position in the streams that archs are drawn from

    @property
    def generator(self) -> ArchitectureGenerator:
        return self.sampler.generator

    @property
    def shift(self) -> ProbabilityShift:
        return self.sampler.shift

    @property
    def history(self) -> list[tuple[int, list[float]]]:
        """Pairs (update, [P_1, ..., P_K]); P is in effect from that update on."""
        return self.sampler.history

    @property
    def update(self) -> int:
        """Index of the optimizer update that the next micro-batch belongs to."""
        return self._update

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> ShiftNASTask:
        """Wrap the model in DDP, which has to expect weights without a gradient: those outside the trained archs.

        Args:
            device_ids: As for DDP; ignored on the CPU, where DDP takes none.
            **ddp_kwargs: As for DDP.

        Raises:
            ValueError: If BatchNorms would wait for processes that train other archs.
        """
        if self.config.arch_per_rank and any(isinstance(each, nn.SyncBatchNorm) for each in self.modules()):
            raise ValueError(
                'arch_per_rank trains different widths in the processes, whose BatchNorms cannot be synchronised; '
                'leave out arch_per_rank or --sync-bn')
        self.ranks = Ranks.current(self.device)
        self._broadcast_generator()
        self.trainable_module, self._one_call = EveryArch(self.trainable_module), True
        if self.device.type == 'cpu':
            device_ids = None
        super().prepare_distributed(device_ids, **{'find_unused_parameters': True, **ddp_kwargs})
        return self

    def _broadcast_generator(self) -> None:
        """Give all processes the generator of the first, because machines may round differently."""
        self.generator.load_state_dict(self.ranks.gather(self.generator.state_dict())[0])

    def compile(  # type: ignore[override]  # the signature is timm's, which differs from that of `nn.Module`
            self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the model with dynamic sizes, so that one graph serves all widths of a depth.

        Raises:
            ValueError: If the supernet is a CNN: each combination of kernel sizes would need its own graph.
        """
        if any(choice.name == 'kernel_size' for choice in self.space.choices):
            raise ValueError(
                'a supernet with elastic kernel sizes has too many graphs to compile; train without --torchcompile, '
                'and compile the extracted subnets')
        return super().compile(backend, mode, **{'dynamic': True, **compile_kwargs})

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Compute the loss of the archs of this micro-batch.

        Args:
            input: Images [B, C, H, W].
            target: Targets of the criterion, [B, ...].

        Returns:
            'loss', 'archs' (a tuple) and 'output' (of the first arch).
        """
        step = self._step(input, target)
        if self._micro == 0:
            self.sampler.update(step)
        archs = self._draw_archs(step)
        net = self.trainable_module
        outputs = net(input, archs) if self._one_call else [net(input, arch) for arch in archs]
        losses = self._losses(outputs, input, target)
        self._count_micro_batch()
        return dict(loss=sum(losses) / len(losses), output=outputs[0], archs=archs)

    def _count_micro_batch(self) -> None:
        """Complete the update with its last micro-batch; the loop's backward and optimizer step follow."""
        self._micro += 1
        self._micro_step += 1
        if self._micro == self.config.accum_steps:
            self.end_update()

    def end_update(self) -> None:
        """Complete the update after an optimizer step, if it had fewer micro-batches than `accum_steps`."""
        if self._micro:
            self._update, self._micro = self._update + 1, 0
            if self.config.accum_steps is not None:
                self._micro_step = self._update * self.config.accum_steps

    def _losses(self, outputs: list[Tensor], input: Tensor, target: Tensor) -> list[Tensor]:
        """Loss of each arch: on the targets and the teacher, or, for in-place distillation, on the largest arch."""
        config = self.config
        logits = None if self._teacher is None else self._teacher(input)
        losses: list[Tensor] = []
        if config.inplace_distillation:  # an error at the first step, not only after the warm-up
            check_logits(outputs[0])
        for output in outputs:
            if losses and config.inplace_distillation and self.update >= config.warmup_updates:
                losses.append(divergence(output, outputs[0]))
                continue
            loss = self.criterion(output, target)
            if logits is not None:
                loss = distilled(loss, output, logits, config)
            losses.append(loss)
        return losses

    # -- drawing archs -------------------------------------------------------------------------------------------------

    def _step(self, input: Tensor, target: Tensor) -> Step:
        """The data of this micro-batch that the sampler sees."""
        return Step(
            update=self.update, micro_step=self._micro_step, net=unwrap_model(self.trainable_module),
            criterion=self.criterion, held_out_loss=self._held_out_loss, images=input, targets=target,
            device=self.device, ranks=self.ranks)

    def _draw_archs(self, step: Step) -> tuple[Arch, ...]:
        """The archs of this micro-batch: with the sandwich rule the largest and the smallest, then sampled ones."""
        config = self.config
        ends = (self.space.largest, self.space.smallest) if config.sandwich else ()
        # Every process draws the archs of all processes, so that all stay in the same state.
        ranks = self.ranks if config.arch_per_rank else Ranks()
        count = (config.archs_per_step - len(ends)) * ranks.size
        return (*ends, *ranks.shard(self.sampler.draw(step, count)))

    @property
    def _shift_is_due(self) -> bool:
        return self._micro == 0 and self.sampler.shift_is_due(self.update)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """All that a resumed run needs besides the weights, as tensors and plain values."""
        if ema:
            return {}
        return dict(
            network=self.network, space=self.space.to_dict(), resource=resource_state(self.groups.resource),
            edges=list(self.groups.edges), update=self._update, micro_step=self._micro_step, loop=self.loop_state,
            **self.sampler.state_dict())

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Load what `get_task_state` returned.

        Raises:
            ValueError: If the state has another search space, other groups or another signal.
        """
        if ema or not state:
            return
        check_same_space(state, self.space)
        check_same_resource(state, self.groups.resource)
        if list(state['edges']) != list(self.groups.edges):
            then, now = (f'{len(edges) - 1} budget groups of {edges[0]:.4g} to {edges[-1]:.4g}'
                         for edges in (state['edges'], self.groups.edges))
            raise ValueError(
                f'the checkpoint has {then} and this run {now}; resume with the same --num-groups or --group-width, '
                'and for latencies with the device file and the version that it was trained with')
        self.sampler.load_state_dict(state)
        self._update, self._micro, self._micro_step = state['update'], 0, state['micro_step']
        self.loop_state = state['loop']


def check_generator(generator: ArchitectureGenerator, space: SearchSpace, groups: BudgetGroups) -> None:
    """Raise a `ValueError` unless a generator belongs to this space and has the resource of these groups."""
    if generator.space.to_dict() != space.to_dict():
        raise ValueError(
            "the generator belongs to another search space than the model; create it with the model's space")
    if generator.resource != groups.resource:
        raise ValueError(
            f'the generator is for {generator.resource.label}, the groups are of {groups.resource.label}; create both '
            'with the same resource')


def resource_state(resource: Resource) -> dict[str, str]:
    """The entry of a resource in a checkpoint: its name and its device file."""
    return dict(name=resource.name, device='' if resource.device is None else resource.device.to_json())


def check_same_resource(state: dict[str, Any], resource: Resource) -> None:
    """Raise a `ValueError` unless the budgets of a task state bound this resource; those of older versions are MACs."""
    saved, mine = state.get('resource') or resource_state(MACS), resource_state(resource)
    if saved != mine:
        raise ValueError(
            f'the checkpoint has budgets of {saved["name"]} and this run of {mine["name"]}, or of another device file; '
            'resume with the same --resource and --resource-file')


def check_same_space(state: dict[str, Any], space: SearchSpace) -> None:
    """Raise a `ValueError` that names the first field in which the space of a task state differs."""
    mine, theirs = space.to_dict(), state.get('space', {})
    mine, theirs = ({**data, **data.get('geometry', {})} for data in (mine, theirs))
    for name, value in mine.items():
        if name != 'geometry' and theirs.get(name) != value:
            raise ValueError(
                f'the checkpoint is of another search space: its {name} is {theirs.get(name)}, here it is {value}; '
                'resume with the same --model and model flags')
