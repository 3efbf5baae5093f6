"""Saving a model as a directory that timm can load too, and adding to it. Nothing is pickled."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..data.modes import default_mode
from ..method.generator import ArchitectureGenerator
from ..models import ElasticModel, backbone_of, plain_state_dict, present_args, static_space, stock_description
from ..models.calibration import bn_statistics, has_batch_norm
from ..models.subnet import LABELS
from ..space import is_supernet
from ..space.core import Arch
from ..space.latency import Device
from ..space.resources import MACS
from ..utils.files import atomic_write
from ..utils.paths import expand_home
from .backbone import describe_backbone
from .format import (
    BN_STATS,
    CONFIG,
    DEVICES,
    FILES,
    FORMAT,
    GENERATOR,
    KEY,
    ONNX,
    WEIGHTS,
    ModelRecord,
    check_tensors,
    device_file,
    device_name,
)
from .load import SavedModel

__all__ = ['add_device', 'save_pretrained', 'save_searched']


def save_pretrained(
        directory: str | os.PathLike,
        net: nn.Module,
        generator: ArchitectureGenerator | None = None,
        *,
        groups: Sequence[float] | None = None,
        probabilities: Sequence[float] | Tensor | None = None,
        results: Sequence[Mapping[str, Any]] | None = None,
        searched: Sequence[Arch] | None = None,
        searched_limits: Mapping[str, float] | None = None,
        bn_stats: Mapping[Arch, Mapping[str, Tensor]] | None = None,
        training: Mapping[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        devices: Sequence[Device] = (),
) -> None:
    """Save a supernet and its generator, or an extracted subnet, as a directory that timm can load too.

    A model that is already in the directory is replaced. If saving is interrupted, either the old model is still
    whole, or nothing can be loaded from the directory.

    Args:
        directory: Where to save, '~' is the home directory; created if missing, with its parents.
        net: A supernet or an extracted subnet, possibly wrapped (DDP, compile, EMA, `Subnet`). The code of a network
            around an elastic backbone is not saved: `from_pretrained(..., network=...)` builds it again.
        generator: The architecture generator of a supernet. Without it, subnets can be loaded by their arch only.
        groups: The K + 1 edges of the budget groups, in MACs, or in the unit of the generator's resource.
        probabilities: P, the K probabilities of the groups.
        results: Rows of evaluated subnets, as in `evaluation.tables`; with a `score` in place of `top1` and `top5`,
            `training` names it as its `metric`.
        searched: Archs that a search on images found, the least accurate first. For a budget, the last one within it
            is loaded; the generator, which may never have seen images, proposes an arch only if none fits.
        searched_limits: Upper limits of that search, in MACs ('flops') or parameters ('params'): for a budget beyond
            them, the generator proposes an arch.
        bn_stats: BatchNorm statistics of subnets, by arch (`BatchNormCalibration.statistics`). Those of the largest
            arch replace the supernet's own.
        training: Facts about the training for the model card: `command`, `dataset`, `versions`, `task`, `metric`.
        data_config: Preprocessing that the weights expect (`mean`, `crop_pct`, ...), as for timm's `save_for_hf`.
        model_config: Further entries of `config.json` (`label_names`, ...), as for timm's `save_for_hf`.
        devices: Devices on which the latencies of a supernet were measured, that of the generator among them.

    Raises:
        ValueError: If `net` is neither a supernet nor a subnet, if an argument does not belong to it, or if the
            directory could not be loaded again.
    """
    directory = Path(expand_home(directory))
    net, bn_stats = unwrap_model(net), dict(bn_stats or {})
    elastic, backbone = is_supernet(net), backbone_of(net)[1]
    timm_net = net if backbone is None else backbone.model
    _check_parts(net, timm_net, generator, bn_stats)
    space = net.space if elastic else static_space(net)
    stored = net.network if isinstance(net, ElasticModel) else net
    bn_archs = [space.from_dict(arch.to_dict() if isinstance(arch, Arch) else arch).to_dict() for arch in bn_stats]
    if bn_stats and not has_batch_norm(net):
        raise ValueError('bn_stats are for networks with BatchNorm, which this one has not; leave them out')
    files = {WEIGHTS: _as_file({**plain_state_dict(stored), **bn_stats.get(space.largest, {})})}
    if generator is not None:
        files[GENERATOR] = _as_file(generator.state_dict())
    for arch, stats in bn_stats.items() if backbone is not None else ():  # `check` sees the backbone alone
        check_tensors(bn_statistics(net.build_subnet(arch, device='meta')), stats, BN_STATS)
    if bn_stats:
        files[BN_STATS] = _statistics_file(bn_stats)
    resource = MACS if generator is None else generator.resource
    for device in filter(None, (*devices, resource.device)):
        files[device_file(device.name)] = device.to_json().encode()
    mode = getattr(timm_net, 'image_mode', None)
    entries = dict(
        format=FORMAT,
        kind='supernet' if elastic else 'subnet',
        groups=groups,
        resource=None if resource == MACS else resource.name,
        device=None if resource.device is None else resource.device.name,
        probabilities=probabilities,
        results=results,
        training=training,
        searched=[arch.to_dict() for arch in searched or ()],
        searched_limits=searched_limits,
        generator=None if generator is None else dict(hidden_size=generator.hidden_size),
        stock=None if elastic else stock_description(timm_net),
        backbone=None if backbone is None else describe_backbone(net, stored),
        bn_archs=bn_archs,
        image_mode=None if mode == default_mode(getattr(timm_net, 'in_chans', 3)) else mode,
        upright=None if getattr(timm_net, 'upright', True) else False)
    files = _with_config(_timm_config(timm_net, data_config, model_config), entries, files)
    SavedModel(directory, new=files).check()
    others = {path.name for path in directory.glob(DEVICES) if device_name(path.name)}
    _write_files(directory, files, replaced=FILES | {ONNX} | others)


def save_searched(
        saved: SavedModel,
        archs: Sequence[Arch],
        bn_stats: Mapping[Arch, Mapping[str, Tensor]] | None = None,
        limits: Mapping[str, float] | None = None,
) -> None:
    """Store the archs of a search in the directory of its supernet, so that `from_pretrained` loads them.

    They replace those of an earlier search. After an error or Ctrl-C the directory is as it was.

    Args:
        saved: The supernet that was searched, opened before the search.
        archs: The archs, the least accurate first.
        bn_stats: Their BatchNorm statistics.
        limits: As `searched_limits` of `save_pretrained`.

    Raises:
        ValueError: If the directory holds other weights by now.
    """
    now = SavedModel(saved.name)
    if now.record.files[WEIGHTS] != saved.record.files[WEIGHTS]:
        raise ValueError(f'{saved} holds other weights than those that were searched; search again')
    # without those of archs that only an earlier search had found
    dropped = {*now.archs('searched', now.space)} - {*now.archs('results', now.space)}
    kept = {arch: stats for arch, stats in now.all_bn_statistics(now.space).items() if arch not in dropped}
    statistics = {**kept, **(bn_stats or {})}
    _update(
        now, {BN_STATS: _statistics_file(statistics)} if statistics else {},
        searched=[arch.to_dict() for arch in archs], searched_limits=limits,
        bn_archs=[arch.to_dict() for arch in statistics])


def add_device(directory: str | os.PathLike, device: Device) -> Path:
    """Add a device file to the saved supernet in a directory, or replace the one of the same name; returns its path.

    Raises:
        ValueError: If no supernet is saved there, or the device file is of another one, or would replace that which
            the generator was trained with.
    """
    if not Path(expand_home(directory)).is_dir():
        raise ValueError(f'{directory} is not a directory; give one that save_pretrained or train.py wrote')
    saved, name, content = SavedModel(directory), device_file(device.name), device.to_json().encode()
    if saved.kind != 'supernet':
        raise ValueError(f'{saved} holds a subnet; device files are of supernets')
    if saved.record.device == device.name and saved.read(name) != content:
        raise ValueError(
            f'the generator of {saved} was trained with the device file {name}; give another name, with --name')
    _update(saved, {name: content})
    return Path(saved.name, name)


def _check_parts(
        net: nn.Module, timm_net: nn.Module, generator: ArchitectureGenerator | None, bn_stats: Mapping[Arch, Any],
) -> None:
    """Raise a `ValueError` if a network, of which timm creates `timm_net`, cannot be saved with these parts."""
    single = not is_supernet(net)
    if single and not isinstance(getattr(net, 'arch', None), Arch):
        raise ValueError(f'{type(net).__name__} is neither a supernet nor an extracted subnet; save it with timm')
    if not hasattr(timm_net, 'pretrained_cfg'):
        raise ValueError(f'this {type(timm_net).__name__} has no pretrained_cfg; create it with timm.create_model')
    if single and (generator is not None or bn_stats):
        raise ValueError(
            'a subnet has its BatchNorm statistics in its own weights, and no generator; save it without them')
    if generator is not None and generator.space.unbind() != net.space.unbind():
        raise ValueError('the generator belongs to another search space than the network; create it with net.space')


def _statistics_file(bn_stats: Mapping[Arch, Mapping[str, Tensor]]) -> bytes:
    """BatchNorm statistics of several archs as one safetensors file; names start with the number of the arch."""
    return _as_file(
        {f'{i}.{name}': buffer for i, stats in enumerate(bn_stats.values()) for name, buffer in stats.items()})


def _as_file(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file: copies, for the format takes none that share memory or are not contiguous."""
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError('the network has no weights (it is on the meta device); load them before saving')
    copies = {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, metadata={'format': 'pt'})


def _with_config(config: Mapping[str, Any], entries: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of a model, and before them the `config.json` that lists them.

    Args:
        config: timm's entries of `config.json`.
        entries: Those of `ModelRecord`, as JSON data, tensors and arrays; `files` among them lists further files.
        files: Contents by name.
    """
    listed = {name: dict(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    ours = json.loads(json.dumps(
        {**entries, 'files': {**entries.get('files', {}), **listed}},
        default=lambda x: dict(x) if isinstance(x, Mapping) else x.tolist()))
    empty = {each.name: each.default_factory() for each in fields(ModelRecord) if each.default_factory is not MISSING}
    ours = {name: value for name, value in ours.items() if value is not None and value != empty.get(name)}
    return {CONFIG: json.dumps({**config, KEY: ours}, indent=2).encode(), **files}


def _timm_config(net: nn.Module, data_config: dict | None, model_config: dict | None) -> dict[str, Any]:
    """timm's entries of `config.json`."""
    # drop rates belong to a training, not to the weights: timm omits them too
    args = {name: value for name, value in present_args(net).items()
            if not name.endswith(('drop_rate', 'drop_path_rate'))}
    args |= dict(space=net.space.unbind().to_dict()) if is_supernet(net) else dict(arch=net.arch.to_dict())
    # the tag of a registered supernet says 'untrained'
    model_config = {'pretrained_cfg': {}, **(model_config or {})}
    model_config['pretrained_cfg'] = {'tag': None, **model_config['pretrained_cfg']}
    with TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        save_config_for_hf(net, path, model_config=model_config, model_args=args, data_config=data_config)
        config = json.loads(path.read_text(encoding='utf-8'))
    for name in LABELS:  # inference scripts and the Hub read them beside `pretrained_cfg`
        if label := config['pretrained_cfg'].pop(name, None):
            config.setdefault(name, label)
    return config


def _write_files(directory: Path, files: Mapping[str, bytes], replaced: Collection[str]) -> None:
    """Write the files of a model, `config.json` first.

    All are written under temporary names, which the stack renames in reverse order. If other files are replaced, the
    old `config.json` is removed before the first rename and the new one is renamed last: a `config.json` is always
    beside its own files.

    Args:
        directory: The directory of the model.
        files: Contents by name; `config.json` is the first one.
        replaced: Names of the files that are in the directory afterwards only if they are in `files`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in files:
        for abandoned in directory.glob(f'.{name}.*tmp'):  # by a save that was killed
            abandoned.unlink()
    with ExitStack() as stack:
        for name, data in files.items():
            with open(stack.enter_context(atomic_write(directory / name)), 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        stale = {*replaced} - {*files}  # of the model that was here
        if WEIGHTS in files or any((directory / name).exists() for name in {*files, *replaced} - {CONFIG}):
            for name in {CONFIG, *stale}:
                (directory / name).unlink(missing_ok=True)


def _update(saved: SavedModel, files: Mapping[str, bytes], **entries: Any) -> None:
    """Replace files and entries of a saved model; after an error or Ctrl-C, the directory is as it was."""
    directory, files = Path(saved.name), _with_config(saved.config, {**saved.config[KEY], **entries}, files)
    SavedModel(directory, new=files).check()
    before = {name: (directory / name).read_bytes() for name in files if (directory / name).exists()}
    try:
        _write_files(directory, files, replaced={*files})
    except BaseException:
        _write_files(directory, before, replaced={*files})
        raise
