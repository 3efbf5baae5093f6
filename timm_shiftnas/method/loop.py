"""ShiftNAS in your own training loop. Importing this module changes nothing.

    task = timm_shiftnas.create_task(net, total_updates=10_000, shift='hypergradient')
"""
from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from timm.loss import JsdCrossEntropy
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..space import is_supernet
from ..utils.yaml_files import read_yaml
from .config import RunConfig, ShiftNASConfig, settings_of
from .generator import ArchitectureGenerator
from .groups import BudgetGroups
from .samplers.base import Batch
from .task import ShiftNASTask

__all__ = ['StockTask', 'create_task', 'read_environment', 'read_settings', 'update_running_statistics']

PREFIX = 'SHIFTNAS_'

# STATISTICS_IMAGES: share of a batch that is used to update the running statistics, in one forward of the full network.
# STATISTICS_SHARE: weight of these images in the moving average, which follows the weights within a few updates.
STATISTICS_IMAGES = .25
STATISTICS_SHARE = .25

# Fields of ShiftNASConfig that cannot be set here: the task counts micro-batches itself, and there is no teacher.
DERIVED_FIELDS = ('accum_steps', 'task_loss_weight', 'distill_loss_weight', 'temperature')


def create_task(model: nn.Module, criterion: Any = None, *, criterion_kwargs: dict[str, Any] | None = None,
                held_out_loss: Callable[[Any, Tensor], Tensor] | None = None, device: torch.device | None = None,
                verbose: bool = False, **settings: Any) -> StockTask:
    """Create a task for your own loop: `task(images, targets)['loss']`, backward, and the optimizer's step.

    After the step of an optimizer that is not a `torch.optim.Optimizer`, call `task.end_update()`.

    Args:
        model: A supernet.
        criterion: Loss of (output, targets), where targets are one tensor [B, ...]. The default is cross-entropy with
            the `criterion_kwargs` of timm's `create_classification_loss`.
        held_out_loss: Loss of (output, targets) that the shift measures. The default is plain cross-entropy; an
            `ElasticModel` with another kind of output needs its own, which usually is `criterion`.
        device: Device of the model; the default is the CPU.
        verbose: Log, and show the progress of the generator's fit.
        **settings: Fields of `ShiftNASConfig` and `RunConfig`, such as `shift='hypergradient'`; see `read_settings`.

    Raises:
        ValueError: If `model` is not a supernet or a setting is wrong.
    """
    if not is_supernet(model):
        raise ValueError(
            f"{type(model).__name__} is not a supernet; create one, as in timm.create_model('shiftformer_supernet')")
    config, run = read_settings(settings)
    return StockTask(
        model, criterion, criterion_kwargs, device=device, verbose=verbose, config=config, run=run,
        held_out_loss=held_out_loss or F.cross_entropy)


# -- settings ----------------------------------------------------------------------------------------------------------


def read_settings(given: Mapping[Any, Any]) -> tuple[ShiftNASConfig, RunConfig]:
    """Build the configs from settings by name. Lists may stand for tuples, and texts for numbers.

    A loop does not tell its task how long it will train. So without `total_updates` the temperature stays at its first
    value, and without `warmup_updates` the warm-up is a tenth of `total_updates`.

    Raises:
        ValueError: If a name is unknown or a value is not allowed.
    """
    known = {each.name: each for config in (ShiftNASConfig, RunConfig) for each in settings_of(config)
             if each.name not in DERIVED_FIELDS}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f'ShiftNAS has no setting {name!r} ({PREFIX}{str(name).upper()} in the environment); choose from '
                f'{", ".join(sorted(known))}')
        try:
            values[name] = known[name].convert(value)
        except ValueError as error:
            raise ValueError(
                f'the ShiftNAS setting {name}={value!r} {error}; the default is {known[name].default}') from None
    run = {each.name: values.pop(each.name) for each in settings_of(RunConfig) if each.name in values}
    if 'total_updates' not in values:
        first = values.get('tau', ShiftNASConfig.tau)[0]
        values['tau'] = (first, first)
    values.setdefault('warmup_updates', values.get('total_updates', 0) // 10)
    return ShiftNASConfig(accum_steps=None, **values), RunConfig(**run)


def read_environment(environment: Mapping[str, str] | None = None) -> tuple[ShiftNASConfig, RunConfig]:
    """Build the configs from `SHIFTNAS_NAME` variables, and from the YAML file that `SHIFTNAS_CONFIG` names.

    Variables hold YAML values and take precedence over the file. Empty variables are ignored.

    Raises:
        ValueError: If the file cannot be read, a variable is not YAML, or as for `read_settings`.
    """
    environment = os.environ if environment is None else environment
    path = environment.get(f'{PREFIX}CONFIG')
    try:
        given = read_yaml(path) if path else {}
    except ValueError as error:
        raise ValueError(f'{PREFIX}CONFIG: {error}') from None
    for name, text in environment.items():
        if name.startswith(PREFIX) and name != f'{PREFIX}CONFIG' and text:
            try:
                given[name.removeprefix(PREFIX).lower()] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise ValueError(
                    f'{name}={text!r} cannot be read; give one YAML value: none, 0.5, true, [1, 0.3]') from None
    return read_settings(given)


# -- the task ----------------------------------------------------------------------------------------------------------


class ShiftImages:
    """The images of the current shift: the `shift_batches` of a `StockTask`."""
    batches: tuple[Batch, Batch]

    def __call__(self, number: int) -> tuple[Batch, Batch]:
        return self.batches


@torch.no_grad()
def update_running_statistics(net: nn.Module, images: Tensor, share: float) -> None:
    """Update the running statistics of the BatchNorms in training mode with one forward of the full network.

    Dropout and drop path are off, so that nothing random is drawn.

    Args:
        net: A supernet.
        images: [B, C, H, W].
        share: Share of these images in the moving average.
    """
    modes = [(module, module.training) for module in net.modules()]
    norms = [(module, module.momentum) for module, training in modes if training and isinstance(module, _BatchNorm)]
    if not norms:
        return
    try:
        net.eval()
        for norm, _ in norms:
            norm.training, norm.momentum = True, share
        net(images)
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in norms:
            norm.momentum = momentum


class StockTask(ShiftNASTask):
    """ShiftNAS for a loop that only calls the task, runs backward and steps its optimizer.

    An update ends with the optimizer's step, after any number of micro-batches. A shift takes its images from the batch
    of its update: the images it holds out are not trained on in that step. They are mixed and augmented like all
    images of the loop, and are trained on in other epochs; `train.py` of this project holds a part of the data out.

    Such a loop validates the full network, `model(x)`, and may choose its best checkpoint by that. With BatchNorm, a
    part of the images of each update therefore also updates the running statistics of the full network, without
    gradients.

    Args:
        model: A supernet. Arguments that are not listed are those of timm's `ClassificationTask`.
        config, run: Settings; the default is `read_environment()`.
        held_out_loss: As for `ShiftNASTask`.
    """

    def __init__(self, model: nn.Module, criterion: Any = None, criterion_kwargs: dict[str, Any] | None = None,
                 device: torch.device | None = None, dtype: torch.dtype | None = None, verbose: bool = True, *,
                 config: ShiftNASConfig | None = None, run: RunConfig | None = None,
                 held_out_loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy) -> None:
        if config is None:
            config, run = read_environment()
        self.run = run = run or RunConfig()
        space = unwrap_model(model).space
        if config.shift != 'none' and any(p.dtype.itemsize < 4 for p in model.parameters()):
            raise ValueError(
                f"shift={config.shift!r} measures small differences, which weights in half precision cannot hold; use "
                "--amp instead of --model-dtype, or shift='none'")
        groups, images = BudgetGroups.of_settings(space, run), ShiftImages()
        super().__init__(
            model, criterion, criterion_kwargs, config=config,
            generator=ArchitectureGenerator(space, seed=config.seed, resource=groups.resource), groups=groups,
            shift_batches=images, held_out_loss=held_out_loss, device=device, dtype=dtype, verbose=verbose)
        if isinstance(self.criterion, JsdCrossEntropy):
            raise ValueError(
                'JsdCrossEntropy compares the splits of a batch, but ShiftNAS takes parts of a batch; leave out '
                '--jsd-loss or --loss jsd')
        self._images = images
        self._fitted = False
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        """End an update whenever an optimizer of these weights has stepped.

        A step that a scaler skips is not an update. If steps are nested, or two optimizers share the weights, only the
        first step counts. The hook does not keep the task alive.
        """
        task = weakref.ref(self)

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            found = task()
            if found is None or not found._micro:
                return
            own = {id(p) for p in found.trainable_module.parameters()}
            if any(id(p) in own for group in optimizer.param_groups for p in group['params']):
                found.end_update()

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_optimizers()  # a copy has its own optimizer

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Compute the loss as `ShiftNASTask.forward` does, on the images that are not held out."""
        if not isinstance(input, Tensor):
            raise ValueError(
                f'a supernet takes batches of images, not of {type(input).__name__}; leave out --naflex-loader')
        if not self._fitted:
            self.generator.fit(steps=self.run.generator_fit_steps, seed=self.config.seed, progress=self.verbose)
            self._fitted = True
            self._broadcast_generator()
        if self._micro == 0:
            part = input[:max(2, int(STATISTICS_IMAGES * len(input)))]
            share = max(STATISTICS_SHARE, 1 / (self.update + 1))  # the mean over the first updates
            update_running_statistics(unwrap_model(self.trainable_module), part, share)
        if self._shift_is_due:
            input, target = self._hold_out(input, target)
        return super().forward(input, target)

    def _hold_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Keep images of this batch for the shift: the first ones to train on, and those in the middle held out.

        Mixup and cutmix of timm mix each image with its mirror image in the batch, the first with the last. So the
        images in the middle are mixed only with each other.

        Returns:
            The images and targets that are left to train on.
        """
        count = -(-self.run.shift_images // self.ranks.size)
        left = (len(input) - count) // 2
        if left < 1 or 2 * left < count:
            most = [n for n in range(1, len(input)) if 2 * ((len(input) - n) // 2) >= n]
            hint = f'set {PREFIX}SHIFT_IMAGES={most[-1] * self.ranks.size} or less' if most else 'use larger batches'
            raise ValueError(f'a batch of {len(input)} images is too small to hold {count} out for a shift; {hint}')

        def gather(tensor: Tensor) -> Tensor:
            """The images of all processes, in the order in which samplers distribute them."""
            if self.ranks.size == 1:
                return tensor.detach().clone()
            return torch.stack(self.ranks.gather(tensor.detach().cpu()), 1).flatten(0, 1)

        middle = slice(left, len(input) - left)
        held_out = gather(input[middle]), gather(target[middle])
        input, target = (torch.cat([tensor[:left], tensor[middle.stop:]]) for tensor in (input, target))
        self._images.batches = (gather(input[:count]), gather(target[:count])), held_out
        return input, target

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The state of `ShiftNASTask`, and the number of micro-batches since the last update."""
        state = super().get_task_state(module, ema)
        return dict(state, micro=self._micro, fitted=self._fitted) if state else {}

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """Load what `get_task_state` returned; errors as for `ShiftNASTask.load_task_state`."""
        super().load_task_state(state, strict, module, ema)
        if state and not ema:  # checkpoints of `train.py` have neither: it fits first, and saves between updates
            self._micro, self._fitted = state.get('micro', 0), state.get('fitted', True)
