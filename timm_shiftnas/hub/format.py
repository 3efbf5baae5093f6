"""The format of a model directory: file names, and `config.json` with its entry `timm_shiftnas`.

A directory holds timm's `config.json`, `model.safetensors` and, for a supernet, `generator.safetensors` and
`bn_stats.safetensors`. A config may come from anyone, so it is checked before a network is built from it. The type
annotations of `ModelRecord` are these checks: `fits` compares JSON data with them.
"""
from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypedDict

from timm.data.dataset_info import CustomDatasetInfo
from timm.models import build_model_with_cfg, create_model, is_model, model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..data.modes import MODES, default_mode
from ..models._meta import create_on_meta
from ..space import families, is_supernet
from ..space.resources import LATENCY, MACS, NAMES, PARAMS
from ..utils.json_types import fits, types_of
from ..utils.text import one_line

__all__ = [
    'Backbone', 'ModelRecord', 'build_network', 'check_tensors', 'device_file', 'device_name', 'saved_class_names',
]

KEY, FORMAT = 'timm_shiftnas', 1
CONFIG, WEIGHTS, GENERATOR = 'config.json', 'model.safetensors', 'generator.safetensors'
BN_STATS = 'bn_stats.safetensors'
FILES = {WEIGHTS, GENERATOR, BN_STATS}  # beside the config and device files; others are neither read nor published
DEVICES = 'device_*.json'  # with the name of the device
ONNX = 'model.onnx'  # of `extract --onnx`: it is not listed in the config, and neither read nor published

# Bounds far above any network in use: of widths, image sizes and classes; of depths (and their sum) and lengths; of the
# modules of a network; of the values of one choice, and of the padded table of all; of the generator; of config.json.
MAX_SIZE, MAX_DEPTH, MAX_MODULES, MAX_VALUES, MAX_TABLE = 1_000_000, 1_000, 10_000, 100, 50_000
MAX_HIDDEN, MAX_CONFIG = 1024, 10_000_000

Count = Annotated[int, lambda value: value >= 0]
Sha256 = Annotated[str, re.compile('[0-9a-f]{64}').fullmatch]
Generator = Annotated[dict[str, int], lambda args: 1 <= args.get('hidden_size', 0) <= MAX_HIDDEN]
Edges = Annotated[list[float], lambda edges: len(edges) > 1 and edges == sorted(set(edges))]
Probabilities = Annotated[list[float], lambda p: p and min(p) >= 0 and math.isclose(sum(p), 1, rel_tol=1e-3)]
Limits = Annotated[dict[str, float], lambda limits: {*limits} <= {MACS.keyword, PARAMS.keyword}]
Name = Annotated[str, NAMES.__contains__]
Mode = Annotated[str, MODES.__contains__]


def device_file(name: str) -> str:
    """The name of the file of a device.

    Raises:
        ValueError: If the device has a name that no file can have.
    """
    file = DEVICES.replace('*', name)
    if device_name(file) is None:
        raise ValueError(f'the device {short(name)} must have a name of at most 64 letters, digits, -, _ and .')
    return file


def device_name(file: str) -> str | None:
    """The device whose file this is; `None` if it is another file."""
    match = re.fullmatch(r'device_(\w[\w.-]{,63})\.json', file, re.ASCII)
    return match and match[1]


class SavedFile(TypedDict):
    size: Count
    sha256: Sha256


Files = Annotated[dict[str, SavedFile], lambda files: {WEIGHTS} <= {
    name for name in files if device_name(name) is None} <= FILES]


class _Row(TypedDict):
    """An evaluated subnet: a row of `evaluation.tables`."""
    name: str
    budget: float | None
    macs: float
    params: float
    arch: Any


class Row(_Row):
    """One of a classifier."""
    top1: float
    top5: float


class Score(_Row):
    """One of another task: the score, in percent, is what `training` calls `metric`."""
    score: float


class _Split(TypedDict):
    """Arguments of `split_held_out`."""
    share: float
    seed: int


class HeldOut(_Split, total=False):
    """The part of the training images that was not trained on, and the number of all of them."""
    images: int


class Training(TypedDict, total=False):
    """Facts about the training, for the model card and for a search.

    `task` is one of the Hub's, such as 'object-detection'.
    """
    command: str
    task: str
    metric: str
    dataset: str
    versions: dict[str, Any]
    held_out: HeldOut


class _Sizes(TypedDict, total=False):
    """A field that directories of earlier versions lack."""
    head_sizes: Annotated[list[Count], lambda numbers: len(numbers) == 4] | None


class Backbone(_Sizes):
    """How a model returns feature maps, and the network around it: `network` is the name of its class, if any.

    The network itself is code, which no file holds: whoever loads the model gives a function that builds it.
    """
    out_indices: list[int]
    norm: bool
    path: str  # name of the backbone in the network
    network: str | None
    head_macs: list[Count] | None
    head_params: list[Count] | None


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The entry `timm_shiftnas` of `config.json`: what timm does not know of a saved model.

    Empty values are not written.
    """
    format: Literal[1]
    kind: Literal['supernet', 'subnet']
    groups: Edges | None = None  # of the K budget groups, in MACs or the unit of `resource`
    resource: Name | None = None  # what the budgets of groups and generator bound, if it is not MACs
    device: str | None = None  # the device of a latency
    probabilities: Probabilities | None = None  # P, one for each group
    results: list[Row | Score] = field(default_factory=list)
    training: Training = field(default_factory=dict)  # type: ignore[assignment]
    searched: list[Any] = field(default_factory=list)  # archs that a search on images found, the least accurate first
    searched_limits: Limits = field(default_factory=dict)  # the limits of that search, if it had any
    generator: Generator | None = None
    stock: Any = None  # how timm builds a subnet without this package
    backbone: Backbone | None = None  # of detectors, segmenters, ...
    bn_archs: Annotated[list[Any], len] = field(default_factory=list)  # archs whose BatchNorm statistics were saved
    image_mode: Mode | None = None  # of the PIL images, if it is not timm's default
    upright: bool | None = None  # False: photographs are left as their pixels are stored
    files: Files

    @classmethod
    def of_config(cls, config: Any, where: str) -> ModelRecord:
        """Read the record of a config.

        Raises:
            ValueError: If `save_pretrained` cannot have written the config.
        """
        _refuse(_problems(config), where)
        return cls(**_given(config[KEY]))

    @property
    def network(self) -> str | None:
        """The class of a network around a backbone, if it is one; whoever loads it gives its code."""
        return self.backbone and self.backbone['network']

    @property
    def metric(self) -> str:
        """What the first percentage of the results is."""
        return 'top-1 accuracy' if self.backbone is None else self.training.get('metric', 'score')


def _refuse(problems: Iterator[str], where: str) -> None:
    """Raise a `ValueError` with the first problem of the file `where`, if it has one."""
    if problem := next(problems, None):
        raise ValueError(f'{where} {problem}')


def _given(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries without those that are null, which are as good as missing."""
    return {name: value for name, value in entries.items() if value is not None}


def _problems(config: Any) -> Iterator[str]:
    """The faults of a config. Each check relies on those before it, so only the first fault is of use."""
    if not isinstance(config, dict) or not isinstance(config.get(KEY), dict):
        yield f'has no {KEY!r} entry: the model was not saved by timm_shiftnas; load it with timm.create_model'
    ours = config[KEY]
    version, types = ours.get('format'), types_of(ModelRecord)
    if isinstance(version, int) and version > FORMAT:
        yield (f'has format {version}, but this timm_shiftnas reads formats up to {FORMAT}; '
               'upgrade it: pip install -U timm_shiftnas')
    for name in sorted(set(ours) - set(types)):
        yield f'has an unknown entry {KEY}.{name}; this timm_shiftnas writes no such entry'
    present = {'format', 'kind', 'files', *_given(ours)}
    wrong = [name for name, kind in types.items() if name in present and not fits(ours.get(name), kind)]
    for name in wrong or _contradictions(ModelRecord(**_given(ours))):
        yield f'has an unusable entry {KEY}.{name}: {short(ours.get(name))}'
    yield from _network_problems({'model_args': None, 'pretrained_cfg': None, **config})


def _contradictions(record: ModelRecord) -> list[str]:
    """Names of entries that do not agree with the others."""
    files = record.files
    wrong = dict(
        probabilities=record.probabilities is not None and len(record.probabilities) + 1 != len(record.groups or ()),
        generator=(GENERATOR in files) != (record.generator is not None),
        device=(record.device is not None) != (record.resource == LATENCY.name) or (
            record.device is not None and f'device_{record.device}.json' not in files),
        bn_archs=(BN_STATS in files) != bool(record.bn_archs))
    return [name for name in wrong if wrong[name]]


def _network_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """The faults of the entries that a network is built from."""
    name = config.get('architecture')
    if not isinstance(name, str) or not is_model(name):
        yield f'names an unknown architecture {short(name)}; import the module that registers it, if it is yours'
    registered = [model for family in families() for model in (family.supernet, family.subnet) if is_model(model)]
    if model_entrypoint(name).__module__ not in {model_entrypoint(model).__module__ for model in registered}:
        yield (f'names the architecture {name!r}, which is not of timm_shiftnas or of the module of a registered '
               'Family; load it with timm.create_model')
    for entry in ('model_args', 'pretrained_cfg'):
        if not isinstance(config.get(entry, {}), dict):
            yield f'has an unusable entry {entry}: {short(config[entry])}'
    yield from _oversized({name: config.get(name) for name in ('model_args', 'pretrained_cfg', 'num_classes')})
    # arguments of timm's factory could fetch other weights than those that are checked
    factory = {*inspect.signature(create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    for name in sorted(factory & set(config.get('model_args', {}))):
        yield f'has model_args.{name}, which is not an argument of a network'


def _oversized(config: Mapping[str, Any]) -> Iterator[str]:
    """Numbers and lists that are larger than any network needs."""
    pending, layers = [(name, value, MAX_DEPTH) for name, value in config.items()], 0
    while pending:
        name, value, longest = pending.pop()
        is_depth = str(name).startswith('depth')
        limit = MAX_DEPTH if is_depth else MAX_SIZE
        if isinstance(value, Mapping):
            longest = MAX_VALUES if name == 'space' else longest
            pending += [(*item, longest) for item in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(name, item, longest) for item in value]
            if len(value) > longest:
                yield f'has {len(value):,} values of {name}; at most {longest:,} are loaded'
        elif isinstance(value, (int, float)):
            if not abs(value) <= limit:  # 'not': NaN compares false
                yield f'asks for {name}={short(value)}; at most {limit:,} is loaded'
            layers += value if is_depth else 0
    if layers > 2 * MAX_DEPTH:
        yield f'asks for depths that add up to {layers:,}; at most {2 * MAX_DEPTH:,} are loaded'


def build_network(config: Mapping[str, Any], where: str) -> nn.Module:
    """The network of a config, on the meta device: it needs no memory, even with absurd shapes.

    Args:
        config: `architecture`, `model_args` and, if known, the other entries of a `config.json`.
        where: Name of the file in error messages.

    Raises:
        ValueError: If the network is not one of this package or of a registered family, or far too large.
    """
    _refuse(_network_problems(config), where)
    labels = {name: config[name] for name in ('num_classes', 'label_names', 'label_descriptions') if name in config}
    cfg = dict(config['pretrained_cfg'], **labels) if 'pretrained_cfg' in config else None
    try:
        with register_module_module_registration_hook(_at_most_modules()):
            net = create_on_meta(config['architecture'], pretrained_cfg=cfg, **config['model_args'])
        problem = next(_contents_problems(net, config), None)
    except Exception as error:  # timm raises many types; the config is always the cause
        problem = f'does not describe a network ({type(error).__name__}: {one_line(error)})'
    if problem:
        raise ValueError(f'{where} {problem}')
    saved = config.get(KEY, {})
    net.image_mode = saved.get('image_mode') or default_mode(getattr(net, 'in_chans', 3))
    net.upright = saved.get('upright') is not False
    return net


def _at_most_modules() -> Callable[..., None]:
    """A hook that refuses `MAX_MODULES` modules, whatever the name of the argument that asks for so many."""
    count = itertools.count(1)

    def refuse(*_: Any) -> None:
        if next(count) > MAX_MODULES:
            raise ValueError(f'it has more than {MAX_MODULES:,} modules')

    return refuse


def _contents_problems(net: nn.Module, config: Mapping[str, Any]) -> Iterator[str]:
    """The faults of a network that was built."""
    found = 'supernet' if is_supernet(net) else 'subnet'
    saved = config.get(KEY, dict(kind=found, files={}))
    if saved['kind'] != found or found == 'subnet' and not hasattr(net, 'arch'):
        yield f'has the kind {saved["kind"]}, but {config["architecture"]!r} is not a {saved["kind"]}'
    if found == 'subnet' and (others := {GENERATOR, BN_STATS} & {*saved['files']}):
        yield f'lists {others.pop()}, a file of supernets, and {config["architecture"]!r} is a subnet'
    values = [len(choice.values) for choice in net.space.choices] if found == 'supernet' else [1]
    if len(values) * max(values) > MAX_TABLE:
        yield f'describes {len(values):,} choices of up to {max(values):,} values: too many'


def saved_class_names(config: Mapping[str, Any], num_classes: int, where: str) -> dict[int, str]:
    """Names of the classes of a saved network, by index; empty if it was saved without them.

    Raises:
        ValueError: If timm cannot use the names, or a class does not exist.
    """
    names = config.get('label_names') or config['pretrained_cfg'].get('label_names')
    if not names:
        return {}
    try:
        info = CustomDatasetInfo(names)
        named = {index: info.index_to_label_name(index) for index in info.label_indices() if index < num_classes}
        if len(named) < len(names):
            raise ValueError(f'a network of {num_classes} classes cannot have all of these {len(names)} names')
        return named
    except (TypeError, ValueError) as error:
        raise ValueError(f'{where} has an unusable entry label_names: {one_line(error, 200)}') from None


def check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a `ValueError` unless `tensors` can be computed with and fit the `expected` ones.

    They need the same names, shapes and kinds of numbers. All that are not integers have one type, of 16 bits or more,
    and are finite.
    """
    _refuse(_misfits(expected, tensors), where)


def _misfits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    own, given = ({
        name: ('float' if x.is_floating_point() else 'complex' if x.is_complex() else 'int', *x.shape)
        for name, x in state.items()} for state in (expected, tensors))
    for name in own | given:
        if own.get(name) != given.get(name):
            yield (f'does not belong to the network in {CONFIG}: {name} is {given.get(name, "missing")} in the file '
                   f'and {own.get(name, "missing")} in the network')
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    types = {x.dtype: name for name, x in floats.items()}
    if len(types) > 1 or any(dtype.itemsize < 2 for dtype in types):
        found = ', '.join(f'{name} is {str(dtype).removeprefix("torch.")}' for dtype, name in types.items())
        yield f'has weights that do not compute together: {found}; save them all as float32'
    for name, x in floats.items():
        if not x.isfinite().all():
            yield f'has values of {name} that are NaN or infinite; save weights that trained well'
