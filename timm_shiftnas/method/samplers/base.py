"""The base class of samplers, and the data of a step that they see."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...space.core import Arch
from ...utils.distributed import Ranks
from ..config import ShiftNASConfig
from ..generator import ArchitectureGenerator
from ..groups import BudgetGroups
from ..shift import ProbabilityShift
from ..signals import Signal, create_signal, frozen

__all__ = ['Batch', 'Sampler', 'ShiftBatches', 'Step']

Batch = tuple[Tensor, Tensor]
ShiftBatches = Callable[[int], tuple[Batch, Batch]]


@dataclass(frozen=True)
class Step:
    """Data that a sampler may learn from before a training step.

    Args:
        update: Index of the optimizer update.
        micro_step: Position in the streams that archs are drawn from.
        net: The supernet, unwrapped.
        criterion: Loss of (output, targets).
        held_out_loss: Plain loss of (output, targets) that the shift measures, without label smoothing.
        images, targets: The micro-batch of this process.
        device: Device of the supernet.
        ranks: The processes that train together.
    """
    update: int
    micro_step: int
    net: nn.Module
    criterion: Callable[[Any, Tensor], Tensor]
    held_out_loss: Callable[[Any, Tensor], Tensor]
    images: Tensor
    targets: Tensor
    device: torch.device
    ranks: Ranks

    @torch.no_grad()
    def losses(self, archs: Sequence[Arch], count: int | None = None) -> Tensor:
        """Losses of some archs on this micro-batch, float64 [archs], the mean over all processes.

        Dropout and drop path are off. BatchNorm normalises by the batch, and its statistics stay as they are.

        Args:
            archs: The archs.
            count: Number of images of this process that are used (default: all).
        """
        with frozen(self.net):
            values = [self.criterion(self.net(self.images[:count], arch), self.targets[:count]) for arch in archs]
        losses = torch.stack(values).double().cpu()
        self.ranks.mean_([losses])
        return losses


class Sampler:
    """Draws the archs of training steps, and learns how.

    Every sampler has a generator and P. Both are saved, even if the sampler does not use them.

    Args:
        config: Settings of the method.
        generator: The generator. It stays on the CPU, and the sampler owns its optimizer.
        groups: Budget groups.
        shift_batches: Images of a learned shift; see `ShiftNASTask`.

    Attributes:
        searches: Whether the arch for a budget is found by a search on images after training.
        proposes: Whether the generator proposes the arch for a budget.
        shift: P.
        history: Pairs (update, [P_1, ..., P_K]); P is in effect from that update on.
    """
    searches = False
    proposes = True

    def __init__(
            self,
            config: ShiftNASConfig,
            generator: ArchitectureGenerator,
            groups: BudgetGroups,
            shift_batches: ShiftBatches | None = None,
    ) -> None:
        self.config, self.generator, self.groups = config, generator, groups
        self.space, self.shift_batches = generator.space, shift_batches
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr)
        self.signal: Signal = create_signal(self.shift_signal, config.shift_epsilon)
        self.shift = ProbabilityShift(
            len(groups), self.shift_signal, lr=config.shift_lr, momentum=config.shift_momentum,
            floor=config.shift_floor, weights=config.group_weights)
        self.history: list[tuple[int, list[float]]] = [(0, self.shift.probabilities.tolist())]

    @property
    def shift_signal(self) -> str:
        """Signal of the probability shift."""
        return 'none'

    def update(self, step: Step) -> None:
        """Learn before an update, from its first micro-batch."""

    def draw(self, step: Step, count: int) -> list[Arch]:
        """Draw `count` archs for a micro-batch."""
        raise NotImplementedError

    def shift_is_due(self, update: int) -> bool:
        """Whether the shift takes in its signal before an update."""
        return False

    def archs_for_budgets(self) -> list[Arch]:
        """The arch for the budget of each group, if no search finds it."""
        return self.generator.propose_many(self.groups.budgets)

    def images_of_generator(self, step: Step) -> int:
        """Number of images of this process that a step of the generator uses; BatchNorm needs two."""
        total = self.config.images_for_generator(step.ranks.size * len(step.images))
        return max(-(-total // step.ranks.size), 2)

    def step_generator(self, loss: Tensor, ranks: Ranks) -> None:
        """Take a step of the generator on the mean of a loss over all processes."""
        parameters = list(self.generator.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        ranks.mean_(gradients)
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 1.)  # straight-through gradients have rare large outliers
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain values."""
        return dict(
            generator=self.generator.state_dict(), generator_optimizer=self.optimizer.state_dict(),
            shift=self.shift.state_dict(), **self.signal.state_dict(), archs=[],
            history=[[update, list(p)] for update, p in self.history])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: If the state has another number of groups or another signal.
        """
        self.shift.load_state_dict(state['shift'])
        self.signal.load_state_dict(state)
        self.generator.load_state_dict(state['generator'])
        self.optimizer.load_state_dict(state['generator_optimizer'])
        self.history = [(update, list(p)) for update, p in state['history']]
