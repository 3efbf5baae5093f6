"""The report of a saved model: `evaluation.report` for a model directory."""
from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..evaluation.report import EvaluatedSubnet, report_html
from ..evaluation.tables import Row, score_columns
from ..method.generator import ArchitectureGenerator
from ..space.core import Arch
from ..space.families import family_of
from ..space.resources import MACS, MEMORY, PARAMS, SIZES, Resource
from ..utils.files import atomic_write
from ..utils.units import format_count
from .card import loading_call
from .load import SavedModel, arch_for_budgets

__all__ = ['model_report', 'write_report']


def write_report(path: str | os.PathLike, saved: SavedModel, front: Sequence[Row] = ()) -> None:
    """Write a `model_report` to a file, which is replaced."""
    with atomic_write(path) as temporary:
        temporary.write_text(model_report(saved, front), encoding='utf-8')


def model_report(saved: SavedModel, front: Sequence[Row] = (), repo_id: str | None = None) -> str:
    """The report of a saved supernet or subnet, as HTML.

    Its subnets are the results in `config.json`, and those of a search. A supernet without results is shown at its
    ends.

    Args:
        saved: The model.
        front: The table of a search; rows of archs that are not stored in the directory are left out.
        repo_id: The repository that is named in what to type; default is the directory.
    """
    space, record = saved.space, saved.record
    resource, searched, generator = saved.resource, saved.archs('searched', space), saved.generator(space)
    shown: list[tuple[Any, str]] = [(row, 'results') for row in record.results]
    if not shown:
        ends = {'subnet': space.largest} if saved.kind == 'subnet' else {
            'smallest': space.smallest, 'largest': space.largest}
        shown = [(dict(name=name, budget=None, arch=arch.to_dict()), 'results') for name, arch in ends.items()]
    shown += [(row, 'search') for row in front if space.from_dict(row['arch']) in searched]
    subnets = []
    for row, series in shown:
        arch = space.from_dict(row['arch'])
        choice = _choice(saved, arch, row, resource, generator) if saved.kind == 'supernet' else {}
        subnets.append(EvaluatedSubnet(row, arch, _lines(saved, choice, repo_id), series))
    labels = dict(top1='top-1 accuracy', top5='top-5 accuracy', score=record.metric)
    return report_html(
        saved.config['architecture'], _subtitle(saved), space, subnets, _resources(saved),
        resource=resource, edges=record.groups, probabilities=record.probabilities,
        scores={name: labels[name] for name in score_columns(record.results)})


def _resources(saved: SavedModel) -> list[Resource]:
    """Everything that can be counted, and the latency on every device, of which one may be that of the budgets."""
    counted, space = [MACS, PARAMS], saved.space
    if family_of(space).operators and (not saved.record.network or 'head_sizes' in space.geometry):
        counted += [*SIZES.values(), MEMORY] if saved.record.backbone is None else SIZES.values()
    return [*counted, *saved.latencies(space)]


def _subtitle(saved: SavedModel) -> str:
    net, space, (low, high) = saved.skeleton(), saved.space, map(format_count, MACS.range(saved.space))
    what = f'A subnet: {high}' if saved.kind == 'subnet' else f'A supernet of {space.size:,} subnets: {low} to {high}'
    classes = f', {net.num_classes} classes' if saved.record.backbone is None else ''
    return f'{what} MACs, images of {" x ".join(map(str, net.pretrained_cfg["input_size"]))}{classes}.'


def _choice(saved: SavedModel, arch: Arch, row: Mapping[str, Any], resource: Resource,
            generator: ArchitectureGenerator | None) -> dict[str, Any]:
    """The arguments that choose a subnet: its budget if that gives exactly this subnet, else its arch."""
    budget = resource.count(saved.space, arch) if row['budget'] is None else row['budget']
    rounded = float(f'{budget:.12g}')
    value = resource.least(budget) if resource.kind == 'seconds' else int(rounded) if rounded.is_integer() else rounded
    with suppress(ValueError):  # a table may hold budgets that no arch meets
        if arch_for_budgets(saved, saved.space, {resource: value}, generator) == arch:
            return resource.arguments(value)
    return dict(arch=arch.to_dict())


def _lines(saved: SavedModel, choice: Mapping[str, Any], repo_id: str | None) -> list[str]:
    """What to type for a subnet, in Python and in a shell."""
    lines = [f'net = tsn.{loading_call(saved, repo_id or saved.name, choice)}']
    if choice and not (repo_id or saved.record.network):  # `extract` reads directories, and runs no code of the user
        shell = ' '.join(
            f'--{key.replace("_", "-")} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}'
            for key, value in choice.items())
        lines.append(f'timm-shiftnas extract {shlex.quote(saved.name)} {shell} --output subnet')
    return lines
