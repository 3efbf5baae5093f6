"""`NetworkTask`: timm's classification task for one network, such as an extracted subnet that is fine-tuned."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..space.core import SearchSpace
from .config import ShiftNASConfig
from .distillation import distilled
from .task import ClassificationTask, check_same_space

__all__ = ['NetworkTask']


class NetworkTask(ClassificationTask):
    """Train one network of this package, without drawing archs.

    A loop can use it as it uses a `ShiftNASTask`: `loop_state` is saved in checkpoints, and `end_update` may be called.

    Args:
        model: A static subnet.
        criterion_kwargs: As for timm's `ClassificationTask`.
        space: The space of the network's own values, bound to its geometry; it tells networks apart.
        config: The weights and the temperature of a teacher.
        teacher: `teacher(images)` returns logits to distil from.
        device: Device of the network.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion_kwargs: dict[str, Any] | None = None,
            *,
            space: SearchSpace,
            config: ShiftNASConfig,
            teacher: Callable[[Tensor], Tensor] | None = None,
            device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion_kwargs=criterion_kwargs, device=device)
        net: Any = unwrap_model(model)
        self.space, self.config, self._teacher = space, config, teacher
        self.network = dict(  # arguments of `create_model` and names of the classes, for readers of a checkpoint
            architecture=net.pretrained_cfg['architecture'], label_names=net.pretrained_cfg.get('label_names'),
            model_args=dict(net.model_args, arch=net.arch.to_dict()))
        self.loop_state: dict[str, Any] = {}

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> NetworkTask:
        """Wrap the model in DDP, which takes no `device_ids` on the CPU."""
        super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Compute the loss.

        Args:
            input: Images [B, C, H, W].
            target: Targets of the criterion.

        Returns:
            'loss' and 'output', the logits.
        """
        result = super().forward(input, target)
        if self._teacher is not None:
            result['loss'] = distilled(result['loss'], result['output'], self._teacher(input), self.config)
        return result

    def end_update(self) -> None:
        """Do nothing: no archs are drawn for an update."""

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """All that a resumed run needs besides the weights, as plain values."""
        return {} if ema else dict(network=self.network, space=self.space.to_dict(), loop=self.loop_state)

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Load what `get_task_state` returned.

        Raises:
            ValueError: If the state is of another network.
        """
        if state and not ema:
            check_same_space(state, self.space)
            self.loop_state = state['loop']
