"""Archs, choices and search spaces: plain frozen data that hashes, compares, copies, and goes to JSON and back.

A *search space* is the ordered, named choices of a supernet, each an ordered tuple of values, smallest first. An *arch*
is one value for every choice that is active in it. A bound space also carries the geometry of a network (image size,
classes, ...), on which MACs and parameters depend.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F

__all__ = ['Arch', 'Choice', 'OneHots', 'SearchSpace', 'Value', 'ordered_values']

Value = int | float
OneHots = Sequence[torch.Tensor]  # one tensor [..., number of values] per choice, in the order of the choices


class Arch:
    """One architecture: an immutable record of a search space's fields.

    A field that is chosen once is a number; a field that is chosen per layer is a tuple with one entry for each
    *active* layer. Layers beyond the depth carry no choice, so two archs are equal, and hash alike, exactly when they
    describe the same subnet. Create archs with `SearchSpace.arch`, which validates.

    >>> arch = Arch(embed_dim=192, depth=2, num_heads=(3, 4), mlp_ratio=(3.5, 4.0))
    >>> arch.num_heads
    (3, 4)
    >>> arch == Arch(depth=2, embed_dim=192, num_heads=(3, 4), mlp_ratio=(3.5, 4.0))
    True
    >>> arch.to_dict()
    {'embed_dim': 192, 'depth': 2, 'num_heads': [3, 4], 'mlp_ratio': [3.5, 4.0]}
    """

    def __init__(self, **fields: Value | tuple[Value, ...]) -> None:
        self.__dict__.update(fields)

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'an Arch is immutable; create another one with space.arch({name}={value!r}, ...)')

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
        values: The allowed values, smallest first.
        layer: Position in a per-layer field; `None` for a field that is chosen once.
        gate: Index, in `SearchSpace.choices`, of an earlier depth choice that decides whether this layer exists.
            `None`: always active.
        min_depth: The choice is active if that depth is at least this.
    """
    name: str
    values: tuple[Any, ...]
    layer: int | None = None
    gate: int | None = None
    min_depth: int = 0

    @property
    def label(self) -> str:
        return self.name if self.layer is None else f'{self.name}[{self.layer}]'

    def index(self, value: Any) -> int:
        """Position of a value, in any numeric form (4 is 4.0).

        Raises:
            ValueError: If it is not among the allowed values.
        """
        for i, allowed in enumerate(self.values):
            if not isinstance(value, (bool, str)) and value == allowed:
                return i
        raise ValueError(f'{self.label}={value!r} is not in the space; choose one of {self.values}')


@dataclass(frozen=True)
class SearchSpace:
    """The ordered choices of a supernet, optionally bound to the geometry that MACs and parameters depend on.

    Users create one with a builder such as `timm_shiftnas.shiftformer_space`.

    Args:
        family: Name of the family of networks (see `space.families`).
        fields: `(name, values)` pairs as given by the user: what `to_dict` writes. Values are a tuple or, where every
            layer has its own values, a tuple of them.
        choices: Every decision, in the order in which the architecture generator takes them.
        structure: What is fixed in the networks of the space (strides, activations, ...): `(name, value)` pairs, or
            a frozen record of the family that iterates over them.
        frozen_geometry: Sorted `(name, value)` pairs (image size, classes, ...), or `None` while unbound; use `bind`.
    """
    family: str
    fields: tuple[tuple[str, tuple[Any, ...]], ...]
    choices: tuple[Choice, ...] = field(repr=False)
    structure: Any = ()
    frozen_geometry: tuple[tuple[str, Any], ...] | None = None

    # -- archs ---------------------------------------------------------------------------------------------------------

    def arch(self, /, **fields: Value | Sequence[Value]) -> Arch:
        """Create a validated arch; a scalar given for a per-layer field goes to every layer.

        A per-layer sequence has one value per active layer, or one per layer of the deepest network; then the values of
        inactive layers are dropped. A field whose choices have one value each may be left out.

        >>> from timm_shiftnas import shiftformer_space
        >>> space = shiftformer_space(embed_dim=(32, 48), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(2, 3))
        >>> space.arch(embed_dim=48, depth=2, num_heads=(2, 1), mlp_ratio=3)
        Arch(embed_dim=48, depth=2, num_heads=(2, 1), mlp_ratio=(3.0, 3.0))

        Raises:
            ValueError: If a field is missing or unknown, or a value is not in the space.
        """
        if unknown := [name for name in fields if name not in self._by_name]:
            raise ValueError(
                f'arch has no field {unknown[0]!r}; the fields of this space are {", ".join(self._by_name)}')
        taken = dict.fromkeys(self._by_name, 0)  # active choices so far, by field
        indices: list[int] = []
        for choice in self.choices:
            if self.is_active(choice, indices):
                indices.append(choice.index(self._given(choice, fields, taken[choice.name])))
                taken[choice.name] += 1
            else:
                indices.append(0)
        for name, value in fields.items():
            count = len(self._by_name[name])
            if _is_sequence(value) and self._by_name[name][0].layer is not None and len(value) not in (
                    taken[name], count):
                raise ValueError(
                    f'{name} has {len(value)} values for {taken[name]} layers; give one per layer or a scalar')
        return self.decode(indices)

    def _given(self, choice: Choice, fields: Mapping[str, Any], position: int) -> Any:
        """The value that the fields of an arch give for a choice, the active one of its field at `position`."""
        siblings = self._by_name[choice.name]
        if choice.name not in fields:
            if any(len(other.values) > 1 for other in siblings):
                raise ValueError(f'arch field {choice.name!r} is missing; give one of {self.values(choice.name)}')
            return choice.values[0]
        value = fields[choice.name]
        if choice.layer is None or not _is_sequence(value):
            return value
        if len(value) == len(siblings):
            return value[choice.layer]
        return value[position] if position < len(value) else choice.values[0]  # `arch` reports the length

    def from_dict(self, fields: Mapping[str, Any]) -> Arch:
        """The arch that `Arch.to_dict` wrote, validated against this space."""
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise ValueError(f'expected a dict of arch fields, got {fields!r}')
        return self.arch(**fields)

    def validate(self, arch: Arch) -> None:
        """Raise a `ValueError` that names the first field of `arch` that is not in this space."""
        self.encode(arch)

    def values(self, name: str) -> tuple[Any, ...]:
        """The allowed values of one field, smallest first; if layers have their own values, a tuple of those."""
        return dict(self.fields)[name]

    @property
    def smallest(self) -> Arch:
        return self.decode([0] * len(self.choices))

    @property
    def largest(self) -> Arch:
        return self.decode([len(choice.values) - 1 for choice in self.choices])

    @property
    def size(self) -> int:
        """The number of distinct archs.

        >>> from timm_shiftnas import shiftformer_space
        >>> shiftformer_space(embed_dim=(32, 48), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(2, 3)).size  # 2 * (4 + 16)
        40
        """
        size = math.prod(
            len(choice.values) for i, choice in enumerate(self.choices)
            if choice.gate is None and i not in self._gates)
        for gate in self._gates:
            gated = [choice for choice in self.choices if choice.gate == gate]
            size *= sum(
                math.prod(len(choice.values) for choice in gated if depth >= choice.min_depth)
                for depth in self.choices[gate].values)
        return size

    def sample(self, generator: torch.Generator) -> Arch:
        """Draw an arch as AutoFormer does: depth first, then each active choice independently and uniformly.

        This is *not* uniform over the set of archs: each depth is equally likely, however many archs it has.

        >>> from timm_shiftnas import shiftformer_space
        >>> space = shiftformer_space(embed_dim=(32, 48), depth=(1, 2), num_heads=(1, 2), mlp_ratio=(2, 3))
        >>> arch = space.sample(torch.Generator().manual_seed(0))
        >>> arch == space.sample(torch.Generator().manual_seed(0)) and len(arch.num_heads) == arch.depth
        True
        """
        if not isinstance(generator, torch.Generator):
            raise ValueError(f'sample needs a torch.Generator, got {generator!r}; try torch.Generator().manual_seed(0)')
        indices = [0] * len(self.choices)
        for i in self._gates:
            indices[i] = _draw(self.choices[i], generator)
        for i, choice in enumerate(self.choices):
            if i not in self._gates and self.is_active(choice, indices):
                indices[i] = _draw(choice, generator)
        return self.decode(indices)

    # -- encodings -----------------------------------------------------------------------------------------------------

    def encode(self, arch: Arch) -> list[int]:
        """Index of the chosen value for every choice, in order; 0 where the choice is inactive.

        Raises:
            ValueError: If `arch` is not in this space.
        """
        if not isinstance(arch, Arch):
            raise ValueError(f'expected an Arch, got {arch!r}; create one with space.arch(...) or space.from_dict(...)')
        try:  # the fast path: supernets encode an arch in every forward
            indices = self._indices(arch.__dict__)
            if self.decode(indices) == arch:
                return indices
        except (KeyError, IndexError, TypeError, ValueError):
            pass
        self.arch(**arch.__dict__)  # raises an error that names the field
        raise ValueError(f'{arch} differs from what space.arch(...) returns: tuples of one value per active layer')

    def _indices(self, fields: Mapping[str, Any]) -> list[int]:
        indices: list[int] = []
        taken = dict.fromkeys(fields, 0)  # values read so far, by per-layer field
        for choice in self.choices:
            given = fields[choice.name]
            if choice.layer is None:
                indices.append(choice.values.index(given))
            elif self.is_active(choice, indices):
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
            elif self.is_active(choice, indices):
                chosen[choice.name] = (*chosen.get(choice.name, ()), choice.values[index])
        return Arch(**chosen)

    def one_hot(self, archs: Arch | Sequence[Arch]) -> tuple[torch.Tensor, ...]:
        """Encode archs as one float64 tensor per choice, of shape [number of values] or [N, number of values]."""
        if not isinstance(archs, Sequence):
            return tuple(one_hot[0] for one_hot in self.one_hot([archs]))
        rows = [self.encode(arch) for arch in archs]
        return self.one_hot_of_indices(torch.tensor(rows, dtype=torch.long).view(len(rows), len(self.choices)))

    def one_hot_of_indices(self, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One-hots of choice indices, shape [..., number of choices], as returned by `encode`."""
        return tuple(
            F.one_hot(column, len(choice.values)).double()
            for choice, column in zip(self.choices, indices.unbind(-1), strict=True))

    def is_active(self, choice: Choice, indices: Sequence[int]) -> bool:
        """Whether a choice is active, given the indices chosen before it."""
        return choice.gate is None or self.choices[choice.gate].values[indices[choice.gate]] >= choice.min_depth

    @cached_property
    def _by_name(self) -> dict[str, list[Choice]]:
        """The choices by arch field."""
        names: dict[str, list[Choice]] = {}
        for choice in self.choices:
            names.setdefault(choice.name, []).append(choice)
        return names

    @cached_property
    def _gates(self) -> list[int]:
        """Indices of the choices that decide whether others are active."""
        return sorted({choice.gate for choice in self.choices if choice.gate is not None})

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
        """Image size, patch size, classes and everything else that MACs and parameters depend on.

        Raises:
            ValueError: If the space is not bound to a network.
        """
        if self.frozen_geometry is None:
            raise ValueError(
                'this search space is not bound to a network, so MACs and parameters are undefined; '
                "use the `space` of a model, as in timm.create_model('shiftformer_tiny_supernet').space")
        return dict(self.frozen_geometry)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form of the space (and of its geometry, if bound); `space_from_dict` is the inverse."""
        data: dict[str, Any] = {'family': self.family}
        data |= {name: _lists(value) for name, value in (*self.fields, *self.structure)}
        if self.frozen_geometry is not None:
            data['geometry'] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.frozen_geometry}
        return data


def ordered_values(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    """Normalise the values of a field: numbers of one kind, positive, strictly increasing.

    Raises:
        ValueError: If they are not, or if a value is far above any network in use.
    """
    values = tuple(values) if _is_sequence(values) else (values,)
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (kind is int and value != int(value)):
            raise ValueError(f'{name}={values!r}: every value must be a positive {kind.__name__}')
        limit = 1_000 if name == 'depth' else 1_000_000  # a downloaded config may ask for anything
        if value > limit:
            raise ValueError(f'{name}={values!r}: values may be at most {limit:,}')
    if not values or any(a >= b for a, b in pairwise(values)):
        raise ValueError(
            f'{name}={values!r} must hold one or more values, smallest first: {tuple(sorted(set(values)))!r}')
    return tuple(kind(value) for value in values)


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _lists(value: Any) -> Any:
    """Nested tuples as lists."""
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _draw(choice: Choice, generator: torch.Generator) -> int:
    return int(torch.randint(len(choice.values), (), generator=generator, device=generator.device))
