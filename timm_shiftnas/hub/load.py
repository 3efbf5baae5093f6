"""Loading a saved model from a directory or from the Hugging Face Hub.

Nothing is trusted: the config is checked first, every file before it is used, and weights have to fit a network that
was built without memory.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..method.generator import ArchitectureGenerator
from ..method.proposals import check_limits
from ..models import static_space
from ..models.calibration import bn_statistics, calibrate_bn, has_batch_norm
from ..models.subnet import bound_space, extract
from ..space import family_of
from ..space.core import Arch, SearchSpace
from ..space.latency import Device, read_device
from ..space.resources import LATENCY, MACS, MEMORY, PARAMS, RESOURCES, SIZES, Resource
from ..utils.paths import expand_home
from .backbone import Build, build_around, build_backbone, ready
from .download import HubOptions, Retry, check_repo_id, download, matches_etag
from .format import (
    BN_STATS,
    CONFIG,
    GENERATOR,
    KEY,
    MAX_CONFIG,
    MAX_SIZE,
    WEIGHTS,
    ModelRecord,
    build_network,
    check_tensors,
    device_name,
    saved_class_names,
)

__all__ = ['SavedModel', 'from_pretrained', 'load_supernet']


def from_pretrained(
        directory_or_repo: str | os.PathLike,
        *,
        flops: float | str | None = None,
        params: float | str | None = None,
        size: float | str | None = None,
        memory: float | str | None = None,
        latency: float | str | None = None,
        precision: str = 'fp32',
        device_file: str | os.PathLike | None = None,
        arch: Arch | Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        network: Build | None = None,
        loader: Iterable[Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
) -> nn.Module:
    """Load a static network: the subnet of a saved supernet for a budget or an arch, or a saved subnet.

    Args:
        directory_or_repo: A directory of `save_pretrained`, or a repository 'owner/name' on the Hugging Face Hub.
        flops: Budget in MACs, such as 1.4e9 or '1.4G'; the subnet never exceeds it. A supernet needs a budget or an
            arch. Of several budgets, all hold. A saved subnet needs none, and has to satisfy those that are given.
        params: Budget in parameters, such as '6M'.
        size: Budget of the bytes of its weights, such as '5MB', in `precision`.
        memory: Budget of the bytes of peak memory at batch 1, such as '64MB'; see `space.resources`.
        latency: Budget of the time of a batch, such as '8ms', by `device_file`, with a margin for its error.
        precision: Number format that `size` counts: 'fp32', 'fp16' or 'int8'.
        device_file: Name of a device file in the directory, or the path of one; default is the only one there.
        arch: The arch itself, or its dict, in place of budgets.
        num_classes: Number of classes, if not the saved one: gives a new head, which counts towards budgets.
        network: `network(backbone)` builds the network around a backbone that was saved, with weights of its own, which
            are loaded. For an `ElasticModel` or a subnet of one.
        loader: Training images for the BatchNorm statistics of a subnet whose own were not saved, as for
            `calibrate_bn`. Without it, loading such a subnet warns.
        device: Where to put the network; default is the CPU.
        dtype: Type of its weights; default is the saved one.
        revision, token, cache_dir, force_download, local_files_only: As for `huggingface_hub.hf_hub_download`.

    Returns:
        A network in eval mode, with its `arch` as an attribute.

    Warns:
        BudgetWarning: If the budgets are above the largest subnet, which is returned.

    Raises:
        ValueError: If no valid model is saved there, or no subnet satisfies the budgets or the arch.
    """
    if precision not in SIZES:
        raise ValueError(f'precision={precision!r} is unknown; choose one of {", ".join(SIZES)}')
    values = {MACS: flops, PARAMS: params, SIZES[precision]: size, MEMORY: memory, LATENCY: latency}
    budgets = {resource: value for resource, value in values.items() if value is not None}
    if budgets and arch is not None:
        raise ValueError(f'give budgets or an arch, not {" and ".join(each.keyword for each in budgets)} and arch')
    for name, option, resource in (('precision', precision, SIZES[precision]), ('device_file', device_file, LATENCY)):
        if option not in (None, 'fp32') and resource not in budgets:
            raise ValueError(f'{name}={str(option)!r} says how {resource.keyword} is counted: give '
                             f'{resource.keyword}=, or leave {name} out')
    for resource, value in budgets.items():
        resource.parse(value)  # before anything is downloaded
    wanted = arch.to_dict() if isinstance(arch, Arch) else arch
    saved = SavedModel(
        directory_or_repo, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
        local_files_only=local_files_only)
    if saved.kind == 'supernet' and not budgets and arch is None:
        raise ValueError(
            f"{saved} holds a supernet: choose a subnet, with flops='1.4G' (MACs), params='6M', size='5MB', "
            "memory='64MB', latency='8ms' or arch=...")
    net: Any = saved.network(num_classes, network)
    space = net.space if saved.kind == 'supernet' else bound_space(net)
    if latency is not None:
        family_of(space).check_classifier(space, 'latency')
        budgets[saved.find_device(device_file).resource(space)] = budgets.pop(LATENCY)
    if saved.kind == 'subnet':
        _check_subnet(net, budgets, wanted)
        return net.to(device=device, dtype=dtype).eval()
    net = extract(net, arch_for_budgets(saved, space, budgets) if wanted is None else space.from_dict(wanted))
    stored = saved.bn_statistics(net, space)
    net.load_state_dict(stored, strict=False)
    net = net.to(device=device, dtype=dtype).eval()
    if stored or not has_batch_norm(net):
        return net
    if loader is not None:
        return calibrate_bn(net, loader)
    known = sorted({MACS.count(space, arch) for arch in saved.archs('bn_archs', space)})
    hint = f', or choose a budget that has statistics (flops={", ".join(map(str, known))})' if known else ''
    warnings.warn(
        f'{saved} holds no BatchNorm statistics of this subnet, which will not be accurate: give '
        f'loader= of training images, call calibrate_bn{hint}', stacklevel=2)
    return net


def load_supernet(
        directory_or_repo: str | os.PathLike,
        *,
        num_classes: int | None = None,
        network: Build | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Any,
) -> tuple[nn.Module, ArchitectureGenerator | None]:
    """Load a supernet in eval mode, and its generator (`None` if it was saved without one).

    The saved BatchNorm statistics of subnets are not loaded; `from_pretrained` uses them.

    Args:
        directory_or_repo, num_classes, network, device, dtype: As for `from_pretrained`; the generator is on the CPU.
        **hub: As for `from_pretrained`: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        ValueError: If no valid model is saved there, or a subnet.
    """
    saved = SavedModel(directory_or_repo, **hub)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet, not a supernet; load it with from_pretrained')
    net: Any = saved.network(num_classes, network).to(device=device, dtype=dtype).eval()
    return net, saved.generator(net.space)


class SavedModel:
    """A saved model: its checked `config.json`, and its files, which are checked when they are read.

    Args:
        directory_or_repo, **hub: As for `load_supernet`.
        new: Contents by name of files that are to be written to the directory; they take the place of those in it.

    Attributes:
        config: The content of `config.json`.
        record: Our entry in it.
        kind: 'supernet' or 'subnet'.

    Raises:
        ValueError: If no valid model is saved there, or one of a newer format.
    """

    def __init__(
            self, directory_or_repo: str | os.PathLike, *, new: Mapping[str, bytes] | None = None, **hub: Any) -> None:
        self.name, self._new, self._hub = expand_home(directory_or_repo), new or {}, HubOptions(**hub)
        self._is_local = bool(new) or os.path.isdir(self.name)
        if not self._is_local:
            check_repo_id(self.name)
        self._retry = Retry(self.name)
        content = self._content(CONFIG)
        try:
            self.config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._damage(CONFIG, f'is not JSON ({error})') from None
        self.record = ModelRecord.of_config(self.config, self.where(CONFIG))
        self.kind = self.record.kind

    def __str__(self) -> str:
        return self.name

    def where(self, name: str) -> str:
        """The name of a file in error messages."""
        return f'{self.name}/{name}'

    def _damage(self, name: str, what: str) -> ValueError:
        remedy = 'copy or save the model again' if self._is_local else 'force_download=True fetches it again'
        if name in self._new:
            remedy = 'save less of results, training and model_config'
        return ValueError(f'{self.where(name)} {what}; {remedy}')

    def _content(self, name: str, size: int | None = None) -> bytes:
        """The content of a file of `size` bytes; of at most `MAX_CONFIG` bytes, if the size is not known."""
        def check_size(found: int) -> None:
            if size is None and found > MAX_CONFIG:
                raise self._damage(name, f'has {found:,} bytes, and at most {MAX_CONFIG:,} are read')
            if size is not None and found != size:
                raise self._damage(name, f'is not the file that was saved: it has {found} bytes instead of {size}')

        if name in self._new:
            check_size(len(self._new[name]))
            return self._new[name]
        path = Path(self.name, name) if self._is_local else download(self._retry, name, self._hub, check_size)
        if not path.exists():
            raise self._damage(name, 'is missing: this is not a model directory, or saving was interrupted')
        check_size(path.stat().st_size)
        with open(path, 'rb') as file:
            content = file.read((MAX_CONFIG if size is None else size) + 1)
        check_size(len(content))  # of a FIFO, too
        if not self._is_local:
            self._hub.revision = path.parent.name  # the commit of all further files, even if the branch moves on
            if name == CONFIG and not matches_etag(path, content):
                raise self._damage(CONFIG, 'is not the file that was published: its hash differs')
        return content

    def read(self, name: str) -> bytes:
        """The content of a file that `config.json` lists: exactly the bytes that were checked."""
        expected = self.record.files[name]
        content = self._content(name, expected['size'])
        if hashlib.sha256(content).hexdigest() != expected['sha256']:
            raise self._damage(name, 'is not the file that was saved: its sha256 differs')
        return content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The content of a safetensors file that `config.json` lists."""
        try:
            return safetensors.torch.load(self.read(name))
        except SafetensorError as error:
            raise self._damage(name, f'is not a safetensors file ({error})') from None

    def check(self) -> None:
        """Raise the `ValueError` that loading any part of the model would raise.

        Of a network around a backbone, whose code is not saved, the backbone is checked.
        """
        net = self.skeleton()
        saved_class_names(self.config, net.num_classes, self.where(CONFIG))
        net, space = self._with_space(net)
        path = (self.record.backbone or {}).get('path')
        prefix = f'{path}.' if path else ''

        def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        check_tensors(net.state_dict(), own(self.tensors(WEIGHTS)), self.where(WEIGHTS))
        for name in ('searched', 'results'):
            self.archs(name, space)
        for arch, stats in self.all_bn_statistics(space).items():
            check_tensors(bn_statistics(net.build_subnet(arch, device='meta')), own(stats), self.where(BN_STATS))
        self.latencies(space)
        self.generator(space)

    def skeleton(self) -> nn.Module:
        """The network on the meta device, without weights; of a network around a backbone, what timm creates of it."""
        return build_network(self.config, self.where(CONFIG))

    def _with_space(self, net: Any) -> tuple[nn.Module, SearchSpace]:
        """The skeleton, or the backbone that it becomes, and its bound space."""
        if self.record.backbone is not None:
            return build_backbone(self.record.backbone, net, self.where(CONFIG))
        return net, net.space if self.kind == 'supernet' else bound_space(net)

    @cached_property
    def space(self) -> SearchSpace:
        """The bound space of a supernet; of a subnet, that of its own values."""
        return self._with_space(self.skeleton())[1]

    def network(self, num_classes: int | None = None, build: Build | None = None) -> nn.Module:
        """The supernet or the subnet, with its weights; another number of classes gives a new head.

        `build` builds the network around a backbone.
        """
        if num_classes is not None and (not isinstance(num_classes, int) or not 0 <= num_classes <= MAX_SIZE):
            raise ValueError(f'num_classes={num_classes!r} must be an int from 0 to {MAX_SIZE:,}')
        if num_classes is not None and self.record.backbone is not None:
            raise ValueError('num_classes is of image classifiers; build the network with another head')
        net: Any = build_around(self._with_space(self.skeleton())[0], self.record.backbone, build, str(self))
        tensors = self.tensors(WEIGHTS)
        check_tensors(net.state_dict(), tensors, self.where(WEIGHTS))
        net.load_state_dict(tensors, strict=True, assign=True)
        if self.record.backbone is not None:
            return ready(net)
        if num_classes not in (None, net.num_classes):
            net.reset_classifier(num_classes)
        return net

    def generator(self, space: SearchSpace) -> ArchitectureGenerator | None:
        """The generator that was saved with a supernet, for the bound space of that supernet; `None` without one."""
        if GENERATOR not in self.record.files:
            return None
        tensors = self.tensors(GENERATOR)
        generator = ArchitectureGenerator(
            space, hidden_size=self.record.generator['hidden_size'], resource=self._resource(space))
        check_tensors(generator.state_dict(), tensors, self.where(GENERATOR))
        generator.load_state_dict(tensors)
        return generator.eval()

    @property
    def resource(self) -> Resource:
        """What the budgets of its groups and its generator bound."""
        return self._resource(self.space)

    def _resource(self, space: SearchSpace) -> Resource:
        if self.record.device is not None:
            return self.devices()[self.record.device].resource(space)  # refuses a space of other classes
        return RESOURCES[self.record.resource or 'macs']

    def devices(self) -> dict[str, Device]:
        """The device files that were saved with a supernet, by the name of the device."""
        names = {name: file for file in self.record.files if (name := device_name(file))}
        return {name: Device.of_json(self.read(file), self.where(file)) for name, file in names.items()}

    def latencies(self, space: SearchSpace) -> list[Resource]:
        """The latency on each of these devices."""
        return [device.resource(space) for device in self.devices().values()]

    def find_device(self, name: str | os.PathLike | None) -> Device:
        """One of its device files, by name or as the path of any other file; without a name, the only one.

        Raises:
            ValueError: If there is no such file, or several.
        """
        devices = self.devices()
        if name is not None:
            return devices[str(name)] if str(name) in devices else read_device(name)
        if len(devices) != 1:
            known = ', '.join(devices) or 'none; write one with timm-shiftnas measure'
            raise ValueError(f'a latency needs a device file: give device_file=; {self} has {known}')
        return next(iter(devices.values()))

    def archs(self, name: str, space: SearchSpace) -> list[Arch]:
        """The archs of an entry: 'searched', 'results', or 'bn_archs' (their BatchNorm statistics were saved)."""
        saved = getattr(self.record, name)
        try:
            return [space.from_dict(each['arch'] if name == 'results' else each) for each in saved]
        except ValueError as error:
            raise ValueError(f'{self.where(CONFIG)} has an unusable entry {KEY}.{name}: {error}') from None

    def bn_statistics(self, subnet: nn.Module, space: SearchSpace) -> dict[str, Tensor]:
        """The saved BatchNorm statistics of an extracted subnet; empty if none were saved."""
        if subnet.arch not in self.archs('bn_archs', space):
            return {}
        stored = self.all_bn_statistics(space)[subnet.arch]
        check_tensors(bn_statistics(subnet), stored, self.where(BN_STATS))
        return stored

    def all_bn_statistics(self, space: SearchSpace) -> dict[Arch, dict[str, Tensor]]:
        """All saved BatchNorm statistics, by arch; they are not checked against a network."""
        tensors = self.tensors(BN_STATS) if self.record.bn_archs else {}
        return {
            arch: {name.removeprefix(f'{i}.'): x for name, x in tensors.items() if name.startswith(f'{i}.')}
            for i, arch in enumerate(self.archs('bn_archs', space))}


def arch_for_budgets(
        saved: SavedModel, space: SearchSpace, budgets: Mapping[Resource, Any],
        generator: ArchitectureGenerator | None = None) -> Arch:
    """Choose the arch of a saved supernet within budgets: the best searched one that fits, or the generator's.

    `generator` is the saved one, if it is loaded already.
    """
    limits = check_limits(space, budgets)  # even if a searched arch fits: a budget out of range is refused

    def fits(arch: Arch, least: float = 0.) -> bool:
        """Whether an arch is within all limits, and uses at least a share of one of them."""
        shares = [resource.count(space, arch) / limit for resource, limit in limits.items()]
        return least <= max(shares) <= 1

    given = {resource.keyword: limit for resource, limit in limits.items()}
    # a limited search has not seen archs beyond any of its limits
    covered = all(given.get(name, math.inf) <= limit for name, limit in (saved.record.searched_limits or {}).items())
    if covered and (fitting := [arch for arch in saved.archs('searched', space) if fits(arch)]):
        return fitting[-1]
    generator = generator or saved.generator(space)
    if generator is None:
        within = ', '.join(f'{name}={limit:g}' for name, limit in (saved.record.searched_limits or {}).items())
        hint = f', or budgets within all limits of its search: {within}' if within else ''
        raise ValueError(
            f'{saved} was saved without a generator, which finds the subnet for a budget; give arch={hint}')
    proposed = generator.propose_within(limits)
    # prefer an arch with saved BatchNorm statistics, if it uses as much of the budget as proposals do
    stored = [arch for arch in saved.archs('bn_archs', space) if fits(arch, .99)]
    return proposed if not stored or proposed in stored else max(stored, key=lambda arch: MACS.count(space, arch))


def _check_subnet(net: nn.Module, budgets: Mapping[Resource, Any], arch: Any) -> None:
    """Raise a `ValueError` unless a saved subnet is within the budgets and has the arch, if one is given."""
    for resource, budget in budgets.items():
        count = resource.count(bound_space(net), net.arch)
        if count > resource.parse(budget):
            raise ValueError(f'this saved subnet has {resource.describe(count)}, more than the budget '
                             f'{resource.keyword}={budget}; load a smaller one from its supernet')
    with suppress(ValueError):  # an arch outside its space
        if arch is None or static_space(net).from_dict(arch) == net.arch:
            return
    raise ValueError(f'this saved subnet is {net.arch}; load another arch from its supernet')
