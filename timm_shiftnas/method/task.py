"""`ShiftNASTask`: timm's classification task, training a supernet by ShiftNAS (Zhang et al., ICCV 2023).

One arch per micro-batch: a budget group k ~ P, a budget uniform in it, an arch from the generator. Beside the
supernet's own step, every `generator_interval` updates the generator takes a step on the task loss and the resource
term, and every `shift_interval` updates the probability shift reads its signal. Everything drawn is a function of
(seed, step), so that the processes of a distributed run draw alike, and what is learned is summed over them.

The only module beside `patch` that imports `timm.task`.
"""
from __future__ import annotations

from collections import deque
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
from ..space.matrix_mapping import arch_masks
from ..utils.distributed import Ranks
from ..utils.streams import stream
from .config import ShiftNASConfig
from .distillation import divergence
from .generator import ArchitectureGenerator
from .groups import BudgetGroups
from .shift import ProbabilityShift
from .signals import ESTIMATORS, frozen, full_precision

__all__ = [
    'ClassificationEvaluator', 'ShiftNASTask', 'check_same_space', 'evaluation_sample_limit', 'load_task_ema_checkpoint',
    'resume_task_checkpoint',
]

Batch = tuple[Tensor, Tensor]
ShiftBatches = Callable[[int], tuple[Batch, Batch]]
STEPS_DRAWN = 10  # updates whose archs come in one batch from a generator that does not change


class EveryArch(nn.Module):
    """A supernet that runs several archs in one call: DDP allows one forward call before each backward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, archs: Arch | Sequence[Arch] | None = None) -> Tensor | list[Tensor]:
        if isinstance(archs, Sequence):
            return [self.module(x, arch) for arch in archs]
        return self.module(x, archs)


class ShiftNASTask(ClassificationTask):
    """Train a supernet by ShiftNAS: `task(input, target)['loss'].backward()` as with any task of timm.

    The generator stays on the CPU and has its own optimizer; the task owns both. It counts micro-batches itself.
    `loop_state` is kept in checkpoints for the loop around the task: plain values and tensors.

    Args:
        model: A supernet.
        criterion: Loss of the supernet, as in timm's `ClassificationTask`, which explains what is not named here.
        config: What is drawn and learned.
        generator: The generator, usually already fitted to the resource constraint.
        groups: Budget groups.
        shift_batches: `shift_batches(n)` gives the (images, targets) pairs from training and from held-out data of the
            n-th shift, without mixup; needed unless `shift` is 'none'. The same in every process.
        teacher: `teacher(images)` gives the logits that archs learn from beside the targets.

    Raises:
        ValueError: If `shift_batches` is missing or the parts belong to different spaces.
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
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.space = unwrap_model(model).space
        if generator.space.to_dict() != self.space.to_dict():
            raise ValueError('the generator belongs to another search space than the model; make one with model.space')
        if config.sampler == 'shiftnas' and config.shift != 'none' and shift_batches is None:
            raise ValueError(
                f"shift={config.shift!r} needs shift_batches (training and held-out images); give them or shift='none'")
        self.config, self.groups, self._shift_batches = config, groups, shift_batches
        self._generator = [generator]  # in a list: the supernet's optimizer and `.to(device)` leave it alone
        self._teacher = teacher
        net = unwrap_model(model)  # what makes it again, for those who find a checkpoint
        self.network = dict(
            architecture=net.pretrained_cfg['architecture'],
            model_args=dict(net.model_args, space=self.space.unbind().to_dict()))
        self._at_once = False  # all archs of a step in one forward call
        self.ranks = Ranks()
        self.loop_state: dict[str, Any] = {}
        self._optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
        self.shift = ProbabilityShift(
            len(groups), 'none' if config.sampler == 'uniform' else config.shift,
            lr=config.shift_lr, momentum=config.shift_momentum, floor=config.shift_floor, weights=config.group_weights)
        self.history: list[tuple[int, list[float]]] = [(0, self.shift.probabilities.tolist())]
        self._update = 0  # updates that have been done
        self._micro = 0  # micro-batches since
        self._micro_step = 0  # where the streams that archs are drawn from stand
        self._archs: deque[Arch] = deque()
        self._held_out_loss: Tensor | None = None
        self._held_out: Batch | None = None

    @property
    def generator(self) -> ArchitectureGenerator:
        return self._generator[0]

    @property
    def update(self) -> int:
        """Index of the optimizer update that the next micro-batch belongs to."""
        return self._update

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> ShiftNASTask:
        """As timm's; archs leave weights without a gradient, which DDP must be told.

        Args:
            device_ids: As DDP's; on the CPU, where DDP takes none, whatever a script gives.
            **ddp_kwargs: As DDP's.
        """
        self.ranks = Ranks.current(self.device)
        self._share_generator()
        self.trainable_module, self._at_once = EveryArch(self.trainable_module), True
        if self.device.type == 'cpu':
            device_ids = None
        return super().prepare_distributed(device_ids, **dict(dict(find_unused_parameters=True), **ddp_kwargs))

    def _share_generator(self) -> None:
        """One generator for all processes; theirs are equal already, unless the machines round differently."""
        self.generator.load_state_dict(self.ranks.gather(self.generator.state_dict())[0])

    def compile(self, backend: str = 'inductor', mode: str | None = None, **compile_kwargs) -> nn.Module:
        """As timm's, for sizes that change: one graph serves all widths of a depth.

        Raises:
            ValueError: If the supernet is a CNN: every combination of kernel sizes would be a graph of its own.
        """
        if any(choice.name == 'kernel_size' for choice in self.space.choices):
            raise ValueError(
                'a supernet with elastic kernel sizes has more graphs than can be compiled; train without '
                '--torchcompile, and compile the subnets that are extracted from it')
        return super().compile(backend, mode, **dict(dict(dynamic=True), **compile_kwargs))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Loss and logits of the archs that are due.

        Args:
            input: Images [B, C, H, W].
            target: Targets, as the criterion takes them.

        Returns:
            'loss', 'archs' (a tuple) and 'output' (the logits of the first of them).
        """
        if self._micro == 0:
            self._learn_to_draw(input, target)
        archs = self._next_archs()
        self._micro += 1
        self._micro_step += 1
        if self.config.accum_steps is not None and self._micro == self.config.accum_steps:
            self.end_update()
        outputs = self._run(input, archs)
        losses = self._losses(outputs, input, target)
        return dict(loss=sum(losses) / len(losses), output=outputs[0], archs=archs)

    def end_update(self) -> None:
        """Tell that the optimizer has stepped; only needed where an update may have fewer micro-batches than others."""
        if self._micro:
            self._update, self._micro = self._update + 1, 0
            if self.config.accum_steps is not None:
                self._micro_step = self._update * self.config.accum_steps

    def _run(self, input: Tensor, archs: tuple[Arch, ...]) -> list[Tensor]:
        if self._at_once:
            return self.trainable_module(input, archs)
        return [self.trainable_module(input, arch) for arch in archs]

    def _losses(self, outputs: list[Tensor], input: Tensor, target: Tensor) -> list[Tensor]:
        """What each arch learns from: the targets, and the teacher or, in place of both, the largest arch."""
        config = self.config
        logits = None if self._teacher is None else self._teacher(input)
        losses = []
        for output in outputs:
            if losses and config.inplace_distillation:
                losses.append(divergence(output, outputs[0].detach()))
                continue
            loss = self.criterion(output, target)
            if logits is not None:
                task_weight, distill_weight = config.loss_weights
                loss = task_weight * loss + distill_weight * divergence(output, logits, config.temperature)
            losses.append(loss)
        return losses

    # -- drawing -------------------------------------------------------------------------------------------------------

    def _next_archs(self) -> tuple[Arch, ...]:
        config = self.config
        ends = (self.space.largest, self.space.smallest) if config.sandwich else ()
        each = config.archs_per_step - len(ends)
        # what all processes train is drawn by all of them, so that they stay alike
        ranks = self.ranks if config.arch_per_rank else Ranks()
        drawn = each * ranks.size
        warmup = self.update < config.warmup_updates
        if config.sampler == 'uniform' or (warmup and config.warmup_sampler == 'uniform'):
            self._archs.clear()
            noise = stream(config.seed, 'arch', self._micro_step)
            return (*ends, *ranks.share([self.space.sample(noise) for _ in range(drawn)]))
        if not self._archs:
            # The generator changes every generator_interval updates at most: until then, archs come in one batch.
            noise = stream(config.seed, 'arch', self._micro_step)
            count = (config.generator_interval or STEPS_DRAWN) * (config.accum_steps or 1) * drawn
            budgets = self.groups.draw(self.shift.probabilities, count, noise)
            self._archs.extend(self.generator.sample(budgets, noise))
        return (*ends, *ranks.share([self._archs.popleft() for _ in range(drawn)]))

    def _learn_to_draw(self, input: Tensor, target: Tensor) -> None:
        """The steps of the generator and of the shift that are due before this update."""
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
        config = self.config
        return (config.sampler == 'shiftnas' and config.shift != 'none' and self._micro == 0
                and self.update > 0 and self.update % config.shift_interval == 0)

    # -- learning ------------------------------------------------------------------------------------------------------

    def _update_generator(self, input: Tensor, target: Tensor) -> None:
        """One step on task loss + lambda * resource term, with gradients of the generator alone."""
        config, generator, net = self.config, self.generator, unwrap_model(self.trainable_module)
        images = config.images_for_generator(self.ranks.size * len(input))
        part = slice(max(-(-images // self.ranks.size), 2))  # BatchNorm takes no single image
        noise = stream(config.seed, 'generator', self.update)
        share = min(self.update / config.total_updates, 1.)
        tau = config.tau[0] + (config.tau[1] - config.tau[0]) * share
        # the resource term sees the whole range and both of its ends, whatever P is
        low, high = self.groups.edges[0], self.groups.edges[-1]
        spread = low + (high - low) * torch.rand(config.resource_batch, generator=noise, dtype=torch.float64)
        spread[0], spread[-1] = low, high
        budgets = torch.cat([self.groups.draw(self.shift.probabilities, 1, noise), spread])
        with torch.enable_grad():
            rollout = generator(budgets, noise=noise, tau=tau)
            masks = arch_masks(self.space, [one_hot[0].to(input.device) for one_hot in rollout.one_hots])
            with frozen(net), full_precision(self.device):  # no loss scaling here, as float16 would need
                task_loss = self.criterion(net(input[part], masks), target[part])
            resource = generator.resource_loss(budgets, rollout.one_hots)
            loss = task_loss.cpu() + config.resource_weight * resource
            parameters = list(generator.parameters())
            gradients = torch.autograd.grad(loss, parameters)
        self.ranks.mean_(gradients)
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.)  # straight-through gradients have rare large outliers
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _update_shift(self) -> None:
        net = unwrap_model(self.trainable_module)
        scores = self.shift_scores(net)
        if self.update < self.config.warmup_updates:
            self.shift.observe(scores)
        else:
            self.shift.update(scores)
        self.history.append((self.update, self.shift.probabilities.tolist()))

    def shift_scores(self, net: nn.Module) -> Tensor:
        """The signal of every group, [K]: at the generator's arch for the upper edge, on the batches that are due."""
        archs = self.generator.propose_many(self.groups.budgets)
        train, held_out = self._shift_batches(self.update // self.config.shift_interval)
        if self.config.shift == 'variation':
            held_out = self._first_held_out(held_out)

        def loss(arch: Arch, batch: Batch) -> Tensor:
            images, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            return F.cross_entropy(net(images, arch), targets)

        options: dict[str, Any] = dict(ranks=self.ranks)
        if self.config.shift == 'hypergradient':
            options['epsilon'] = self.config.shift_epsilon
            groups, count = len(archs), len(held_out[1])
            held_out = [tuple(tensor[k % count::groups] for tensor in held_out) for k in range(groups)]
        with frozen(net), full_precision(self.device), torch.enable_grad():
            scores = ESTIMATORS[self.config.shift](net, loss, archs, train, held_out, **options)
        if self.config.shift == 'variation':
            losses, last = scores, self._held_out_loss
            self._held_out_loss = losses
            # nothing has varied before the second time: NaN, which the shift leaves out
            scores = torch.full_like(losses, torch.nan) if last is None else (losses - last).abs() / losses
        return scores

    def _first_held_out(self, held_out: Batch) -> Batch:
        """The same held-out images every time, or their difference would pass for a change of the network."""
        if self._held_out is None:
            self._held_out = held_out
        return self._held_out

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Everything beyond the weights that a resumed run needs: tensors and plain values only."""
        if ema:
            return {}
        return dict(
            network=self.network, space=self.space.to_dict(), edges=list(self.groups.edges), update=self._update,
            micro_step=self._micro_step, loop=self.loop_state,
            generator=self.generator.state_dict(), generator_optimizer=self._optimizer.state_dict(),
            shift=self.shift.state_dict(), held_out_loss=self._held_out_loss, held_out=self._held_out,
            archs=[arch.to_dict() for arch in self._archs], history=[[step, list(p)] for step, p in self.history])

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Inverse of `get_task_state`.

        Raises:
            ValueError: If the state is of another search space, other groups or another signal.
        """
        if ema or not state:
            return
        check_same_space(state, self.space)
        if list(state['edges']) != list(self.groups.edges):
            raise ValueError(
                f'the checkpoint has {len(state["edges"]) - 1} budget groups and this run {len(self.groups)}; '
                'resume with the same --num-groups or --group-width')
        self.shift.load_state_dict(state['shift'])
        self.generator.load_state_dict(state['generator'])
        self._optimizer.load_state_dict(state['generator_optimizer'])
        self._update, self._micro, self._micro_step = state['update'], 0, state['micro_step']
        self._held_out_loss, self.loop_state = state['held_out_loss'], state['loop']
        self._held_out = state['held_out']
        self._archs = deque(self.space.from_dict(arch) for arch in state['archs'])
        self.history = [(step, list(p)) for step, p in state['history']]


def check_same_space(state: dict[str, Any], space: SearchSpace) -> None:
    """Refuse the task state of another space with a line that says which field differs."""
    mine, theirs = space.to_dict(), state.get('space', {})
    mine, theirs = ({**data, **data.get('geometry', {})} for data in (mine, theirs))
    for name, value in mine.items():
        if name != 'geometry' and theirs.get(name) != value:
            raise ValueError(
                f'the checkpoint is of another search space: its {name} is {theirs.get(name)}, here it is {value}; '
                'resume with the same --model and model flags')
