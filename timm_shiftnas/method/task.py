"""`ShiftNASTask`: timm's classification task that trains a supernet with ShiftNAS (Zhang et al., ICCV 2023).

Each micro-batch trains one arch: a budget group k ~ P, a budget uniform in it, an arch from the generator. Every
`generator_interval` updates the generator takes a step on `generator_loss`, and every `shift_interval` updates the
probability shift takes in its signal. All random draws are functions of (seed, step), so all processes of a distributed
run draw the same; what they learn from is summed over them.

`timm.task` is imported here, in `distillation` and in `timm_shiftnas.patch`, and nowhere else.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

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
from ..space.matrix_mapping import arch_masks
from ..utils.distributed import Ranks
from ..utils.streams import stream
from .config import ShiftNASConfig
from .distillation import distilled, divergence
from .generator import ArchitectureGenerator, generator_loss
from .groups import BudgetGroups
from .shift import ProbabilityShift
from .signals import create_signal, frozen, full_precision

__all__ = [
    'ClassificationEvaluator', 'ClassificationTask', 'ShiftNASTask', 'check_same_space', 'evaluation_sample_limit',
    'load_task_ema_checkpoint', 'resume_task_checkpoint',
]

Batch = tuple[Tensor, Tensor]
ShiftBatches = Callable[[int], tuple[Batch, Batch]]
DRAW_AHEAD = 10  # updates whose archs are drawn at once from a generator that does not change


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
        held_out_loss: `held_out_loss(output, targets)`: what the shift measures.

    Raises:
        ValueError: If `shift_batches` is missing, or generator and model have different search spaces.
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
        if generator.space.to_dict() != self.space.to_dict():
            raise ValueError(
                "the generator belongs to another search space than the model; create it with the model's space")
        signal = 'none' if config.sampler == 'uniform' else config.shift
        if signal != 'none' and shift_batches is None:
            raise ValueError(
                f"shift={signal!r} needs shift_batches (training and held-out images); give them or shift='none'")
        self.config, self.groups = config, groups
        self._shift_batches = cast(ShiftBatches, shift_batches)
        self._generator = [generator]  # in a list, so that `.parameters()` and `.to(device)` of the task leave it out
        self._teacher, self._held_out_loss = teacher, held_out_loss
        self.network = dict(  # arguments of `create_model` and names of the classes, for readers of a checkpoint
            architecture=net.pretrained_cfg['architecture'], label_names=net.pretrained_cfg.get('label_names'),
            model_args=dict(net.model_args, space=self.space.unbind().to_dict()))
        self._one_call = False  # whether one forward call runs all archs of a step
        self.ranks = Ranks()
        self.loop_state: dict[str, Any] = {}
        self._optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
        self.signal = create_signal(signal, config.shift_epsilon)
        self.shift = ProbabilityShift(
            len(groups), signal, lr=config.shift_lr, momentum=config.shift_momentum, floor=config.shift_floor,
            weights=config.group_weights)
        self.history: list[tuple[int, list[float]]] = [(0, self.shift.probabilities.tolist())]
        self._update = 0  # completed updates
        self._micro = 0  # micro-batches of the current update
        self._micro_step = 0  # position in the streams that archs are drawn from
        self._archs: deque[Arch] = deque()  # drawn ahead

    @property
    def generator(self) -> ArchitectureGenerator:
        return self._generator[0]

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
            ValueError: If BatchNorms wait for processes that train other archs.
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
        if self._micro == 0:
            self._update_samplers(input, target)
        archs = self._draw_archs()
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
        for output in outputs:
            if losses and config.inplace_distillation:
                losses.append(divergence(output, outputs[0]))
                continue
            loss = self.criterion(output, target)
            if logits is not None:
                loss = distilled(loss, output, logits, config)
            losses.append(loss)
        return losses

    # -- drawing archs -------------------------------------------------------------------------------------------------

    def _draw_archs(self) -> tuple[Arch, ...]:
        """The archs of this micro-batch: with the sandwich rule the largest and the smallest, then sampled ones."""
        config = self.config
        ends = (self.space.largest, self.space.smallest) if config.sandwich else ()
        # Every process draws the archs of all processes, so that all stay in the same state.
        ranks = self.ranks if config.arch_per_rank else Ranks()
        count = (config.archs_per_step - len(ends)) * ranks.size
        warms_up = self.update < config.warmup_updates and config.warmup_sampler == 'uniform'
        uniform = config.sampler == 'uniform' or warms_up
        return (*ends, *ranks.shard(self._draw_uniform(count) if uniform else self._draw_generated(count)))

    def _draw_uniform(self, count: int) -> list[Arch]:
        """Archs sampled from the search space, without the generator."""
        self._archs.clear()
        noise = stream(self.config.seed, 'arch', self._micro_step)
        return [self.space.sample(noise) for _ in range(count)]

    def _draw_generated(self, count: int) -> list[Arch]:
        """Archs from the generator, for budgets drawn from P."""
        config = self.config
        if not self._archs:
            # Draw all archs up to the next step of the generator at once.
            noise = stream(config.seed, 'arch', self._micro_step)
            total = (config.generator_interval or DRAW_AHEAD) * (config.accum_steps or 1) * count
            lowest = self.groups.lowest_budget(self.update, config.curriculum_updates)
            budgets = self.groups.draw(self.shift.probabilities, total, noise, lowest)
            self._archs.extend(self.generator.sample(budgets, noise))
        return [self._archs.popleft() for _ in range(count)]

    # -- learning to draw them -----------------------------------------------------------------------------------------

    def _update_samplers(self, input: Tensor, target: Tensor) -> None:
        """Take the steps of the generator and the shift that are due before this update."""
        config, update = self.config, self.update
        if config.sampler == 'uniform':
            return
        if config.generator_interval and update % config.generator_interval == 0:
            self._update_generator(input, target)
            self._archs.clear()
        if self._shift_is_due:
            self._update_shift()
            self._archs.clear()

    @property
    def _shift_is_due(self) -> bool:
        return (self.shift.signal != 'none' and self._micro == 0
                and self.update > 0 and self.update % self.config.shift_interval == 0)

    def _update_generator(self, input: Tensor, target: Tensor) -> None:
        """One step on `generator_loss`, with gradients of the generator alone."""
        config, generator, net = self.config, self.generator, unwrap_model(self.trainable_module)
        images = config.images_for_generator(self.ranks.size * len(input))
        part = slice(max(-(-images // self.ranks.size), 2))  # BatchNorm needs two images
        noise = stream(config.seed, 'generator', self.update)
        spread = self.groups.spread(config.resource_batch, noise)
        lowest = self.groups.lowest_budget(self.update, config.curriculum_updates)
        drawn = self.groups.draw(self.shift.probabilities, 1, noise, lowest)
        budgets = torch.cat([drawn, spread])
        with torch.enable_grad():
            rollout = generator(budgets, noise=noise, tau=self._tau)
            masks = arch_masks(self.space, [one_hot[0].to(input.device) for one_hot in rollout.one_hots])
            with frozen(net), full_precision(self.device):  # without autocast, float16 needs no loss scaling
                task_loss = self.criterion(net(input[part], masks), target[part])
            resource = generator.resource_loss(budgets, rollout.one_hots)
            loss = generator_loss(task_loss.cpu(), resource, config.resource_weight)
            parameters = list(generator.parameters())
            gradients = torch.autograd.grad(loss, parameters)
        self.ranks.mean_(gradients)
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.)  # straight-through gradients have rare large outliers
            self._optimizer.step()
            self._optimizer.zero_grad()

    @property
    def _tau(self) -> float:
        """Gumbel temperature at this update: linear from the first to the last."""
        first, last = self.config.tau
        return first + (last - first) * min(self.update / self.config.total_updates, 1.)

    def _update_shift(self) -> None:
        """Take in the scores of the groups, and shift P after warm-up and curriculum."""
        scores = self.shift_scores(unwrap_model(self.trainable_module))
        if self.update < max(self.config.warmup_updates, self.config.curriculum_updates):
            self.shift.observe(scores)
        else:
            self.shift.update(scores)
        self.history.append((self.update, self.shift.probabilities.tolist()))

    def shift_scores(self, net: nn.Module) -> Tensor:
        """The signal of every group, [K]: at the proposed arch for its upper edge, on the batches of this shift."""
        archs = self.generator.propose_many(self.groups.budgets)
        train, held_out = self._shift_batches(self.update // self.config.shift_interval)

        def loss(arch: Arch, batch: Batch) -> Tensor:
            images, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            return self._held_out_loss(net(images, arch), targets)

        with frozen(net), full_precision(self.device), torch.enable_grad():
            return self.signal(net, loss, archs, train, held_out, self.ranks)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """All that a resumed run needs besides the weights, as tensors and plain values."""
        if ema:
            return {}
        return dict(
            network=self.network, space=self.space.to_dict(), edges=list(self.groups.edges), update=self._update,
            micro_step=self._micro_step, loop=self.loop_state,
            generator=self.generator.state_dict(), generator_optimizer=self._optimizer.state_dict(),
            shift=self.shift.state_dict(), **self.signal.state_dict(),
            archs=[arch.to_dict() for arch in self._archs], history=[[step, list(p)] for step, p in self.history])

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Load what `get_task_state` returned.

        Raises:
            ValueError: If the state has another search space, other groups or another signal.
        """
        if ema or not state:
            return
        check_same_space(state, self.space)
        if list(state['edges']) != list(self.groups.edges):
            raise ValueError(
                f'the checkpoint has {len(state["edges"]) - 1} budget groups and this run {len(self.groups)}; '
                'resume with the same --num-groups or --group-width')
        self.shift.load_state_dict(state['shift'])
        self.signal.load_state_dict(state)
        self.generator.load_state_dict(state['generator'])
        self._optimizer.load_state_dict(state['generator_optimizer'])
        self._update, self._micro, self._micro_step = state['update'], 0, state['micro_step']
        self.loop_state = state['loop']
        self._archs = deque(self.space.from_dict(arch) for arch in state['archs'])
        self.history = [(step, list(p)) for step, p in state['history']]


def check_same_space(state: dict[str, Any], space: SearchSpace) -> None:
    """Raise a `ValueError` that names the first field in which the space of a task state differs."""
    mine, theirs = space.to_dict(), state.get('space', {})
    mine, theirs = ({**data, **data.get('geometry', {})} for data in (mine, theirs))
    for name, value in mine.items():
        if name != 'geometry' and theirs.get(name) != value:
            raise ValueError(
                f'the checkpoint is of another search space: its {name} is {theirs.get(name)}, here it is {value}; '
                'resume with the same --model and model flags')
