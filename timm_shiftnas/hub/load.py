"""Saving and loading: a directory that timm reads too, and a subnet for a budget out of it.

A directory holds timm's `config.json`, `model.safetensors` and, for a supernet, `generator.safetensors`. Everything of
ours is under one key of `config.json`, `timm_shiftnas`: the format version, size and sha256 of every file, the budget
groups and what was measured. Nothing is ever pickled. Loading trusts nothing: the sizes and hashes of files are checked
before they are used, and a network is built without memory before its weights, of exactly its shapes, are put in.

`config.json` appears last and goes away first when a directory is saved over, so a directory that has one is whole.
"""
from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, create_model, is_model
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..evaluation.tables import COLUMNS
from ..method.generator import ArchitectureGenerator
from ..models import present_args, static_counts, static_space, stock_description
from ..models.calibration import bn_statistics, calibrate_bn, has_batch_norm
from ..models.subnet import extract
from ..space import complexity, is_supernet
from ..space.core import Arch, SearchSpace
from ..utils.units import format_count, parse_count
from .download import download, explained

__all__ = ['SavedModel', 'from_pretrained', 'load_supernet', 'save_pretrained']

KEY = 'timm_shiftnas'
FORMAT = 1
CONFIG, WEIGHTS, GENERATOR = 'config.json', 'model.safetensors', 'generator.safetensors'
BN_STATS = 'bn_stats.safetensors'
FILES = {WEIGHTS, GENERATOR, BN_STATS}  # beside the config; no file of any other name is read or published

# Bounds of what a config may ask for, far above any network in use: widths, image sizes, classes; layers, choices.
MAX_SIZE, MAX_DEPTH = 1_000_000, 1_000
MAX_GENERATOR = 1024  # hidden units


# -- saving ------------------------------------------------------------------------------------------------------------


def save_pretrained(
        directory: str | os.PathLike,
        net: nn.Module,
        generator: ArchitectureGenerator | None = None,
        *,
        groups: Sequence[float] | None = None,
        probabilities: Sequence[float] | Tensor | None = None,
        results: Sequence[Mapping[str, Any]] | None = None,
        searched: Sequence[Arch] | None = None,
        bn_stats: Mapping[Arch, Mapping[str, Tensor]] | None = None,
        training: Mapping[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
) -> None:
    """Save a supernet and its generator, or an extracted subnet, as a directory that timm can load too.

    A directory that is there already is saved over. Should that be interrupted, nothing can be loaded from it.

    Args:
        directory: Where; it is made, parents included.
        net: A supernet or an extracted subnet, possibly wrapped (DDP, compile, EMA, `Subnet`).
        generator: The architecture generator of a supernet; without it, subnets can be loaded by their arch only.
        groups: The K + 1 edges of the budget groups, in MACs.
        probabilities: P, the K probabilities of the groups.
        results: The table of evaluated subnets, rows as in `report`.
        searched: Archs found by a search on images. Budgets are served by the one with most MACs that fits, and by the
            generator, which may not have seen images, only where none does.
        bn_stats: BatchNorm statistics of subnets, by arch (`BatchNormCalibration.statistics`). Those of the largest one
            take the place of the supernet's own.
        training: What a model card tells of the training: `command`, `dataset`, `versions`.
        data_config: Preprocessing that the weights expect (`mean`, `crop_pct`, ...), as for timm's `save_for_hf`.
        model_config: Further entries of `config.json` (`label_names`, ...), as for timm's `save_for_hf`.

    Raises:
        ValueError: If `net` is neither, if something does not belong to it, or could not be loaded again.
    """
    net = unwrap_model(net)
    kind = 'supernet' if is_supernet(net) else 'subnet'
    if kind == 'subnet' and not isinstance(getattr(net, 'arch', None), Arch):
        raise ValueError(f'{type(net).__name__} is neither a supernet nor an extracted subnet; save it with timm')
    if not hasattr(net, 'pretrained_cfg'):
        raise ValueError(f'this {type(net).__name__} has no pretrained_cfg; make it with timm.create_model or extract')
    if generator is not None and kind == 'subnet':
        raise ValueError('a subnet has no generator; save the supernet with it, or the subnet without it')
    if generator is not None and generator.space.unbind() != net.space.unbind():
        raise ValueError('the generator belongs to another search space than the network; make it with net.space')

    if bn_stats and kind == 'subnet':
        raise ValueError('a subnet has its BatchNorm statistics in its own weights; save it without bn_stats')
    bn_stats = dict(bn_stats or {})
    largest = bn_stats.get(net.space.largest, {}) if bn_stats else {}
    tensors = {WEIGHTS: _own({**net.state_dict(), **largest})}
    ours = dict(
        format=FORMAT, kind=kind, groups=groups, probabilities=probabilities, results=results, training=training,
        searched=None if searched is None else [arch.to_dict() for arch in searched])
    if generator is not None:
        tensors[GENERATOR] = _own(generator.state_dict())
        ours['generator'] = dict(hidden_size=generator.hidden_size)
    if kind == 'subnet' and (stock := stock_description(net)) is not None:
        ours['stock'] = stock
    for arch, stats in bn_stats.items():
        if not isinstance(arch, Arch):
            raise ValueError(f'bn_stats has the key {arch!r}; give statistics by arch')
        _check_same(bn_statistics(net.build_subnet(arch, device='meta')), stats, f'bn_stats[{arch}]')
    if bn_stats:
        ours['bn_archs'] = [net.space.from_dict(arch.to_dict()).to_dict() for arch in bn_stats]
        tensors[BN_STATS] = _own({
            f'{i}.{name}': buffer for i, stats in enumerate(bn_stats.values()) for name, buffer in stats.items()})
    files = {name: safetensors.torch.save(state, metadata={'format': 'pt'}) for name, state in tensors.items()}
    ours['files'] = {
        name: dict(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    ours = {name: _plain(value) for name, value in ours.items() if value is not None}
    config = _timm_config(net, ours, data_config, model_config)
    # what could not be loaded is not written
    _check_config(config, CONFIG)
    _check_tensors(_build(config, CONFIG), tensors[WEIGHTS], WEIGHTS)
    files[CONFIG] = json.dumps(config, indent=2).encode()
    _write(Path(directory), files)


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory or are not contiguous."""
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError('the network has no weights (it is on the meta device); load them before saving')
    return {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in state.items()}


def _timm_config(net: nn.Module, ours: dict, data_config: dict | None, model_config: dict | None) -> dict[str, Any]:
    """The content of `config.json` as timm writes it, and our key."""
    # drop rates belong to a training, not to the weights: timm leaves them out too
    args = present_args(net)
    args = {name: value for name, value in args.items() if not name.endswith(('drop_rate', 'drop_path_rate'))}
    if ours['kind'] == 'supernet':
        args['space'] = net.space.unbind().to_dict()
    else:
        args['arch'] = net.arch.to_dict()
    model_config = dict(model_config or {})
    # the registered tag says 'untrained'
    model_config['pretrained_cfg'] = dict(dict(tag=None), **model_config.get('pretrained_cfg', {}))
    with TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(
            net, path, model_config={**model_config, KEY: ours}, model_args=args, data_config=data_config)
        return json.loads(path.read_text(encoding='utf-8'))


def _plain(value: Any) -> Any:
    """JSON-able data from tensors, arrays and tuples."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a model; `config.json` is the last of them.

    All are written under temporary names first. The old `config.json` goes before the first file takes its place, and
    the new one comes after the last: at no moment does a `config.json` stand beside files that are not its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    temporaries = {name: directory / f'.{name}.tmp' for name in files}
    try:
        for name, data in files.items():
            with open(temporaries[name], 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (directory / CONFIG).unlink(missing_ok=True)
        for name in {GENERATOR, BN_STATS} - set(files):
            (directory / name).unlink(missing_ok=True)  # of the supernet that was here
        for name in files:
            os.replace(temporaries[name], directory / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


# -- loading -----------------------------------------------------------------------------------------------------------


def from_pretrained(
        directory_or_repo: str | os.PathLike,
        *,
        flops: float | str | None = None,
        params: float | str | None = None,
        arch: Arch | Mapping[str, Any] | None = None,
        num_classes: int | None = None,
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
        flops: Budget in MACs, such as 1.4e9 or '1.4G'; the subnet is never above it.
        params: Budget in parameters, such as '6M'.
        arch: The arch itself, or its dict. A supernet needs exactly one of the three; a saved subnet needs none, and
            has to satisfy what is given.
        num_classes: Number of classes, if other than saved: gives a new head, which counts for budgets.
        loader: Training images for the BatchNorm statistics of a subnet whose own were not saved, as for
            `calibrate_bn`; without it, such a subnet comes with a warning.
        device: Where to put the network; default is the CPU.
        dtype: Type of its weights; default is the saved one.
        revision, token, cache_dir, force_download, local_files_only: As for `huggingface_hub.hf_hub_download`.

    Returns:
        A network in eval mode; its `arch` attribute tells the arch.

    Raises:
        ValueError: If nothing that can be trusted is saved there, or for a budget or arch that cannot be had.
    """
    given = {name: value for name, value in dict(flops=flops, params=params, arch=arch).items() if value is not None}
    if len(given) > 1:
        raise ValueError(f'give one of flops, params and arch, not {" and ".join(given)}')
    limits = {name: parse_count(value, name) for name, value in given.items() if name != 'arch'}
    saved = SavedModel(
        directory_or_repo, revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
        local_files_only=local_files_only)
    if saved.kind == 'supernet' and not given:
        raise ValueError(
            f"{saved} holds a supernet: say which subnet, with flops='1.4G' (MACs), params='6M' or arch=...")
    net = saved.network(num_classes)
    if saved.kind == 'subnet':
        _check_static(net, limits, arch)
    else:
        space = net.space
        chosen = _serve(saved, net, **limits) if arch is None else space.from_dict(
            arch.to_dict() if isinstance(arch, Arch) else arch)
        net = extract(net, chosen)
        return _with_statistics(saved, net, space, loader, device, dtype)
    return net.to(device=device, dtype=dtype).eval()


def _with_statistics(saved: SavedModel, net: nn.Module, space: SearchSpace, loader: Iterable[Any] | None,
                     device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """An extracted subnet with BatchNorm statistics of its own: saved, or of a loader's images, or else a warning."""
    stored = saved.bn_statistics(net, space) if has_batch_norm(net) else {}
    if stored:
        net.load_state_dict(stored, strict=False)
    net = net.to(device=device, dtype=dtype).eval()
    if stored or not has_batch_norm(net):
        return net
    if loader is not None:
        return calibrate_bn(net, loader)
    served = sorted({complexity.macs(space, arch) for arch in saved.archs('bn_archs', space)})
    hint = f', or a budget that has statistics (flops={", ".join(map(str, served))})' if served else ''
    warnings.warn(
        f'{saved} holds no BatchNorm statistics of this subnet, which will not be accurate: give '
        f'loader= of training images, call calibrate_bn{hint}', stacklevel=3)
    return net


def _serve(saved: SavedModel, net: nn.Module, flops: float = math.inf, params: float = math.inf) -> Arch:
    """The arch of a saved supernet for a budget: the largest of the searched ones that fits, or the generator's."""
    searched = saved.archs('searched', net.space)
    fitting = [arch for arch in searched if net.macs(arch) <= flops and net.params(arch) <= params]
    generator = saved.generator(net.space)
    # the generator also tells budgets that are out of range
    proposed = generator.propose(flops) if params == math.inf else generator.propose_for_params(params)
    if fitting:
        return max(fitting, key=net.macs)
    # an arch whose BatchNorm statistics are at hand, if it uses the budget as well as proposals do
    stored = [arch for arch in saved.archs('bn_archs', net.space) if .99 * flops <= net.macs(arch) <= flops]
    return proposed if not stored or proposed in stored else max(stored, key=net.macs)


def load_supernet(
        directory_or_repo: str | os.PathLike,
        *,
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Any,
) -> tuple[nn.Module, ArchitectureGenerator | None]:
    """Load a supernet, in eval mode, and its generator (`None` if it was saved without one).

    BatchNorm statistics of subnets stay in the directory: `from_pretrained` reads them there.

    Args:
        directory_or_repo: A directory of `save_pretrained`, or a repository 'owner/name' on the Hugging Face Hub.
        num_classes: Number of classes, if other than saved: gives a new head.
        device: Where to put the supernet; the generator stays on the CPU.
        dtype: Type of the supernet's weights; default is the saved one.
        **hub: As for `from_pretrained`: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        ValueError: If nothing that can be trusted is saved there, or a subnet.
    """
    saved = SavedModel(directory_or_repo, **hub)
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet, which is no supernet; load it with from_pretrained')
    net = saved.network(num_classes).to(device=device, dtype=dtype).eval()
    return net, saved.generator(net.space) if saved.has_generator else None


class SavedModel:
    """A model as it was saved: its checked `config.json`, and its files, checked when they are read.

    Args:
        directory_or_repo: A directory of `save_pretrained`, or a repository 'owner/name' on the Hugging Face Hub.
        revision, token, cache_dir, force_download, local_files_only: As for `huggingface_hub.hf_hub_download`.

    Attributes:
        config: The content of `config.json`.
        info: Our part of it: kind, files, and if saved groups, probabilities, results.
        kind: 'supernet' or 'subnet'.

    Raises:
        ValueError: If there is no model of ours, or a newer one than this version reads.
    """

    def __init__(
            self,
            directory_or_repo: str | os.PathLike,
            *,
            revision: str | None = None,
            token: str | bool | None = None,
            cache_dir: str | os.PathLike | None = None,
            force_download: bool = False,
            local_files_only: bool = False,
    ) -> None:
        self.name = os.fspath(directory_or_repo)
        self._hub = None
        if not self.name or not Path(self.name).is_dir():
            check_repo_id(directory_or_repo)
            self._hub = dict(
                revision=revision, token=token, cache_dir=cache_dir, force_download=force_download,
                local_files_only=local_files_only, library_name=KEY)
        path = self._path(CONFIG)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(
                f'{self} holds no config.json: it is not a model directory, or saving it was interrupted') from None
        if self._hub is not None and not _is_cached_whole(path, content):
            raise ValueError(
                f'{self.where(CONFIG)} is not the file that was published: its hash differs; {self._remedy}')
        try:
            self.config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{self.where(CONFIG)} is not JSON ({error}); {self._remedy}') from None
        _check_config(self.config, self.where(CONFIG))
        self.info: dict[str, Any] = self.config[KEY]
        self.kind: str = self.info['kind']

    def __str__(self) -> str:
        return self.name

    def where(self, name: str) -> str:
        """A file, as error messages call it."""
        return f'{self.name}/{name}'

    @property
    def _remedy(self) -> str:
        return 'copy or save the model again' if self._hub is None else 'force_download=True fetches it again'

    def _path(self, name: str) -> Path:
        if self._hub is None:
            return Path(self.name, name)
        with explained(self.name, name):
            path = Path(download(self.name, name, **self._hub))
        # all files of one commit, should the branch move on meanwhile
        if re.fullmatch('[0-9a-f]{40}', path.parent.name):
            self._hub['revision'] = path.parent.name
        return path

    def read(self, name: str) -> bytes:
        """The content of a file that `config.json` names: what is returned is what was checked.

        Raises:
            ValueError: If it is not the file that was saved.
        """
        expected = self.info['files'][name]
        path = self._path(name)
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size == expected['size'] else b''
        except FileNotFoundError:
            raise ValueError(f'{self.where(name)} is missing; {self._remedy}') from None
        if size != expected['size']:
            raise ValueError(
                f'{self.where(name)} is not the file that was saved: it has {size} bytes instead of '
                f'{expected["size"]}; {self._remedy}')
        if hashlib.sha256(data).hexdigest() != expected['sha256']:
            raise ValueError(
                f'{self.where(name)} is not the file that was saved: its sha256 differs; {self._remedy}')
        return data

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The content of a safetensors file that `config.json` names."""
        try:
            return safetensors.torch.load(self.read(name))
        except SafetensorError as error:
            raise ValueError(f'{self.where(name)} is not a safetensors file: {error}') from None

    def skeleton(self) -> nn.Module:
        """The network on the meta device: no weights, no memory."""
        return _build(self.config, self.where(CONFIG))

    def network(self, num_classes: int | None = None) -> nn.Module:
        """The supernet or the subnet, with its weights; another number of classes gives a new head."""
        if num_classes is not None and (not isinstance(num_classes, int) or not 0 <= num_classes <= MAX_SIZE):
            raise ValueError(f'num_classes={num_classes!r} must be an int of 0 or more')
        net, tensors = self.skeleton(), self.tensors(WEIGHTS)
        _check_tensors(net, tensors, self.where(WEIGHTS))
        net.load_state_dict(tensors, strict=True, assign=True)
        if num_classes is not None and num_classes != net.num_classes:
            net.reset_classifier(num_classes)
        return net

    @property
    def has_generator(self) -> bool:
        return GENERATOR in self.info['files']

    def archs(self, name: str, space: SearchSpace) -> list[Arch]:
        """A saved list of archs: 'searched', or 'bn_archs', those whose BatchNorm statistics were saved."""
        try:
            return [space.from_dict(arch) for arch in self.info.get(name, ())]
        except ValueError as error:
            raise ValueError(f'{self.where(CONFIG)} has an unusable entry {KEY}.{name}: {error}') from None

    def bn_statistics(self, subnet: nn.Module, space: SearchSpace) -> dict[str, Tensor]:
        """The BatchNorm statistics that were saved for an extracted subnet; empty if none were."""
        archs = self.archs('bn_archs', space)
        if subnet.arch not in archs:
            return {}
        prefix = f'{archs.index(subnet.arch)}.'
        stored = {
            name.removeprefix(prefix): tensor for name, tensor in self.tensors(BN_STATS).items()
            if name.startswith(prefix)}
        _check_same(bn_statistics(subnet), stored, self.where(BN_STATS))
        return stored

    def generator(self, space: SearchSpace) -> ArchitectureGenerator:
        """The generator that was saved with a supernet, for its bound space."""
        if not self.has_generator:
            raise ValueError(f'{self} was saved without a generator, which finds the subnet for a budget; give arch=')
        tensors = self.tensors(GENERATOR)
        generator = ArchitectureGenerator(space, hidden_size=self.info['generator']['hidden_size'])
        _check_tensors(generator, tensors, self.where(GENERATOR))
        generator.load_state_dict(tensors)
        return generator.eval()


def _check_static(net: nn.Module, limits: Mapping[str, float], arch: Arch | Mapping[str, Any] | None) -> None:
    """Refuse a saved subnet that is not what was asked for."""
    counts = dict(zip(('flops', 'params'), static_counts(net))) if limits else {}
    for name, count in counts.items():
        if count > limits.get(name, math.inf):
            raise ValueError(
                f'this saved subnet has {count:,} {name}, more than the budget of {format_count(limits[name])}; '
                'load a smaller one from its supernet')
    if arch is None:
        return
    try:
        same = static_space(net).from_dict(arch.to_dict() if isinstance(arch, Arch) else arch) == net.arch
    except ValueError:
        same = False
    if not same:
        raise ValueError(f'this saved subnet is {net.arch}; load another arch from its supernet')


# -- trusting nothing --------------------------------------------------------------------------------------------------


def check_repo_id(name: str | os.PathLike) -> None:
    """Refuse what is neither a directory nor the name of a repository."""
    try:
        validate_repo_id(name)
        valid = '/' in name
    except (HFValidationError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f"{str(name)!r} is no directory, nor a repository 'owner/name' on the Hugging Face Hub")


def _is_cached_whole(path: Path, content: bytes) -> bool:
    """Whether a file of huggingface_hub's cache has the content that the Hub named, as far as can be told.

    The cache calls a file by its ETag and links to it: the Hub's is the git object id of a small file and the sha256 of
    a large one, that of some mirrors a plain sha1. Where the cache has no links (on Windows), nothing can be told.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ''
    if re.fullmatch('[0-9a-f]{40}', name):
        return name in (git_id(content), hashlib.sha1(content).hexdigest())
    return not re.fullmatch('[0-9a-f]{64}', name) or name == hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """The git object id of a file."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _check_config(config: Any, where: str) -> None:
    """Raise a `ValueError` unless `config.json` is one that `save_pretrained` could have written."""
    if not isinstance(config, Mapping) or not isinstance(config.get(KEY), Mapping):
        raise ValueError(
            f'{where} has no {KEY!r} entry: the model was not saved by timm_shiftnas; load it with timm.create_model')
    ours = config[KEY]
    version, kind, files = ours.get('format'), ours.get('kind'), ours.get('files')
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f'{where} has format {version}, and this timm_shiftnas reads formats up to {FORMAT}; '
            'upgrade it: pip install -U timm_shiftnas')
    checks = {
        'format': version == FORMAT and not isinstance(version, bool),
        'kind': kind in ('supernet', 'subnet'),
        'files': isinstance(files, Mapping) and {WEIGHTS} <= set(files) <= FILES and all(
            map(_is_file, files.items())),
        'generator': not isinstance(files, Mapping) or GENERATOR not in files or _is_generator(ours.get('generator')),
        'groups': _is_partition(ours.get('groups'), ours.get('probabilities')),
        'results': _is_table(ours.get('results')),
        'searched': isinstance(ours.get('searched', []), list),
        'bn_archs': isinstance(ours.get('bn_archs', []), list) and (
            not isinstance(files, Mapping) or (BN_STATS in files) == ('bn_archs' in ours)),
        'training': _is_training(ours.get('training', {})),
    }
    if unknown := sorted(set(ours) - {*checks, 'probabilities', 'stock'}):
        raise ValueError(f'{where} has an unknown entry {KEY}.{unknown[0]}; this timm_shiftnas writes no such thing')
    if wrong := [name for name, right in checks.items() if not right]:
        raise ValueError(f'{where} has an unusable entry {KEY}.{wrong[0]}: {_short(ours.get(wrong[0]))}')
    if not isinstance(config.get('architecture'), str) or not is_model(config['architecture']):
        raise ValueError(f'{where} names an unknown architecture {_short(config.get("architecture"))}')
    for name in ('model_args', 'pretrained_cfg'):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f'{where} has an unusable entry {name}: {_short(config.get(name))}')
    for part in (config['model_args'], config['pretrained_cfg'], dict(num_classes=config.get('num_classes'))):
        _check_sizes(part, where)
    # arguments of timm's factory could fetch other weights than those that are checked
    factory = {*inspect.signature(create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    if foreign := factory & set(config['model_args']):
        raise ValueError(f'{where} has model_args.{sorted(foreign)[0]}, which is no argument of a network')


def _check_sizes(model_args: Mapping[str, Any], where: str) -> None:
    """Refuse absurd numbers before anything is made of them."""
    pending: list[tuple[str, Any]] = [('model_args', model_args)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend(value.items())
        elif isinstance(value, list):
            pending.extend((name, item) for item in value)
            if len(value) > MAX_DEPTH:
                raise ValueError(f'{where} gives {len(value):,} values of {name}; at most {MAX_DEPTH:,} are loaded')
        limit = MAX_DEPTH if name == 'depth' else MAX_SIZE
        if isinstance(value, (int, float)) and not abs(value) <= limit:  # 'not': NaN is not below anything
            raise ValueError(f'{where} asks for {name}={_short(value)}; nothing above {limit:,} is loaded')


def _is_file(item: tuple[str, Any]) -> bool:
    """Whether a file has a plain name, with a size and a sha256."""
    name, entry = item
    return (
        re.fullmatch(r'\w[\w.-]*', name, re.ASCII) is not None and isinstance(entry, Mapping)
        and _is_count(entry.get('size')) and re.fullmatch('[0-9a-f]{64}', str(entry.get('sha256'))) is not None)


def _is_generator(entry: Any) -> bool:
    size = entry.get('hidden_size') if isinstance(entry, Mapping) else None
    return _is_count(size) and 1 <= size <= MAX_GENERATOR


def _is_partition(groups: Any, probabilities: Any) -> bool:
    """Whether K + 1 increasing edges, or none, go with K probabilities, or none."""
    if groups is None:
        return probabilities is None
    if not _are_numbers(groups) or len(groups) < 2 or any(a >= b for a, b in zip(groups, groups[1:])):
        return False
    return probabilities is None or (
        _are_numbers(probabilities) and len(probabilities) == len(groups) - 1
        and min(probabilities) >= 0 and math.isclose(sum(probabilities), 1, rel_tol=1e-3))


def _is_table(rows: Any) -> bool:
    """Whether rows, or none, are those of `report`."""
    return rows is None or isinstance(rows, list) and all(
        isinstance(row, Mapping) and set(row) >= set(COLUMNS) and isinstance(row['name'], str)
        and _are_numbers([row[key] for key in COLUMNS[1:-1] if key != 'budget' or row[key] is not None])
        for row in rows)


def _is_training(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get('versions', {}), Mapping) and all(
        isinstance(entry.get(name, ''), str) for name in ('command', 'dataset'))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values)


def _build(config: Mapping[str, Any], where: str) -> nn.Module:
    """The network of a checked config on the meta device, where absurd shapes cost nothing."""
    labels = {name: config[name] for name in ('num_classes', 'label_names', 'label_descriptions') if name in config}
    try:
        net = create_model(
            config['architecture'], pretrained_cfg=dict(config['pretrained_cfg'], **labels), device='meta',
            **config['model_args'])
    except Exception as error:  # whatever timm raises over it, the config is at fault
        raise ValueError(f'{where} does not describe a network ({type(error).__name__}: {error})') from error
    fits = is_supernet(net) if config[KEY]['kind'] == 'supernet' else hasattr(net, 'arch')
    if not fits:
        raise ValueError(f'{where} says {config[KEY]["kind"]}, but {config["architecture"]!r} is none')
    return net


def _check_tensors(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a `ValueError` unless `tensors` are exactly those of `net`, in name, shape and kind of number."""
    _check_same(net.state_dict(), tensors, where)


def _check_same(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    def kinds(state: Mapping[str, Tensor]) -> dict[str, tuple]:
        return {name: ('float' if x.is_floating_point() else 'int', *x.shape) for name, x in state.items()}

    own, given = kinds(expected), kinds(tensors)
    for name in _in_order(own, given):
        if own.get(name) != given.get(name):
            raise ValueError(
                f'{where} is not of the network in config.json: {name} is {given.get(name, "missing")} there '
                f'and {own.get(name, "missing")} in the network')


def _in_order(*names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for group in names for name in group))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:100]}...'
