"""Latency on a measured device: the device file, and the predictor that it holds.

A predictor is a sum of features times prices in seconds. Both are non-negative, and a feature never falls where a
choice grows. So the smallest arch is the fastest. Features are polynomials in one-hot encodings, and latency is
differentiable like the other resources. There are two kinds of features:

* of operators: for each kind of operator (see `operators`) how many there are, their MACs, the values they write, and
  the entries of their weights (`KIND/COLUMN`);
* of choices: whether an active choice has at least a value (`NAME[LAYER]>=VALUE`), a table for every block.

`evaluation.predictor` fits the prices.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..utils.files import atomic_write
from ..utils.json_types import fits, types_of
from ..utils.paths import expand_home
from .core import OneHots, SearchSpace
from .families import family_of
from .resources import LATENCY, NAMES, RESOURCES, Resource

__all__ = ['Device', 'choice_features', 'find_resource', 'fingerprint', 'operator_features', 'read_device']

CONSTANT = 'constant'
COLUMNS = ('active', 'macs', 'writes', 'matrix')
MAX_BYTES = 1_000_000
SETTINGS = ('backend', 'device', 'threads', 'batch_size')

Positive = Annotated[int, lambda value: value > 0]
Prices = Annotated[dict[str, float], lambda prices: all(value >= 0 for value in prices.values())]
Errors = Annotated[
    dict[str, float], lambda errors: {'median', 'p95', 'spearman'} <= set(errors) and 0 <= errors['p95'] < 1]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device file: how long subnets of one space take on one device with one backend.

    Args:
        name: Name of the device, such as 'pixel'.
        space: `fingerprint` of the space that was measured.
        backend: What runs the networks: 'eager', 'compile', 'onnxruntime' or 'openvino', or another name for
            measurements that were imported.
        device: Device of the backend, such as 'cpu'.
        threads: Threads of the backend.
        batch_size: Images of a batch; latencies are of a whole batch.
        prices: Seconds of every feature of the predictor.
        error: Of the predictor on archs that it was not fitted to: the 'median' and the 95th percentile ('p95') of the
            relative error, and the rank correlation ('spearman').
        archs: Number of archs that were measured.
        spread: The median relative spread of repeated measurements of one network.
        machine: The processor.
        versions: Versions of the software, by name.
    """
    format: Literal[1] = 1
    name: str
    space: str
    backend: str
    device: str
    threads: Positive
    batch_size: Positive
    prices: Prices = field(repr=False)
    error: Errors
    archs: Positive
    spread: float = 0.
    machine: str = ''
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f'{self.name} ({self.backend}, {self.device}, {self.threads} threads, batch size {self.batch_size})'

    @property
    def note(self) -> str:
        """A sentence that describes its latencies."""
        return (f'Latency of a batch on {self}, as a device file predicts it, with a margin for the 95th percentile of '
                f'its error, {self.error["p95"]:.1%}.')

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + '\n'

    def write(self, path: str | os.PathLike) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json(), encoding='utf-8')

    @classmethod
    def of_json(cls, content: str | bytes, where: str) -> Device:
        """Read a device file.

        Raises:
            ValueError: If it is not one.
        """
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            data = None
        kinds = types_of(cls)  # type: ignore[arg-type]
        wrong = sorted({*kinds} ^ {*data}) if isinstance(data, dict) else ['its first character']
        wrong = wrong or [name for name, kind in kinds.items() if not fits(data[name], kind)]
        if wrong:
            raise ValueError(
                f'{where} is not a device file of this version (look at {wrong[0]}); write one with timm-shiftnas '
                'measure')
        return cls(**data)

    def check_space(self, space: SearchSpace) -> None:
        """Raise a `ValueError` unless the device was measured with this space."""
        if self.space != fingerprint(space):
            raise ValueError(
                f'the device file {self.name!r} is of another search space, or of other images or classes; measure '
                'this one: timm-shiftnas measure DIR')

    def resource(self, space: SearchSpace) -> Resource:
        """Latency on this device, in seconds per batch: what 95% of the held-out subnets did not exceed.

        Raises:
            ValueError: If the file is of another space.
        """
        self.check_space(space)
        source = hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
        return replace(LATENCY, label=f'latency on {self.name}', measure=self.at_most, device=self, source=source)

    def at_most(self, space: SearchSpace, one_hots: OneHots) -> Tensor:
        """Seconds, [...], of archs given as one-hots, which 95% of the held-out subnets did not exceed.

        The prediction itself is right in the median: half of the subnets would exceed it as a budget. The error is
        relative to the measured time: `measured <= predicted / (1 - error)`.
        """
        return self.predict(space, one_hots) / (1 - self.error['p95'])

    def predict(self, space: SearchSpace, one_hots: OneHots) -> Tensor:
        """Predicted seconds, [...], of archs given as one-hots [..., number of values]."""
        known = {CONSTANT: torch.ones_like(one_hots[0][..., 0])}
        if any('/' in name for name in self.prices):
            known |= operator_features(space, one_hots)
        if any('>=' in name for name in self.prices):
            known |= choice_features(space, one_hots)
        if unknown := sorted({*self.prices} - {*known}):
            raise ValueError(f'the device file {self.name!r} has a price for {unknown[0]!r}, which this space has not')
        return sum((price * known[name] for name, price in self.prices.items()), 0 * known[CONSTANT])


def read_device(path: str | os.PathLike) -> Device:
    """Read a device file.

    Raises:
        ValueError: If there is none.
    """
    path = Path(expand_home(path))
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f'{path} is not a device file; write one with timm-shiftnas measure')
    return Device.of_json(path.read_bytes(), str(path))


def find_resource(name: str, space: SearchSpace, file: str | os.PathLike | None = None) -> Resource:
    """A resource by name; 'latency' is read off a device file.

    Raises:
        ValueError: If there is no resource of that name, or a device file is missing, unneeded or of another space.
    """
    if (name == LATENCY.name) != (file is not None):
        raise ValueError(
            'the resource latency is read off a device file, and only this one is: give both, such as --resource '
            'latency --resource-file pixel.json, which timm-shiftnas measure writes')
    if file is not None:
        return read_device(file).resource(space)
    if name not in RESOURCES:
        raise ValueError(f'resource={name!r} is unknown; choose one of {", ".join(NAMES)}')
    return RESOURCES[name]


def fingerprint(space: SearchSpace) -> str:
    """A hash of a bound space: device files of equal hashes are of the same networks.

    Raises:
        ValueError: If the space is unbound.
    """
    data = dict(space.to_dict(), geometry=dict(space.geometry))
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def operator_features(space: SearchSpace, one_hots: OneHots) -> Mapping[str, Tensor]:
    """The features of operators, each [...], by name."""
    family = family_of(space)
    family.check_classifier(space, 'latency')
    sums = family.operator_table(space, one_hots, 'latency').sums(*COLUMNS)
    return {f'{kind}/{column}': value for (kind, column), value in sums.items()}


def choice_features(space: SearchSpace, one_hots: OneHots) -> Mapping[str, Tensor]:
    """The features of choices, each [...], by name."""
    features = {}
    for choice, one_hot in zip(space.choices, one_hots, strict=True):
        active = torch.ones_like(one_hot[..., 0])
        if choice.gate is not None:
            exists = [float(depth >= choice.min_depth) for depth in space.choices[choice.gate].values]
            active = one_hots[choice.gate] @ torch.tensor(exists, dtype=torch.float64).to(one_hot)
            features[f'{choice.label}>={choice.values[0]}'] = active
        at_least = one_hot.flip(-1).cumsum(-1).flip(-1)
        features |= {
            f'{choice.label}>={value}': active * at_least[..., i] for i, value in enumerate(choice.values) if i > 0}
    return features
