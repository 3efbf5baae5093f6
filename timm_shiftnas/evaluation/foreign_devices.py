"""Latencies of devices that this package does not run on: ONNX files to copy there, and a CSV to fill in."""
from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.utils import tqdm
from torch import nn

from ..models.export import export_onnx
from ..models.subnet import extract
from ..space.core import Arch, SearchSpace
from ..space.latency import fingerprint
from ..utils.files import atomic_write
from .backends import OPSET

__all__ = ['TABLE', 'export_subnets', 'read_latencies']

TABLE = 'latencies.csv'
COLUMNS = ('file', 'milliseconds', 'macs', 'batch_size', 'space', 'arch')


def export_subnets(
        net: nn.Module, archs: Sequence[Arch], folder: Path, batch_size: int = 1, progress: bool = True) -> Path:
    """Write subnets as ONNX files of a fixed batch size, and the table whose column 'milliseconds' is to be filled in.

    Files of an interrupted export are kept.

    Returns:
        The path of the table.

    Raises:
        ValueError: If the folder holds a table already, or onnx is not installed.
    """
    table = folder / TABLE
    if table.exists():
        raise ValueError(f'{table} exists already; fill it in, or give another folder')
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, arch in enumerate(tqdm(archs, desc='exporting', unit='subnet', disable=None if progress else True)):
        path = folder / f'{number:04d}.onnx'
        if not path.exists():
            export_onnx(extract(net, arch), path, opset=OPSET, batch_size=batch_size, check=False)
        rows.append((path.name, '', net.macs(arch), batch_size, fingerprint(net.space), json.dumps(arch.to_dict())))
    with atomic_write(table) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([COLUMNS, *rows])
    return table


def read_latencies(path: Path, space: SearchSpace, batch_size: int = 1) -> tuple[list[Arch], list[float]]:
    """Read the archs and the seconds of a table that was filled in; rows without a time are left out.

    Raises:
        ValueError: If it is another table, of another space or batch size, or a time is not a positive number.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            rows = [row for row in csv.DictReader(file) if (row['milliseconds'] or '').strip()]
        found = [(row['space'], int(row['batch_size']), float(row['milliseconds']), row['arch']) for row in rows]
        archs = [space.from_dict(json.loads(arch)) for *_, arch in found if found[0][0] == fingerprint(space)]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f'{path} is not a table that timm-shiftnas measure --export wrote ({error})') from None
    for name, wrong in (
            ('search space', [each for each in found if each[0] != fingerprint(space)]),
            (f'batch size than {batch_size}', [each for each in found if each[1] != batch_size])):
        if wrong:
            raise ValueError(f'{path} is of another {name}; export these subnets again')
    seconds = [milliseconds / 1e3 for _, _, milliseconds, _ in found]
    if wrong_times := [value for value in seconds if not 0 < value < math.inf]:
        raise ValueError(f'{path} has the time {wrong_times[0] * 1e3} ms; give positive milliseconds')
    return archs, seconds
