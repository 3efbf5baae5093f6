"""Search spaces and architectures.

A *search space* is the ordered, named choices of a supernet, each an ordered tuple of values, smallest first. An *arch*
is one value for every choice that is active in it. Both are plain frozen data: they hash, compare, copy, and go to JSON
and back. Nothing here knows a network; `complexity` reads MACs and parameters off a space, `models` builds networks.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import make_divisible

__all__ = ['Arch', 'Choice', 'SearchSpace', 'shiftformer_space', 'shiftmobilenet_space', 'space_from_dict']

Value = int | float


class Arch:
    """One architecture: an immutable record of a search space's fields.

    A field chosen once is a number (`arch.embed_dim == 192`), a field chosen per layer a tuple with one entry for each
    *active* layer (`arch.num_heads == (3, 4, 3)`). Layers beyond the depth carry no choice, so two archs are equal, and
    hash alike, exactly when they mean the same subnet. Make archs with `SearchSpace.arch`, which validates.
    """

    def __init__(self, **fields: Value | tuple[Value, ...]) -> None:
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'an Arch is immutable; make another one with space.arch({name}={value!r}, ...)')

    def __delattr__(self, name: str) -> None:
        raise AttributeError('an Arch is immutable')

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arch) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.__dict__.items())))

    def __repr__(self) -> str:
        return f'Arch({", ".join(f"{k}={v!r}" for k, v in self.__dict__.items())})'

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data; `SearchSpace.from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.__dict__.items()}


@dataclass(frozen=True)
class Choice:
    """One decision of a search space.

    Args:
        name: The arch field that the decision belongs to.
        values: What may be chosen, smallest first.
        layer: Position in a per-layer field; `None` for a field that is chosen once.
        gate: Index, in `SearchSpace.choices`, of an earlier depth choice that decides whether this layer exists.
            `None`: always active.
        min_depth: The choice is active when that depth is at least this.
    """
    name: str
    values: tuple[Value, ...]
    layer: int | None = None
    gate: int | None = None
    min_depth: int = 0

    @property
    def label(self) -> str:
        return self.name if self.layer is None else f'{self.name}[{self.layer}]'


@dataclass(frozen=True)
class SearchSpace:
    """The ordered choices of a supernet, optionally bound to the geometry that MACs and parameters depend on.

    Args:
        family: Which arithmetic in `complexity` applies ('shiftformer' or 'shiftmobilenet').
        fields: `(name, values)` pairs as given by the user: what `to_dict` writes. Values are a tuple or, where every
            layer has values of its own, a tuple of them.
        choices: Every decision, in the order in which the architecture generator takes them.
        structure: `(name, value)` pairs of what is fixed in the networks of the space (strides, activations, ...).
        frozen_geometry: Sorted `(name, value)` pairs (image size, classes, ...), or `None` while unbound; use `bind`.
    """
    family: str
    fields: tuple[tuple[str, tuple[Any, ...]], ...]
    choices: tuple[Choice, ...] = field(repr=False)
    structure: tuple[tuple[str, Any], ...] = ()
    frozen_geometry: tuple[tuple[str, Any], ...] | None = None

    # -- archs ---------------------------------------------------------------------------------------------------------

    def arch(self, /, **fields: Value | Sequence[Value]) -> Arch:
        """Make a validated arch; a scalar given for a per-layer field goes to every layer.

        Per-layer sequences have one value per active layer (values beyond the depth are dropped when the sequence
        covers the deepest network).

        Raises:
            ValueError: If a field is missing or unknown, or a value is not in the space.
        """
        names = list(dict.fromkeys(choice.name for choice in self.choices))
        if unknown := [name for name in fields if name not in names]:
            raise ValueError(f'arch has no field {unknown[0]!r}; the fields of this space are {", ".join(names)}')
        picked: list[Value | None] = []  # per choice
        for choice in self.choices:
            if choice.gate is not None and picked[choice.gate] < choice.min_depth:
                picked.append(None)
                continue
            given = fields.get(choice.name)
            if choice.name not in fields:
                if any(len(other.values) > 1 for other in self.choices if other.name == choice.name):
                    raise ValueError(f'arch field {choice.name!r} is missing; give one of {self.values(choice.name)}')
                given = choice.values[0]
            elif choice.layer is not None and isinstance(given, Sequence) and not isinstance(given, str):
                before = sum(p is not None for p, other in zip(picked, self.choices) if other.name == choice.name)
                full = len(given) == sum(other.name == choice.name for other in self.choices)
                # a wrong length is told below
                given = given[choice.layer] if full else given[before] if before < len(given) else choice.values[0]
            picked.append(_pick(choice, given))
        for name, given in fields.items():
            mine = [i for i, choice in enumerate(self.choices) if choice.name == name and choice.layer is not None]
            active = sum(picked[i] is not None for i in mine)
            if mine and isinstance(given, Sequence) and not isinstance(given, str) and len(given) not in (
                    active, len(mine)):
                raise ValueError(
                    f'{name} has {len(given)} values for {active} layers; give one per layer or a scalar')
        chosen: dict[str, Any] = {}
        for choice, value in zip(self.choices, picked):
            if choice.layer is None:
                chosen[choice.name] = value
            elif value is not None:
                chosen[choice.name] = (*chosen.get(choice.name, ()), value)
        return Arch(**chosen)

    def from_dict(self, fields: Mapping[str, Any]) -> Arch:
        """The arch that `Arch.to_dict` wrote, validated against this space."""
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise ValueError(f'expected a dict of arch fields, got {fields!r}')
        return self.arch(**fields)

    def validate(self, arch: Arch) -> None:
        """Raise a `ValueError` that names the first field of `arch` that is not in this space."""
        self.encode(arch)

    def values(self, name: str) -> tuple[Value, ...]:
        """The allowed values of one field, smallest first; where layers have values of their own, a tuple of those."""
        return dict(self.fields)[name]

    @property
    def smallest(self) -> Arch:
        return self.decode([0] * len(self.choices))

    @property
    def largest(self) -> Arch:
        return self.decode([len(choice.values) - 1 for choice in self.choices])

    @property
    def size(self) -> int:
        """The number of distinct archs."""
        gates = {choice.gate for choice in self.choices if choice.gate is not None}
        size = math.prod(
            len(choice.values) for i, choice in enumerate(self.choices) if choice.gate is None and i not in gates)
        for gate in gates:
            gated = [choice for choice in self.choices if choice.gate == gate]
            size *= sum(
                math.prod(len(choice.values) for choice in gated if depth >= choice.min_depth)
                for depth in self.choices[gate].values)
        return size

    def sample(self, generator: torch.Generator) -> Arch:
        """Draw an arch as AutoFormer does: depth first, then each active choice independently and uniformly.

        This is *not* uniform over the set of archs: each depth is equally likely, however many archs it has.
        """
        if not isinstance(generator, torch.Generator):
            raise ValueError(f'sample needs a torch.Generator, got {generator!r}; try torch.Generator().manual_seed(0)')
        gates = sorted({choice.gate for choice in self.choices if choice.gate is not None})
        indices = [0] * len(self.choices)
        for i in gates:
            indices[i] = _draw(self.choices[i], generator)
        for i, choice in enumerate(self.choices):
            if i not in gates and (choice.gate is None or self._depth(choice, indices) >= choice.min_depth):
                indices[i] = _draw(choice, generator)
        return self.decode(indices)

    # -- encodings -----------------------------------------------------------------------------------------------------

    def encode(self, arch: Arch) -> list[int]:
        """Index of the chosen value for every choice, in order; 0 where the choice is inactive.

        Raises:
            ValueError: If `arch` is not in this space.
        """
        if not isinstance(arch, Arch):
            raise ValueError(f'expected an Arch, got {arch!r}; make one with space.arch(...) or space.from_dict(...)')
        try:
            indices = self._indices(arch.__dict__)
            if self.decode(indices) == arch:
                return indices
        except (KeyError, IndexError, TypeError, ValueError):
            pass
        self.arch(**arch.__dict__)  # the slow way, whose errors name the field
        raise ValueError(f'{arch} is not as space.arch(...) makes it: one value per layer up to its depth, in tuples')

    def _indices(self, fields: Mapping[str, Any]) -> list[int]:
        indices: list[int] = []
        taken = dict.fromkeys(fields, 0)  # values read so far of every per-layer field
        for choice in self.choices:
            given = fields[choice.name]
            if choice.layer is None:
                indices.append(choice.values.index(given))
            elif choice.gate is None or self._depth(choice, indices) >= choice.min_depth:
                indices.append(choice.values.index(given[taken[choice.name]]))
                taken[choice.name] += 1
            else:
                indices.append(0)
        return indices

    def decode(self, indices: Sequence[int]) -> Arch:
        """Inverse of `encode`; indices of inactive choices are ignored."""
        chosen: dict[str, Any] = {}
        for choice, index in zip(self.choices, indices, strict=True):
            if choice.layer is None:
                chosen[choice.name] = choice.values[index]
            elif choice.gate is None or self._depth(choice, indices) >= choice.min_depth:
                chosen[choice.name] = (*chosen.get(choice.name, ()), choice.values[index])
        return Arch(**chosen)

    def one_hot(self, archs: Arch | Iterable[Arch]) -> tuple[torch.Tensor, ...]:
        """Encode archs as one float64 tensor per choice, of shape [number of values] or [N, number of values]."""
        single = isinstance(archs, Arch)
        indices = [self.encode(arch) for arch in ([archs] if single else archs)]
        indices = torch.tensor(indices, dtype=torch.long).view(len(indices), len(self.choices))
        return self.one_hot_of_indices(indices[0] if single else indices)

    def one_hot_of_indices(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One-hots of choice indices, shape [..., number of choices], as `encode` gives them."""
        return tuple(
            F.one_hot(column, len(choice.values)).double()
            for choice, column in zip(self.choices, indices.unbind(-1), strict=True))

    def _depth(self, choice: Choice, indices: Sequence[int]) -> int:
        """The depth that decides whether a choice is active."""
        return self.choices[choice.gate].values[indices[choice.gate]]

    # -- geometry ------------------------------------------------------------------------------------------------------

    def bind(self, **geometry: Any) -> SearchSpace:
        """A copy of the space that carries the geometry of a network (replacing what was bound before)."""
        frozen = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in geometry.items()))
        return replace(self, frozen_geometry=frozen)

    def unbind(self) -> SearchSpace:
        """A copy of the space without geometry."""
        return replace(self, frozen_geometry=None)

    @property
    def is_bound(self) -> bool:
        return self.frozen_geometry is not None

    @property
    def geometry(self) -> dict[str, Any]:
        """Image size, patch size, classes and whatever else MACs and parameters depend on.

        Raises:
            ValueError: If the space is not bound to a network.
        """
        if self.frozen_geometry is None:
            raise ValueError(
                'this search space is not bound to a network, so MACs and parameters are undefined; '
                "use the `space` of a model, as in timm.create_model('shiftformer_tiny_supernet').space")
        return dict(self.frozen_geometry)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of the space (and of its geometry, when bound); `space_from_dict` is the inverse."""
        data: dict[str, Any] = {'family': self.family}
        data |= {name: _lists(value) for name, value in (*self.fields, *self.structure)}
        if self.frozen_geometry is not None:
            data['geometry'] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.frozen_geometry}
        return data


def shiftformer_space(
        embed_dim: Sequence[int],
        depth: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: Sequence[float],
) -> SearchSpace:
    """The space of an elastic ViT (AutoFormer, Chen et al., ICCV 2021): width and depth, and per layer heads and MLP.

    Args:
        embed_dim: Token widths.
        depth: Numbers of layers.
        num_heads: Attention heads of a layer, each 64 channels wide.
        mlp_ratio: MLP hidden width of a layer, as a multiple of `embed_dim`: `int(embed_dim * mlp_ratio)`.

    Raises:
        ValueError: If a field is empty, not positive or not increasing, or if two choices give the same network.
    """
    fields = (
        ('embed_dim', _values('embed_dim', embed_dim, int)),
        ('depth', _values('depth', depth, int)),
        ('num_heads', _values('num_heads', num_heads, int)),
        ('mlp_ratio', _values('mlp_ratio', mlp_ratio, float)),
    )
    values = dict(fields)
    for dim in values['embed_dim']:
        hidden = [int(dim * ratio) for ratio in values['mlp_ratio']]
        if len(set(hidden)) < len(hidden) or hidden[0] < 1:
            raise ValueError(
                f'mlp_ratio={values["mlp_ratio"]} gives the hidden widths {hidden} at embed_dim={dim}; '
                'they must be positive and differ: choose ratios further apart')
    choices = [Choice('embed_dim', values['embed_dim']), Choice('depth', values['depth'])]
    for layer in range(values['depth'][-1]):
        choices.append(Choice('num_heads', values['num_heads'], layer, gate=1, min_depth=layer + 1))
        choices.append(Choice('mlp_ratio', values['mlp_ratio'], layer, gate=1, min_depth=layer + 1))
    return SearchSpace('shiftformer', fields, tuple(choices))


def shiftmobilenet_space(
        resolution: Sequence[int],
        width: Sequence[Sequence[int]],
        depth: Sequence[int] | Sequence[Sequence[int]],
        kernel_size: Sequence[int] | Sequence[Sequence[int]],
        expand_ratio: Sequence[float] | Sequence[Sequence[float]],
        *,
        per_block: bool = False,
        stem_block: bool = False,
        stride: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        se: bool | Sequence[bool] = True,
        act: str | Sequence[str] = 'swish',
        head: str = 'plain',
        shortcut: str = 'projection',
        kernel: str = 'crop',
) -> SearchSpace:
    """The space of an elastic MobileNet: a stem of stride 2, stages of inverted residual blocks, a last convolution.

    The defaults of what is fixed are those of BigNAS (Yu et al., ECCV 2020); AttentiveNAS (Wang et al., CVPR 2021) and
    Once-for-all (Cai et al., ICLR 2020) are other values of the same arguments. Fields of the arch: `resolution`, and
    per stage `width` (stem, stages and last convolution), `depth`, `kernel_size` and `expand_ratio`.

    Args:
        resolution: Input heights and widths, multiples of 4.
        width: Channels of the stem, of each stage's output and of the last convolution, multiples of 8.
        depth: Numbers of blocks, the same in every stage, or for each stage.
        kernel_size: Kernel sizes of the depthwise convolutions, odd; the same in every stage, or for each stage.
        expand_ratio: Width inside a block as a multiple of what comes in, rounded to a multiple of 8; the same in every
            stage, or for each stage. A stage whose only ratio is 1 has no expanding convolution.
        per_block: Every block has a kernel size and an expand ratio of its own (OFA) instead of its stage's.
        stem_block: One more block after the stem, of a fixed depth, kernel size 3, ratio 1 and no SE (OFA); `width`
            then has an entry for it after that of the stem.
        stride: Stride of the first block of each stage.
        se: Squeeze-and-excitation of a quarter of the channels, in all stages or for each.
        act: Activation, everywhere or for each entry of `width`.
        head: 'plain': the last convolution, with BatchNorm, before pooling; 'efficient': as MobileNetV3, expansion by 6
            before and the last convolution, without BatchNorm, after pooling.
        shortcut: 'identity': past blocks that keep width and size; 'projection': past all blocks, where needed through
            2x2 average pooling and a 1x1 convolution (AttentiveNAS).
        kernel: 'crop': smaller kernels are the centre of larger ones; 'transform': after a learned matrix (OFA).

    Raises:
        ValueError: If a field is not as described, or if two choices give the same network.
    """
    if not isinstance(stem_block, bool):
        raise ValueError(f'stem_block={stem_block!r} must be True or False')
    stages = len(width) - 2 - stem_block if isinstance(width, Sequence) else 0
    if stages < 1 or not all(isinstance(values, (list, tuple)) for values in width):
        raise ValueError(
            f'width={width!r} must hold the choices of the stem, of each stage and of the last convolution, as in '
            '[[16, 24], [24, 32], [64]] for one stage')

    def each(name: str, values: Any, count: int, kind: type) -> tuple[tuple[Value, ...], ...]:
        if isinstance(values, Sequence) and not any(isinstance(value, Sequence) for value in values):
            values = [values] * count
        if not isinstance(values, Sequence) or len(values) != count:
            raise ValueError(f'{name}={values!r} must have choices for each of {count} stages')
        return tuple(_values(name, value, kind) for value in values)

    fields = (
        ('resolution', _values('resolution', resolution, int)),
        ('width', each('width', width, len(width), int)),
        ('depth', each('depth', depth, stages, int)),
        ('kernel_size', each('kernel_size', kernel_size, stages, int)),
        ('expand_ratio', each('expand_ratio', expand_ratio, stages, float)),
    )
    values = dict(fields)

    def fixed(name: str, value: Any, count: int, allowed: Sequence[Any]) -> tuple:
        value = (value,) * count if not isinstance(value, (list, tuple)) else tuple(value)
        if len(value) != count or any(type(v) is not type(allowed[0]) or v not in allowed for v in value):
            raise ValueError(f'{name}={value!r} must be {count} of {tuple(allowed)}')
        return value

    structure = (
        ('per_block', *fixed('per_block', per_block, 1, (False, True))),
        ('stem_block', *fixed('stem_block', stem_block, 1, (False, True))),
        ('stride', fixed('stride', stride, stages, (1, 2))),
        ('se', fixed('se', se, stages, (False, True))),
        ('act', fixed('act', act, len(width), ('relu', 'relu6', 'swish', 'hard_swish'))),
        ('head', *fixed('head', head, 1, ('plain', 'efficient'))),
        ('shortcut', *fixed('shortcut', shortcut, 1, ('identity', 'projection'))),
        ('kernel', *fixed('kernel', kernel, 1, ('crop', 'transform'))),
    )
    fixed_values = dict(structure)
    if fixed_values['act'][0] != fixed_values['act'][-1]:
        raise ValueError(f'act={act!r}: the stem and the last convolution must have the same activation')
    for name, multiple in (('width', 8), ('kernel_size', 2)):
        for options in values[name]:
            if wrong := [v for v in options if v % multiple != (name == 'kernel_size')]:
                kind = 'odd' if name == 'kernel_size' else f'a multiple of {multiple}'
                raise ValueError(f'{name}={wrong[0]} must be {kind}')
    if wrong := [v for v in values['expand_ratio'] if v[0] < 1 or v[0] == 1 < len(v)]:
        raise ValueError(f'expand_ratio={wrong[0]}: ratios are above 1, or 1 alone (no expanding convolution)')
    total = 2 * math.prod(fixed_values['stride'])
    if total > 32:
        raise ValueError(f'stride={stride!r} makes {total} in all; at most 32 is built')
    if wrong := [r for r in values['resolution'] if r % 4 or r < total]:
        nearest = max(round(wrong[0] / 4) * 4, -(-total // 4) * 4)
        raise ValueError(
            f'resolution={wrong[0]} cannot be divided by the strides of this network: give a multiple of 4, and at '
            f'least {total}, such as {nearest}')
    # far above any network in use: a config may ask for anything
    if values['resolution'][-1] > 4096:
        raise ValueError(f'resolution={values["resolution"][-1]}: at most 4096 is built')
    if (blocks := sum(depths[-1] for depths in values['depth'])) > 256:
        raise ValueError(f'depth={depth!r} makes {blocks:,} blocks in all; at most 256 are built')
    first = 1 + stem_block
    for s in range(stages):
        for channels in {*values['width'][first + s - 1], *values['width'][first + s]}:
            inner = [expanded_width(channels, ratio) for ratio in values['expand_ratio'][s]]
            if len(set(inner)) < len(inner):
                raise ValueError(
                    f'expand_ratio={values["expand_ratio"][s]} gives the widths {inner} at {channels} channels; they '
                    'must differ: choose ratios further apart')

    choices = [Choice('resolution', values['resolution'])]
    choices += [Choice('width', values['width'][i], i) for i in range(first)]
    for s in range(stages):
        choices.append(Choice('width', values['width'][first + s], first + s))
        choices.append(Choice('depth', values['depth'][s], s))
        gate = len(choices) - 1
        if not per_block:
            choices += [Choice(name, values[name][s], s) for name in ('kernel_size', 'expand_ratio')]
            continue
        before = sum(depths[-1] for depths in values['depth'][:s])
        choices += [Choice(name, values[name][s], before + block, gate, min_depth=block + 1)
                    for block in range(values['depth'][s][-1]) for name in ('kernel_size', 'expand_ratio')]
    choices.append(Choice('width', values['width'][-1], len(width) - 1))
    return SearchSpace('shiftmobilenet', fields, tuple(choices), structure)


def expanded_width(channels: int, ratio: float) -> int:
    """Channels inside an inverted residual block."""
    return make_divisible(round(channels * ratio), 8, 8)


def space_from_dict(data: Mapping[str, Any]) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote.

    Raises:
        ValueError: If `data` is not the dict of a space.
    """
    builders = {'shiftformer': shiftformer_space, 'shiftmobilenet': shiftmobilenet_space}
    fields = dict(data) if isinstance(data, Mapping) else {}
    family, geometry = fields.pop('family', None), fields.pop('geometry', None)
    if family not in list(builders) or not isinstance(geometry, (Mapping, type(None))):
        raise ValueError(f'not a search space: family={family!r}, geometry={geometry!r}; '
                         f'known families: {", ".join(builders)}')
    try:
        space = builders[family](**fields)
    except TypeError as error:
        raise ValueError(f'not a {family} search space: {error}') from None
    return space if geometry is None else space.bind(**geometry)


def _values(name: str, values: Sequence[Value], kind: type) -> tuple[Value, ...]:
    """Normalise the values of a field: numbers of one kind, positive, strictly increasing."""
    values = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (kind is int and value != int(value)):
            raise ValueError(f'{name}={values!r}: every value must be a positive {kind.__name__}')
        largest = 1_000 if name == 'depth' else 1_000_000  # far above any network in use: a config may ask for anything
        if value > largest:
            raise ValueError(f'{name}={values!r}: values may be {largest:,} at most')
    if not values or any(a >= b for a, b in zip(values, values[1:])):
        ordered = tuple(sorted(set(values)))
        raise ValueError(f'{name}={values!r} must hold one or more values, smallest first: {ordered!r}')
    return tuple(kind(value) for value in values)


def _lists(value: Any) -> Any:
    """Nested tuples as lists."""
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _pick(choice: Choice, value: Any) -> Value:
    """The space's own spelling of a value (4 -> 4.0), so that equal archs hold equal data."""
    for allowed in choice.values:
        if not isinstance(value, (bool, str)) and value == allowed:
            return allowed
    raise ValueError(f'{choice.label}={value!r} is not in the space; choose one of {choice.values}')


def _draw(choice: Choice, generator: torch.Generator) -> int:
    return int(torch.randint(len(choice.values), (), generator=generator, device=generator.device))
