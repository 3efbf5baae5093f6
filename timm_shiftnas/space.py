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

__all__ = ['Arch', 'Choice', 'SearchSpace', 'shiftformer_space', 'space_from_dict']

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
        gate: Index, in `SearchSpace.choices`, of the depth choice that decides whether this layer exists:
            the choice is active when that depth is greater than `layer`. `None`: always active.
    """
    name: str
    values: tuple[Value, ...]
    layer: int | None = None
    gate: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.layer is None else f'{self.name}[{self.layer}]'


@dataclass(frozen=True)
class SearchSpace:
    """The ordered choices of a supernet, optionally bound to the geometry that MACs and parameters depend on.

    Args:
        family: Which arithmetic in `complexity` applies ('shiftformer').
        fields: `(name, values)` pairs as given by the user: what `to_dict` writes.
        choices: Every decision, in the order in which the architecture generator takes them.
        frozen_geometry: Sorted `(name, value)` pairs (image size, classes, ...), or `None` while unbound; use `bind`.
    """
    family: str
    fields: tuple[tuple[str, tuple[Value, ...]], ...]
    choices: tuple[Choice, ...] = field(repr=False)
    frozen_geometry: tuple[tuple[str, Any], ...] | None = None

    # -- archs ---------------------------------------------------------------------------------------------------------

    def arch(self, **fields: Value | Sequence[Value]) -> Arch:
        """Make a validated arch; a scalar given for a per-layer field goes to every layer.

        Per-layer sequences have one value per active layer (values beyond the depth are dropped when the sequence
        covers the deepest network).

        Raises:
            ValueError: If a field is missing or unknown, or a value is not in the space.
        """
        names = list(dict.fromkeys(choice.name for choice in self.choices))
        if unknown := [name for name in fields if name not in names]:
            raise ValueError(f'arch has no field {unknown[0]!r}; the fields of this space are {", ".join(names)}')
        if missing := [name for name in names if name not in fields]:
            raise ValueError(f'arch field {missing[0]!r} is missing; give one of {self.values(missing[0])}')
        chosen: dict[str, Any] = {}
        for choice in self.choices:
            given = fields[choice.name]
            if choice.layer is None:
                chosen[choice.name] = _pick(choice, given)
                continue
            depth = chosen[self.choices[choice.gate].name] if choice.gate is not None else None
            layers = chosen.setdefault(choice.name, ())
            if isinstance(given, Sequence) and not isinstance(given, str):
                longest = sum(other.name == choice.name for other in self.choices)
                if len(given) not in (depth, longest):
                    raise ValueError(
                        f'{choice.name} has {len(given)} values for {depth} layers; give one per layer or a scalar')
                given = given[choice.layer] if choice.layer < len(given) else None
            if depth is None or choice.layer < depth:
                chosen[choice.name] = (*layers, _pick(choice, given))
        return Arch(**chosen)

    def from_dict(self, fields: Mapping[str, Any]) -> Arch:
        """The arch that `Arch.to_dict` wrote, validated against this space."""
        if not isinstance(fields, Mapping):
            raise ValueError(f'expected a dict of arch fields, got {fields!r}')
        return self.arch(**fields)

    def validate(self, arch: Arch) -> None:
        """Raise a `ValueError` that names the first field of `arch` that is not in this space."""
        self.encode(arch)

    def values(self, name: str) -> tuple[Value, ...]:
        """The allowed values of one field, smallest first."""
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
                math.prod(len(choice.values) for choice in gated if choice.layer < depth)
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
            if i not in gates and self._is_active(choice, indices):
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
            indices = [self._index(choice, arch.__dict__[choice.name]) for choice in self.choices]
            if self.decode(indices) == arch:
                return indices
        except (KeyError, TypeError, ValueError):
            pass
        self.arch(**arch.__dict__)  # the slow way, whose errors name the field
        raise ValueError(f'{arch} is not as space.arch(...) makes it: one value per layer up to its depth, in tuples')

    def _index(self, choice: Choice, given: Any) -> int:
        if choice.layer is None:
            return choice.values.index(given)
        return choice.values.index(given[choice.layer]) if choice.layer < len(given) else 0

    def decode(self, indices: Sequence[int]) -> Arch:
        """Inverse of `encode`; indices of inactive choices are ignored."""
        chosen: dict[str, Any] = {}
        for choice, index in zip(self.choices, indices, strict=True):
            if choice.layer is None:
                chosen[choice.name] = choice.values[index]
            elif self._is_active(choice, indices):
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

    def _is_active(self, choice: Choice, indices: Sequence[int]) -> bool:
        return choice.gate is None or choice.layer < self.choices[choice.gate].values[indices[choice.gate]]

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
        data: dict[str, Any] = {'family': self.family, **{name: list(values) for name, values in self.fields}}
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
        choices.append(Choice('num_heads', values['num_heads'], layer, gate=1))
        choices.append(Choice('mlp_ratio', values['mlp_ratio'], layer, gate=1))
    return SearchSpace('shiftformer', fields, tuple(choices))


def space_from_dict(data: Mapping[str, Any]) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote.

    Raises:
        ValueError: If `data` is not the dict of a space.
    """
    builders = {'shiftformer': shiftformer_space}
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


def _pick(choice: Choice, value: Any) -> Value:
    """The space's own spelling of a value (4 -> 4.0), so that equal archs hold equal data."""
    for allowed in choice.values:
        if not isinstance(value, (bool, str)) and value == allowed:
            return allowed
    raise ValueError(f'{choice.label}={value!r} is not in the space; choose one of {choice.values}')


def _draw(choice: Choice, generator: torch.Generator) -> int:
    return int(torch.randint(len(choice.values), (), generator=generator, device=generator.device))
