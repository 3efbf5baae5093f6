"""What is added to the directory of a saved supernet later: the archs of a search, and device files."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..space.core import Arch
from ..space.latency import Device
from ..utils.paths import expand_home
from .format import BN_STATS, KEY, WEIGHTS, device_file
from .load import SavedModel
from .save import statistics_file, with_config, write_files

__all__ = ['add_device', 'save_searched']


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
        now, {BN_STATS: statistics_file(statistics)} if statistics else {},
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


def _update(saved: SavedModel, files: Mapping[str, bytes], **entries: Any) -> None:
    """Replace files and entries of a saved model; after an error or Ctrl-C, the directory is as it was."""
    directory, files = Path(saved.name), with_config(saved.config, {**saved.config[KEY], **entries}, files)
    SavedModel(directory, new=files).check()
    before = {name: (directory / name).read_bytes() for name in files if (directory / name).exists()}
    try:
        write_files(directory, files, replaced={*files})
    except BaseException:
        write_files(directory, before, replaced={*files})
        raise
