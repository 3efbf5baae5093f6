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
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..method.generator import ArchitectureGenerator
from ..models import bound_space, static_counts, static_space
from ..models.calibration import bn_statistics, calibrate_bn, has_batch_norm
from ..models.subnet import extract
from ..space import complexity
from ..space.core import Arch, SearchSpace
from ..utils.paths import expand_home
from ..utils.units import parse_count
from .backbone import Build, build_around, build_backbone, ready
from .download import HubOptions, Retry, check_repo_id, download, is_commit, matches_etag
from .format import (
    BN_STATS,
    CONFIG,
    GENERATOR,
    MAX_CONFIG,
    MAX_SIZE,
    WEIGHTS,
    ModelRecord,
    build_network,
    check_tensors,
    read_archs,
)

__all__ = ['SavedModel', 'from_pretrained', 'load_supernet']


def from_pretrained(
        directory_or_repo: str | os.PathLike,
        *,
        flops: float | str | None = None,
        params: float | str | None = None,
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
        flops: Budget in MACs, such as 1.4e9 or '1.4G'; the subnet never exceeds it.
        params: Budget in parameters, such as '6M'.
        arch: The arch itself, or its dict. A supernet needs exactly one of the three; a saved subnet needs none, and
            has to satisfy the one that is given.
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

    Raises:
        ValueError: If no valid model is saved there, or no subnet satisfies the budget or arch.
    """
    given = {name: value for name, value in dict(flops=flops, params=params, arch=arch).items() if value is not None}
    if len(given) > 1:
        raise ValueError(f'give one of flops, params and arch, not {" and ".join(given)}')
    limits = {name: value for name, value in given.items() if name != 'arch'}
    for name, value in limits.items():
        parse_count(value, name)  # before anything is downloaded
    wanted = arch.to_dict() if isinstance(arch, Arch) else arch
    saved = SavedModel(
        directory_or_repo, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
        local_files_only=local_files_only)
    if saved.kind == 'supernet' and not given:
        raise ValueError(
            f"{saved} holds a supernet: choose a subnet, with flops='1.4G' (MACs), params='6M' or arch=...")
    net: Any = saved.network(num_classes, network)
    if saved.kind == 'subnet':
        _check_subnet(net, limits, wanted)
        return net.to(device=device, dtype=dtype).eval()
    space = net.space
    net = extract(net, _arch_for_budget(saved, net, **limits) if wanted is None else space.from_dict(wanted))
    stored = saved.bn_statistics(net, space)
    net.load_state_dict(stored, strict=False)
    net = net.to(device=device, dtype=dtype).eval()
    if stored or not has_batch_norm(net):
        return net
    if loader is not None:
        return calibrate_bn(net, loader)
    budgets = sorted({complexity.macs(space, arch) for arch in saved.archs('bn_archs', space)})
    hint = f', or choose a budget that has statistics (flops={", ".join(map(str, budgets))})' if budgets else ''
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
    return net, saved.generator(net.space) if saved.has_generator else None


class SavedModel:
    """A saved model: its checked `config.json`, and its files, which are checked when they are read.

    The arguments are as for `load_supernet`.

    Attributes:
        config: The content of `config.json`.
        record: Our entry in it; `info` is the same as a dict, without what was not saved.
        kind: 'supernet' or 'subnet'.

    Raises:
        ValueError: If no valid model is saved there, or one of a newer format.
    """

    def __init__(self, directory_or_repo: str | os.PathLike, **hub: Any) -> None:
        self.name, self._hub = expand_home(directory_or_repo), HubOptions(**hub)
        self._is_local = bool(self.name) and Path(self.name).is_dir()
        if not self._is_local:
            check_repo_id(self.name)
        self._retry = Retry(self.name)
        self.config = self._read_config()
        self.record = ModelRecord.of_config(self.config, self.where(CONFIG))
        self.info, self.kind = self.record.to_dict(), self.record.kind

    def __str__(self) -> str:
        return self.name

    def where(self, name: str) -> str:
        """The name of a file in error messages."""
        return f'{self.name}/{name}'

    def _damage(self, name: str, what: str) -> ValueError:
        remedy = 'copy or save the model again' if self._is_local else 'force_download=True fetches it again'
        return ValueError(f'{self.where(name)} {what}; {remedy}')

    def _content(self, name: str, size: int | None = None) -> bytes:
        """The content of a file of `size` bytes; of at most `MAX_CONFIG` bytes, if the size is not known."""
        def check_size(found: int) -> None:
            if size is None and found > MAX_CONFIG:
                raise self._damage(name, f'has {found:,} bytes, and at most {MAX_CONFIG:,} are read')
            if size is not None and found != size:
                raise self._damage(name, f'is not the file that was saved: it has {found} bytes instead of {size}')

        path = Path(self.name, name) if self._is_local else download(self._retry, name, self._hub, check_size)
        if not path.exists():
            raise self._damage(name, 'is missing: this is not a model directory, or saving was interrupted')
        if is_commit(path.parent.name):
            self._hub.revision = path.parent.name  # of all further files, even if the branch moves on
        check_size(path.stat().st_size)
        with open(path, 'rb') as file:
            content = file.read((MAX_CONFIG if size is None else size) + 1)
        check_size(len(content))  # of a FIFO, too
        if name == CONFIG and not self._is_local and not matches_etag(path, content):
            raise self._damage(CONFIG, 'is not the file that was published: its hash differs')
        return content

    def _read_config(self) -> Any:
        content = self._content(CONFIG)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._damage(CONFIG, f'is not JSON ({error})') from None

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

    def skeleton(self) -> nn.Module:
        """The network on the meta device, without weights."""
        return build_network(self.config, self.where(CONFIG))

    def space(self) -> SearchSpace:
        """The bound space of a supernet; of a subnet, that of its own values."""
        net: Any = self.skeleton()
        if self.record.backbone is None:
            return net.space if self.kind == 'supernet' else bound_space(net)
        return build_backbone(self.record.backbone, net, self.where(CONFIG))[1]

    def network(self, num_classes: int | None = None, build: Build | None = None) -> nn.Module:
        """The supernet or the subnet, with its weights; another number of classes gives a new head.

        `build` builds the network around a backbone.
        """
        if num_classes is not None and (not isinstance(num_classes, int) or not 0 <= num_classes <= MAX_SIZE):
            raise ValueError(f'num_classes={num_classes!r} must be an int from 0 to {MAX_SIZE:,}')
        net, about = self.skeleton(), self.record.backbone
        if about is not None:
            net = build_around(build_backbone(about, net, self.where(CONFIG))[0], about, build, str(self))
        elif build is not None:
            raise ValueError(f'{self} holds no network around a backbone; leave out network=')
        tensors = self.tensors(WEIGHTS)
        check_tensors(net.state_dict(), tensors, self.where(WEIGHTS))
        net.load_state_dict(tensors, strict=True, assign=True)
        if about is not None:
            if num_classes is not None:
                raise ValueError('num_classes is of image classifiers; build the network with another head')
            return ready(net)
        if num_classes is not None and num_classes != net.num_classes:
            net.reset_classifier(num_classes)
        return net

    @property
    def has_generator(self) -> bool:
        return GENERATOR in self.record.files

    def generator(self, space: SearchSpace) -> ArchitectureGenerator:
        """The generator that was saved with a supernet, for the bound space of that supernet."""
        if not self.has_generator:
            raise ValueError(f'{self} was saved without a generator, which finds the subnet for a budget; give arch=')
        tensors = self.tensors(GENERATOR)
        generator = ArchitectureGenerator(space, hidden_size=self.record.generator['hidden_size'])
        check_tensors(generator.state_dict(), tensors, self.where(GENERATOR))
        generator.load_state_dict(tensors)
        return generator.eval()

    def archs(self, name: str, space: SearchSpace) -> list[Arch]:
        """A saved list of archs: 'searched', or 'bn_archs' (those whose BatchNorm statistics were saved)."""
        return read_archs(getattr(self.record, name), space, name, self.where(CONFIG))

    def bn_statistics(self, subnet: nn.Module, space: SearchSpace) -> dict[str, Tensor]:
        """The saved BatchNorm statistics of an extracted subnet; empty if none were saved."""
        archs = self.archs('bn_archs', space)
        if subnet.arch not in archs:
            return {}
        prefix = f'{archs.index(subnet.arch)}.'
        stored = {
            name.removeprefix(prefix): tensor for name, tensor in self.tensors(BN_STATS).items()
            if name.startswith(prefix)}
        check_tensors(bn_statistics(subnet), stored, self.where(BN_STATS))
        return stored


def _arch_for_budget(saved: SavedModel, net: nn.Module, flops: Any = None, params: Any = None) -> Arch:
    """Choose the arch of a saved supernet for a budget: the largest searched one that fits, or the generator's."""
    most_macs, most_params = (math.inf if limit is None else parse_count(limit) for limit in (flops, params))
    fitting = [arch for arch in saved.archs('searched', net.space)
               if net.macs(arch) <= most_macs and net.params(arch) <= most_params]
    generator = saved.generator(net.space)
    # even if a searched arch fits: the generator refuses a budget that is out of range
    proposed = generator.propose(flops) if params is None else generator.propose_for_params(params)
    if fitting:
        return max(fitting, key=net.macs)
    # prefer an arch with saved BatchNorm statistics, if it uses as much of the budget as proposals do
    stored = [arch for arch in saved.archs('bn_archs', net.space) if .99 * most_macs <= net.macs(arch) <= most_macs]
    return proposed if not stored or proposed in stored else max(stored, key=net.macs)


def _check_subnet(net: nn.Module, limits: Mapping[str, Any], arch: Any) -> None:
    """Raise a `ValueError` unless a saved subnet is within the limits and has the arch, if one is given."""
    macs, params = static_counts(net) if limits else (0, 0)
    for name, limit in limits.items():
        count = macs if name == 'flops' else params
        if count > parse_count(limit):
            raise ValueError(f'this saved subnet has {count:,} {name}, more than the budget of {limit}; '
                             'load a smaller one from its supernet')
    with suppress(ValueError):  # an arch outside its space
        if arch is None or static_space(net).from_dict(arch) == net.arch:
            return
    raise ValueError(f'this saved subnet is {net.arch}; load another arch from its supernet')
