"""ShiftNAS in your own training loop. Importing this module changes nothing."""
from __future__ import annotations

import dataclasses
import os
import types
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
import yaml
from timm.loss import JsdCrossEntropy
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..space import is_supernet
from ..utils.text import one_line
from ..utils.units import parse_count
from .config import ShiftNASConfig
from .generator import ArchitectureGenerator
from .groups import BudgetGroups
from .task import Batch, ShiftNASTask

__all__ = ['Settings', 'StockTask', 'create_task']

PREFIX = 'SHIFTNAS_'


# fields of ShiftNASConfig that nobody sets: the first is found out, the others weigh a teacher that no script gives us
UNSET = ('accum_steps', 'task_loss_weight', 'distill_loss_weight', 'temperature')


KINDS = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text', types.NoneType: 'null'}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a loop does not say, beside the fields of `ShiftNASConfig` (all but those in `UNSET`).

    `total_updates` and `warmup_updates` are for the loop's author to give: no task is told how long it will last.
    Without the first, the temperature stays at its first value; without the second, warm-up is a tenth of the first.

    Args:
        config: How archs are drawn and what is learned about it.
        num_groups: Number of budget groups, or
        group_width: their width in MACs, such as '0.1G'; see `BudgetGroups.of_space`.
        generator_fit_steps: Steps on the resource term before training.
        shift_images: Images of a shift, for training and as many that are held out, over all processes.
    """
    config: ShiftNASConfig
    num_groups: int | None = None
    group_width: str | float | None = None
    generator_fit_steps: int = 1000
    shift_images: int = 32

    def __post_init__(self) -> None:
        for name, least in (('shift_images', 1), ('generator_fit_steps', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)} must be at least {least}')

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings by name, checked.

        Raises:
            ValueError: If a name is unknown or a value is of another kind.
        """
        theirs, own = get_type_hints(ShiftNASConfig), get_type_hints(cls)
        kinds = {name: kind for name, kind in {**theirs, **own}.items() if name not in ('config', *UNSET)}
        checked = {}
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(
                    f'ShiftNAS has no setting {name!r} ({PREFIX}{str(name).upper()} in the environment); choose from '
                    f'{", ".join(sorted(kinds))}')
            try:
                checked[name] = _of_kind(value, kinds[name])
            except (TypeError, ValueError):
                raise ValueError(
                    f'the ShiftNAS setting {name}={value!r} must be {_describe(kinds[name])}; the default is '
                    f'{getattr(cls if name in own else ShiftNASConfig, name)}') from None
        if 'total_updates' not in checked:
            first = checked.get('tau', ShiftNASConfig.tau)[0]
            checked['tau'] = (first, first)
        checked.setdefault('warmup_updates', checked.get('total_updates', 0) // 10)
        config = ShiftNASConfig(
            accum_steps=None, **{name: value for name, value in checked.items() if name in theirs})
        return cls(config, **{name: value for name, value in checked.items() if name in own})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Settings of `SHIFTNAS_NAME` variables over those of the YAML file that `SHIFTNAS_CONFIG` names.

        Values are YAML too. An empty variable is as one that is not there.

        Raises:
            ValueError: If there is no such file, a text is not YAML, or as `of`.
        """
        environment = os.environ if environment is None else environment
        given: dict[Any, Any] = {}
        if path := environment.get(f'{PREFIX}CONFIG'):
            try:
                read = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f'{PREFIX}CONFIG: cannot read {path!r}: {one_line(error)}') from None
            if not isinstance(read, dict | None):
                raise ValueError(f'{PREFIX}CONFIG: {path!r} must hold "name: value" lines, such as "shift: none"')
            given.update(read or {})
        for name, text in environment.items():
            if name.startswith(PREFIX) and name != f'{PREFIX}CONFIG' and text:
                try:
                    given[name.removeprefix(PREFIX).lower()] = yaml.safe_load(text)
                except yaml.YAMLError:
                    raise ValueError(
                        f'{name}={text!r} cannot be read; give one value, as in YAML: none, 0.5, true, [1, 0.3]'
                    ) from None
        return cls.of(given)


def _of_kind(value: Any, kind: Any) -> Any:
    """A value as the kind of its setting: whole numbers as numbers, lists as tuples.

    Raises:
        TypeError, ValueError: If it is of another kind.
    """
    if isinstance(kind, types.UnionType):
        for option in get_args(kind):
            with suppress(TypeError, ValueError):
                return _of_kind(value, option)
        raise TypeError
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or (... not in get_args(kind) and len(value) != len(get_args(kind))):
            raise TypeError
        return tuple(_of_kind(item, float) for item in value)
    if kind is float and type(value) in (int, str):  # YAML reads 1e-3 as a string
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _describe(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return ' or '.join(_describe(option) for option in get_args(kind))
    if get_origin(kind) is tuple:
        return 'numbers in brackets' if ... in get_args(kind) else 'two numbers in brackets'
    return KINDS[kind]


class HeldOut:
    """The images of the last shift, as `ShiftNASTask` asks for them."""
    batches: tuple[Batch, Batch] | None = None

    def __call__(self, number: int) -> tuple[Batch, Batch]:
        return self.batches


class StockTask(ShiftNASTask):
    """ShiftNAS for a loop that only calls the task, goes backward and steps its optimizer.

    Updates are counted by the optimizer's own steps, however many micro-batches make one. A shift that is due takes its
    images out of the batch: those it holds out are not trained on in that step. They are as the loop made them, mixed
    up and augmented, and come back in other epochs; `train.py` of this project has a held-out part of its own.

    Args:
        model: A supernet; what else is not named here is as for timm's `ClassificationTask`.
        settings: Default: those of the environment.
    """

    def __init__(self, model: nn.Module, criterion: Any = None, criterion_kwargs: dict[str, Any] | None = None,
                 device: torch.device | None = None, dtype: torch.dtype | None = None, verbose: bool = True,
                 settings: Settings | None = None) -> None:
        self.settings = settings = Settings.of_environment() if settings is None else settings
        config, space = settings.config, unwrap_model(model).space
        if config.shift != 'none' and any(p.dtype.itemsize < 4 for p in model.parameters()):
            raise ValueError(
                f"shift={config.shift!r} measures small differences, which weights of half precision do not have; use "
                "--amp in the place of --model-dtype, or shift='none'")
        width = None if settings.group_width is None else parse_count(settings.group_width, 'group_width')
        super().__init__(
            model, criterion, criterion_kwargs, config=config,
            generator=ArchitectureGenerator(space, seed=config.seed),
            groups=BudgetGroups.of_space(space, width=width, count=settings.num_groups),
            shift_batches=HeldOut(), device=device, dtype=dtype, verbose=verbose)
        if isinstance(self.criterion, JsdCrossEntropy):
            raise ValueError(
                'JsdCrossEntropy compares the splits of a batch, and ShiftNAS takes parts of a batch; leave out '
                '--jsd-loss or --loss jsd')
        self._fitted = False
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        """End an update when an optimizer of these weights has stepped: loops do not tell.

        A scaler that leaves a step out leaves the update out too; of steps within a step, or of two optimizers that
        share the weights, the first counts. What is told here keeps no task alive.
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
        self._follow_optimizers()  # a copy has steps of its own

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """As `ShiftNASTask.forward`, of the images that are not held out."""
        if not isinstance(input, Tensor):
            raise ValueError(
                f'a supernet takes batches of images, not of {type(input).__name__}; leave out --naflex-loader')
        if not self._fitted:
            self.generator.fit(steps=self.settings.generator_fit_steps, seed=self.config.seed, progress=self.verbose)
            self._fitted = True
            self._share_generator()
        if self._shift_is_due:
            input, target = self._hold_out(input, target)
        return super().forward(input, target)

    def _hold_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Put images of this batch by for the shift: the first for training losses, those in the middle held out.

        Mixup and cutmix of timm pair an image with the one as far from the other end of the batch: only the middle has
        all of its images from itself.
        """
        count = -(-self.settings.shift_images // self.ranks.size)
        left = (len(input) - count) // 2
        if left < 1 or 2 * left < count:
            most = [n for n in range(1, len(input)) if 2 * ((len(input) - n) // 2) >= n]
            hint = f'set {PREFIX}SHIFT_IMAGES={most[-1] * self.ranks.size} or less' if most else 'make batches larger'
            raise ValueError(f'a batch of {len(input)} images is too small to hold {count} out for a shift; {hint}')

        def everywhere(tensor: Tensor) -> Tensor:
            """All processes score groups on the same images, in the order that samplers deal them out in."""
            if self.ranks.size == 1:
                return tensor.detach().clone()
            return torch.stack(self.ranks.gather(tensor.detach().cpu()), 1).flatten(0, 1)

        middle = slice(left, len(input) - left)
        held_out = everywhere(input[middle]), everywhere(target[middle])
        input, target = (torch.cat([tensor[:left], tensor[middle.stop:]]) for tensor in (input, target))
        self._shift_batches.batches = (everywhere(input[:count]), everywhere(target[:count])), held_out
        return input, target

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """As `ShiftNASTask.get_task_state`; a scaler may have left out the step before."""
        state = super().get_task_state(module, ema)
        return dict(state, micro=self._micro, fitted=self._fitted) if state else {}

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """As `ShiftNASTask.load_task_state`."""
        super().load_task_state(state, strict, module, ema)
        if state and not ema:  # `train.py` fits before it makes its task, and saves after a step
            self._micro, self._fitted = state.get('micro', 0), state.get('fitted', True)


def create_task(model: nn.Module, criterion: Any = None, *, criterion_kwargs: dict[str, Any] | None = None,
                device: torch.device | None = None, verbose: bool = False, **settings: Any) -> StockTask:
    """A task for a loop of one's own: `task(images, targets)['loss']`, backward, and the optimizer's step.

    An optimizer that is none of torch's `Optimizer` must be followed by `task.end_update()`.

    Args:
        model: A supernet.
        criterion: Loss of (logits, targets); default is cross-entropy with `criterion_kwargs` of timm's
            `create_classification_loss`.
        device: Where the model is; default is the CPU.
        verbose: Log, and show the generator's fit.
        **settings: Names of `ShiftNASConfig` and `Settings`: `shift='hypergradient'`, `total_updates=10_000`, ...

    Raises:
        ValueError: If `model` is not a supernet or a setting is wrong.
    """
    if not is_supernet(model):
        raise ValueError(f'{type(model).__name__} is not a supernet; make one such as shiftformer_supernet')
    return StockTask(
        model, criterion, criterion_kwargs, device=device, verbose=verbose, settings=Settings.of(settings))
