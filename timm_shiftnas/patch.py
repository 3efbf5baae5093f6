"""ShiftNAS in training loops that know nothing of it: timm's own script, forks of it, loops of one's own.

    python train.py --device-modules timm_shiftnas.patch --model shiftformer_tiny_supernet ...

is timm's script, unmodified. Importing this module makes the `ClassificationTask` of a supernet a `StockTask`; what
timm does with every other model stays as it is. Settings come from the environment or from a YAML file, under the names
of `ShiftNASConfig` and `Settings`:

    SHIFTNAS_CONFIG=shiftnas.yaml SHIFTNAS_SHIFT=hypergradient SHIFTNAS_TOTAL_UPDATES=375000 python train.py ...

A script saves its checkpoints with the state of the task, and resumes with it; `timm-shiftnas convert CHECKPOINT DIR`
makes a model directory of one. In a loop of one's own, `create_task` does without the environment.

The one module that changes something in timm. It does so in `TrainingTask.__new__`, because scripts import the names of
classes before they import this module: only the classes themselves can still be told.
"""
from __future__ import annotations

import dataclasses
import inspect
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .complexity import parse_count
from .generator import ArchitectureGenerator
from .sampling import BudgetGroups
from .task import ShiftNASConfig, ShiftNASTask

__all__ = ['Settings', 'StockTask', 'create_task']

PREFIX = 'SHIFTNAS_'
# of what this module relies on, the parameters in the versions of timm that it knows
KNOWN = {
    'ClassificationTask.__init__': 'self model criterion criterion_kwargs device dtype verbose',
    'ClassificationTask.forward': 'self input target',
    'ClassificationTask.prepare_distributed': 'self device_ids ddp_kwargs',
    'ClassificationTask.compile': 'self backend mode compile_kwargs',
    'TrainingTask.__init__': 'self device dtype verbose',
    'TrainingTask.get_trainable_module': 'self ema',
    'TrainingTask.get_eval_model': 'self module ema',
    'TrainingTask.setup_ema': 'self decay use_warmup device kwargs',
    'TrainingTask.update_ema': 'self step',
    'TrainingTask.get_task_state': 'self module ema',
    'TrainingTask.load_task_state': 'self state strict module ema',
    'TrainingTask.get_checkpoint_state': 'self ema unwrap_fn',
    'TrainingTask.load_checkpoint_state': 'self state_dict task_state ema strict',
    'TrainingTask.no_sync': 'self',
}


# -- settings ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a loop does not say, beside the fields of `ShiftNASConfig` (all but `accum_steps`, which is found out).

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

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Settings by name, checked.

        Raises:
            ValueError: If a name is unknown or a value is of another kind than its default.
        """
        fields = {field.name: field for field in dataclasses.fields(ShiftNASConfig) if field.name != 'accum_steps'}
        own = {field.name: field for field in dataclasses.fields(cls) if field.name != 'config'}
        checked = {}
        for name, value in given.items():
            field = fields.get(name) or own.get(name)
            if field is None:
                raise ValueError(
                    f'ShiftNAS has no setting {name!r}; choose from {", ".join(sorted([*fields, *own]))}')
            checked[name] = _checked(name, value, field.default)
        if 'total_updates' not in checked:
            first = checked.get('tau', ShiftNASConfig.tau)[0]
            checked['tau'] = (first, first)
        checked.setdefault('warmup_updates', checked.get('total_updates', 0) // 10)
        config = ShiftNASConfig(
            accum_steps=None, **{name: value for name, value in checked.items() if name in fields})
        return cls(config, **{name: value for name, value in checked.items() if name in own})

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Settings of `SHIFTNAS_NAME` variables over those of the YAML file that `SHIFTNAS_CONFIG` names.

        Raises:
            ValueError: If there is no such file, or as `of`.
        """
        environment = os.environ if environment is None else environment
        given: dict[str, Any] = {}
        if path := environment.get(f'{PREFIX}CONFIG'):
            try:
                given = yaml.safe_load(Path(path).read_text()) or {}
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f'{PREFIX}CONFIG: cannot read {path!r}: {" ".join(str(error).split())}') from None
            if not isinstance(given, dict):
                raise ValueError(f'{PREFIX}CONFIG: {path!r} must hold "name: value" lines, such as "shift: none"')
        for name, text in environment.items():
            if name.startswith(PREFIX) and name != f'{PREFIX}CONFIG':
                given[name.removeprefix(PREFIX).lower()] = yaml.safe_load(text)
        return cls.of(**given)


def _checked(name: str, value: Any, default: Any) -> Any:
    """A setting as its default is: numbers as numbers, lists as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(float(item) for item in value)
    wanted = {bool: bool, int: int, float: (int, float), str: str}.get(type(default), object)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        if isinstance(default, float) and isinstance(value, str):  # YAML reads 1e-3 as a string
            try:
                return float(value)
            except ValueError:
                pass
        raise ValueError(f'the ShiftNAS setting {name}={value!r} must be of the kind of its default, {default!r}')
    return value


# -- the task ----------------------------------------------------------------------------------------------------------


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
            shift_batches=lambda number: self._carved, device=device, dtype=dtype, verbose=verbose)
        self._fitted = False
        self._carved: Any = None
        # a loop does not tell when its optimizer has stepped; a scaler that leaves a step out leaves an update out
        own, task = {id(p) for p in model.parameters()}, weakref.ref(self)

        def stepped(optimizer: Optimizer, *_: Any) -> None:
            if any(id(p) in own for group in optimizer.param_groups for p in group['params']):
                task().end_update()

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """As `ShiftNASTask.forward`, of the images that are not held out."""
        if not self._fitted:
            self.generator.fit(steps=self.settings.generator_fit_steps, seed=self.config.seed, progress=self.verbose)
            self._fitted = True
        if self._shift_is_due:
            input, target = self._hold_out(input, target)
        return super().forward(input, target)

    def _hold_out(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Put images of this batch by for the shift: the first for training losses, the last for held-out ones."""
        count = -(-self.settings.shift_images // self.ranks.size)
        if len(input) < 2 * count:
            raise ValueError(
                f'a batch of {len(input)} images is too small to hold {count} out for a shift; set '
                f'{PREFIX}SHIFT_IMAGES={len(input) // 2 * self.ranks.size} or less')

        def everywhere(tensor: Tensor) -> Tensor:  # all processes score groups on the same images
            return torch.cat(self.ranks.gather(tensor.cpu())) if self.ranks.size > 1 else tensor

        parts = slice(None, count), slice(-count, None)
        self._carved = tuple(
            (everywhere(input[part].detach().clone()), everywhere(target[part].clone())) for part in parts)
        return input[:-count], target[:-count]

    def load_task_state(self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
                        ema: bool = False) -> None:
        """As `ShiftNASTask.load_task_state`; a loaded generator needs no fit."""
        super().load_task_state(state, strict, module, ema)
        self._fitted = self._fitted or bool(state and not ema)


def create_task(model: nn.Module, criterion: Any = None, *, criterion_kwargs: dict[str, Any] | None = None,
                device: torch.device | None = None, verbose: bool = False, **settings: Any) -> StockTask:
    """A task for a loop of one's own: `task(images, targets)['loss']`, backward, and the optimizer's step.

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
    if not _is_supernet(model):
        raise ValueError(f'{type(model).__name__} is not a supernet; make one such as shiftformer_supernet')
    return StockTask(
        model, criterion, criterion_kwargs, device=device, verbose=verbose, settings=Settings.of(**settings))


# -- timm --------------------------------------------------------------------------------------------------------------


def _is_supernet(model: Any) -> bool:
    return isinstance(model, nn.Module) and hasattr(unwrap_model(model), 'build_subnet')


def _dispatch(cls: type[TrainingTask], *args: Any, **kwargs: Any) -> TrainingTask:
    """In the place of `TrainingTask.__new__`: the task of a supernet is ours."""
    model = args[0] if args else kwargs.get('model', kwargs.get('student_model'))
    if not _is_supernet(model) or issubclass(cls, ShiftNASTask):
        return object.__new__(cls)
    if cls is ClassificationTask:
        return object.__new__(StockTask)
    raise ValueError(
        f'{cls.__name__} does not train supernets: leave out the flags that ask for it (distillation, multi-label); '
        'train.py of timm_shiftnas distils by --kd-model and --inplace-distillation')


def _install() -> None:
    """Tell timm, if it is one that this module knows.

    Raises:
        ImportError: If it is not.
    """
    classes = dict(ClassificationTask=ClassificationTask, TrainingTask=TrainingTask)
    for name, known in KNOWN.items():
        owner, _, method = name.partition('.')
        function = getattr(classes[owner], method, None)
        found = '' if function is None else ' '.join(inspect.signature(function).parameters)
        if found != known:
            raise ImportError(
                f'timm_shiftnas.patch does not know timm {timm.__version__}: {name} takes ({found or "it is gone"}) '
                f'and not ({known}); train with train.py of timm_shiftnas, or with timm 1.0.31')
    if TrainingTask.__new__ is not object.__new__ or ClassificationTask.__new__ is not object.__new__:
        raise ImportError(
            f'timm_shiftnas.patch does not know timm {timm.__version__}, whose tasks have a __new__ already; train '
            'with train.py of timm_shiftnas, or with timm 1.0.31')
    TrainingTask.__new__ = staticmethod(_dispatch)


_install()
