"""The settings of ShiftNAS, each declared once: default, meaning, kind and range.

The flags of `train.py`, the variables of `timm_shiftnas.patch`, the arguments of `create_task` and the table in
`docs/training.md` are generated from these fields.
"""
from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from ..space.resources import NAMES
from ..utils.units import KINDS, parse_quantity

__all__ = ['RunConfig', 'Setting', 'ShiftNASConfig', 'default_interval', 'find_conflict', 'settings_of']

Spell = Callable[[str, Any], str]  # how a message names a setting with its value: shift='none', or --shift none


def setting(default: Any, help: str, *, flag: str | None = '', choices: tuple[str, ...] = (), least: float = -math.inf,
            above: float = -math.inf, most: float = math.inf, below: float = math.inf, metavar: str = '',
            unit: str = '') -> Any:
    """A dataclass field with all that the front ends need to know about it.

    Args:
        default: Default value.
        help: One line for `--help` and the docs; it describes the default where `default` is `None`.
        flag: Command-line flag. '' stands for the name with dashes; `None` for a value that the command line derives.
        choices: Allowed words.
        least, above, most, below: Range of a number: `least <= value <= most` and `above < value < below`.
        metavar: Placeholder of the value in `--help`.
        unit: What a number with k, M or G counts, as in '0.1G'; such a value stays as typed.
    """
    about = dict(help=help, flag=flag, choices=choices, least=least, above=above, most=most, below=below,
                 metavar=metavar, unit=unit)
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Setting:
    """One setting, as the front ends read it."""
    name: str
    default: Any
    kind: type  # type of the value, or of each item of a list
    count: int | None  # number of items: 1, 2 for a pair, None for a list of any length
    optional: bool  # whether None is allowed
    help: str
    flag: str | None
    choices: tuple[str, ...]
    least: float
    above: float
    most: float
    below: float
    metavar: str
    unit: str

    def convert(self, value: Any) -> Any:
        """Convert a value, or its text, to the type of this setting; lists become tuples.

        Raises:
            ValueError: If the value has another type or is out of range; the message says what is allowed.
        """
        if value is None and self.optional:
            return None
        if self.count == 1:
            return self.convert_item(value)
        if not isinstance(value, list | tuple) or self.count not in (None, len(value)):
            raise ValueError(f'must be {self.describe()}')
        return tuple(self.convert_item(item) for item in value)

    def convert_item(self, value: Any) -> Any:
        """Convert one item of a list, as `convert` does."""
        item = value if self.unit else self._parse(value)
        if not self._allows(item):
            raise ValueError(f'must be {self.describe()}')
        return item

    def _allows(self, item: Any) -> bool:
        """Whether an item has the right type and is in range."""
        if self.unit:
            for kind in KINDS:  # which one fits depends on the resource
                with suppress(ValueError):
                    return parse_quantity(item, kind, self.name) > 0
            return False
        if type(item) is not self.kind:
            return False
        if isinstance(item, int | float):
            return math.isfinite(item) and self.least <= item <= self.most and self.above < item < self.below
        return not self.choices or item in self.choices

    def _parse(self, value: Any) -> Any:
        """Read numbers from texts (YAML reads 1e-3 as a text), and whole numbers as floats where those are allowed."""
        if self.kind in (int, float) and isinstance(value, str):
            with suppress(ValueError):
                return self.kind(value)
            with suppress(ValueError):  # 1e2 and 5.0 are whole numbers, too
                number = float(value)
                return int(number) if number.is_integer() else number
        return float(value) if self.kind is float and type(value) is int else value

    def describe(self) -> str:
        """The allowed values in words, such as 'a whole number of 1 or more'."""
        none = ' or null' if self.optional else ''
        if self.count != 1:
            return f'{"two" if self.count == 2 else "one or more"} numbers{self._range()} in brackets{none}'
        if self.unit:
            return f"a number of {self.unit} such as '0.1G'{none}"
        if self.choices:
            return f'one of {", ".join(self.choices)}'
        kinds = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text'}
        return kinds[self.kind] + self._range() + none

    def _range(self) -> str:
        """The range of a number in words."""
        if self.kind not in (int, float):
            return ''
        if self.least > -math.inf:
            if self.most < math.inf:
                return f' from {self.least:g} to {self.most:g}'
            return f' from {self.least:g} to below {self.below:g}' if self.below < math.inf else (
                f' of {self.least:g} or more')
        low = f' above {self.above:g}' if self.above > -math.inf else ''
        if self.most < math.inf:
            return f'{low}, at most {self.most:g}'
        return f'{low} below {self.below:g}' if self.below < math.inf else low


def settings_of(config: type) -> Iterator[Setting]:
    """The settings of a dataclass whose fields are declared by `setting`, in order."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType):
            kind = next(option for option in get_args(kind) if option is not types.NoneType)
            optional = True
        count: int | None = 1
        if get_origin(kind) is tuple:
            items = get_args(kind)
            kind, count = items[0], None if ... in items else len(items)
        about = dict(field.metadata)
        if about['flag'] == '':
            about['flag'] = '--' + field.name.replace('_', '-')
        yield Setting(field.name, field.default, kind, count, optional, **about)


def as_keyword(name: str, value: Any) -> str:
    """Name a setting with its value as Python code does."""
    return f'{name}={value!r}'


def check(config: Any) -> None:
    """Raise a `ValueError` for the first setting of a config that is out of range."""
    for each in settings_of(type(config)):
        value = getattr(config, each.name)
        try:
            each.convert(value)
        except ValueError as error:
            raise ValueError(f'{as_keyword(each.name, value)} {error}') from None


@dataclass(frozen=True)
class ShiftNASConfig:
    """Settings of ShiftNAS: how archs are drawn, and how that is learned.

    Intervals and lengths count optimizer updates. The `help` of a field is its documentation; `python train.py --help`
    prints all of them.

    Raises:
        ValueError: If a value is out of range, or two settings exclude each other.
    """
    sampler: str = setting(
        'shiftnas', 'source of archs; uniform is the one-shot baseline: archs drawn uniformly, nothing learned',
        choices=('shiftnas', 'uniform', 'attentivenas_best_up', 'attentivenas_worst_up', 'focusformer', 'prenas'))
    sampler_candidates: int = setting(
        3, 'archs that attentivenas and focusformer compare with each other on a batch', least=2)
    archs_per_step: int = setting(1, 'archs trained on each batch; the loss is their mean', least=1)
    sandwich: bool = setting(
        False, 'each step trains the largest and the smallest arch among its archs (Yu & Huang, ICCV 2019)')
    inplace_distillation: bool = setting(
        False, 'with sandwich: after the warm-up the other archs learn from the predictions of the largest, and not '
        'from the targets')
    arch_per_rank: bool = setting(False, 'each process of a distributed run trains different archs')
    task_loss_weight: float | None = setting(
        None, 'with a teacher: weight of the loss on the targets (default: 1)', least=0)
    distill_loss_weight: float | None = setting(
        None, 'with a teacher: weight of the divergence from it (default: 1, or 1 minus a given task-loss-weight)',
        least=0)
    temperature: float = setting(
        4., 'softmax temperature of that divergence, which is scaled by its square (Hinton et al., 2015)', above=0,
        flag='--kd-temperature')
    warmup_sampler: str = setting(
        'generator', 'archs during warm-up: from the generator at uniform P, or uniform (the first step of the paper)',
        choices=('generator', 'uniform'))
    warmup_updates: int = setting(0, 'length of the warm-up, during which P stays uniform', least=0, flag=None)
    curriculum_updates: int = setting(
        0, 'length of the curriculum, over which the lowest budget falls from the largest to the smallest', least=0,
        flag=None)
    total_updates: int = setting(1, 'length of training, over which the temperature tau falls', least=1, flag=None)
    shift: str = setting(
        'none', 'signal of the probability shift; none keeps P uniform over the groups (default of train.py: '
        'hypergradient, where it can hold images out)',
        choices=('hypergradient', 'grad_norm', 'variation', 'none'))
    group_weights: tuple[float, ...] | None = setting(
        None, 'with shift none: P is proportional to these weights, one for each group (default: uniform)', least=0,
        metavar='W')
    shift_interval: int | None = setting(
        None, 'updates between two shifts of P (default: ten for each group, 100 or more)', least=1)
    shift_lr: float = setting(0.01, 'share of the way to its target that theta moves in a shift', above=0, most=1)
    shift_momentum: float = setting(0.8, 'decay of the moving averages of the signal', least=0, below=1)
    shift_floor: float = setting(0.2, 'share of P that is spread evenly over the groups', least=0, most=1)
    shift_epsilon: float = setting(
        1e-3, 'length of the finite difference of the hypergradient, in units of the weights', above=0, flag=None)
    generator_interval: int = setting(
        10, 'updates between two steps of the generator; 0: not trained after its fit', least=0)
    generator_images: int | None = setting(
        None, "images of a generator step, over all processes (default: an eighth of the batch, 2 to 32)", least=1)
    generator_lr: float = setting(1e-3, "learning rate of the generator's Adam", least=0, metavar='LR')
    resource_weight: float = setting(1000., "lambda, the weight of the resource term in the generator's loss", least=0)
    resource_batch: int = setting(64, 'budgets in the resource term', least=1)
    tau: tuple[float, float] = setting((1., .3), 'Gumbel temperature at the first and the last update', above=0)
    accum_steps: int | None = setting(
        1, 'micro-batches per update; null if unknown: the loop then calls end_update()', least=1, flag=None)
    seed: int = setting(0, 'seed of all random draws', flag=None)

    def __post_init__(self) -> None:
        check(self)
        if conflict := find_conflict(dataclasses.asdict(self), as_keyword):
            raise ValueError(conflict)

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of the loss on the targets and of the divergence from a teacher."""
        task, distill = self.task_loss_weight, self.distill_loss_weight
        if distill is None:
            distill = 1. if task is None else 1. - task
        return 1. if task is None else task, distill

    def images_for_generator(self, images: int) -> int:
        """Number of images of a micro-batch for the generator's task loss, over all processes.

        A part of the batch, because a masked network costs as much as the full one.
        """
        return self.generator_images or min(images // 8, 32)


def default_interval(groups: int) -> int:
    """Updates between two shifts. It grows with the number of groups, because a shift measures all of them."""
    return max(100, 10 * groups)


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run that are needed before its task is created.

    Raises:
        ValueError: If a value is out of range.
    """
    resource: str = setting(
        'macs', 'what budgets bound; latency needs --resource-file', choices=NAMES)
    resource_file: str | None = setting(
        None, 'device file that timm-shiftnas measure wrote, for the resource latency', metavar='FILE')
    num_groups: int | None = setting(None, 'number of budget groups, instead of their width', least=1)
    group_width: str | float | None = setting(
        None, "width of a budget group in MACs, such as '0.1G', or in the unit of the resource, such as '1ms' "
        '(default: 0.1G, but at least 8 groups; as many for other resources)', metavar='MACS', unit='MACs')
    generator_fit_steps: int = setting(
        1000, 'steps of the generator on the resource term before training, without images', least=0)
    shift_images: int = setting(
        32, 'training images of a shift, and as many held-out images, over all processes', least=1,
        flag='--shift-batch-size')

    def __post_init__(self) -> None:
        check(self)


def find_conflict(settings: Mapping[str, Any], spell: Spell) -> str | None:
    """Describe the first conflict between settings that are each in range; `None` if there is none.

    Args:
        settings: Values of a `ShiftNASConfig` by name.
        spell: How the message names a setting with its value.
    """
    archs = settings['archs_per_step']
    if settings['sandwich'] and archs < 3:
        return (f'{spell("archs_per_step", archs)} is too few: the sandwich rule needs at least 3 archs per step (the '
                f'largest, the smallest and others); give {spell("archs_per_step", 4)}')
    if settings['inplace_distillation'] and not settings['sandwich']:
        return (f'{spell("inplace_distillation", True)} needs the largest arch in every step; give '
                f'{spell("sandwich", True)} and {spell("archs_per_step", 4)}')
    if settings['curriculum_updates'] and settings['sampler'] != 'shiftnas':
        return (f'{spell("curriculum_updates", settings["curriculum_updates"])} narrows the budgets, and '
                f'{spell("sampler", settings["sampler"])} draws none; give {spell("sampler", "shiftnas")}')
    if settings['sampler'] == 'focusformer' and not settings['generator_interval']:
        return (f'{spell("sampler", "focusformer")} is a generator that learns, and {spell("generator_interval", 0)} '
                f'keeps it as it is; give {spell("generator_interval", 10)}')
    if settings['group_weights'] is not None and (settings['shift'] != 'none' or settings['sampler'] != 'shiftnas'):
        return (f'{spell("group_weights", settings["group_weights"])} fixes P and needs {spell("shift", "none")} and '
                f'{spell("sampler", "shiftnas")}; give both')
    return None
