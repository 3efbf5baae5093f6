"""The report of a saved model: `evaluation.report` for a model directory."""
from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from ..evaluation.report import EvaluatedSubnet, report_html
from ..evaluation.tables import Row, score_columns
from ..method.generator import ArchitectureGenerator
from ..space.core import Arch, SearchSpace
from ..space.families import family_of
from ..space.resources import MACS, MEMORY, PARAMS, SIZES, Resource
from ..utils.files import atomic_write
from ..utils.units import format_count
from .card import metric_of
from .load import SavedModel, arch_for_budgets

__all__ = ['model_report', 'write_report']


def write_report(path: str | os.PathLike, saved: SavedModel, front: Sequence[Row] = ()) -> None:
    """Write the report of a saved model.

    Args:
        path: The file; it is replaced.
        saved, front: As for `model_report`.
    """
    content = model_report(saved, front)
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding='utf-8')


def model_report(saved: SavedModel, front: Sequence[Row] = (), repo_id: str | None = None) -> str:
    """The report of a saved supernet or subnet, as HTML.

    Its subnets are the results in `config.json`, and those of a search. A supernet without results is shown at its
    ends.

    Args:
        saved: The model.
        front: The table of a search; rows of archs that are not stored in the directory are left out.
        repo_id: The repository that is named in what to type; default is the directory.
    """
    net, space = saved.skeleton(), saved.space
    resource = saved.resource
    rows = [(row, 'results') for row in saved.record.results or _rows_without_results(saved, net)]
    searched = set(saved.archs('searched', space))
    generator = saved.generator(space) if saved.has_generator else None
    rows += [(row, 'search') for row in front if space.from_dict(row['arch']) in searched]
    subnets = []
    for row, series in rows:
        arch = space.from_dict(row['arch'])
        choice = _choice(saved, arch, row, resource, generator) if saved.kind == 'supernet' else {}
        subnets.append(EvaluatedSubnet(row, arch, _lines(saved, choice, repo_id), series))
    return report_html(
        saved.config['architecture'], _subtitle(saved, net, space), space, subnets, _resources(saved, space),
        resource=resource, edges=saved.record.groups, probabilities=saved.record.probabilities,
        scores=_scores(saved))


def _rows_without_results(saved: SavedModel, net: nn.Module) -> list[dict[str, Any]]:
    ends = dict(smallest=net.space.smallest, largest=net.space.largest) if saved.kind == 'supernet' else dict(
        subnet=net.arch)
    return [dict(name=name, budget=None, arch=arch.to_dict()) for name, arch in ends.items()]


def _scores(saved: SavedModel) -> dict[str, str]:
    """Labels of the percentages, by their columns."""
    labels = dict(top1='top-1 accuracy', top5='top-5 accuracy', score=metric_of(saved.record))
    return {name: labels[name] for name in score_columns(saved.record.results or ())}


def _resources(saved: SavedModel, space: SearchSpace) -> list[Resource]:
    """Everything that can be counted, and the latency on every device, of which one may be that of the budgets."""
    counted, around = [MACS, PARAMS], saved.record.backbone
    if family_of(space).operators and (around is None or around['network'] is None or 'head_sizes' in space.geometry):
        counted += SIZES.values() if around else [*SIZES.values(), MEMORY]
    return [*counted, *saved.latencies(space)]


def _subtitle(saved: SavedModel, net: nn.Module, space: SearchSpace) -> str:
    size = ' x '.join(map(str, net.pretrained_cfg['input_size']))
    what = 'A subnet' if saved.kind == 'subnet' else f'A supernet of {space.size:,} subnets'
    low, high = map(format_count, MACS.range(space))
    macs = low if saved.kind == 'subnet' else f'{low} to {high}'
    classes = '' if saved.record.backbone is not None else f', {net.num_classes} classes'
    return f'{what}: {macs} MACs, images of {size}{classes}.'


def _choice(saved: SavedModel, arch: Arch, row: Mapping[str, Any], resource: Resource,
            generator: ArchitectureGenerator | None) -> dict[str, Any]:
    """The arguments that choose a subnet: its budget if that gives exactly this subnet, else its arch."""
    budget = resource.count(saved.space, arch) if row['budget'] is None else row['budget']
    rounded = float(f'{budget:.12g}')
    value = resource.least(budget) if resource.kind == 'seconds' else int(rounded) if rounded.is_integer() else rounded
    with suppress(ValueError):  # a table may hold budgets that no arch meets
        if generator is not None and arch_for_budgets(saved, saved.space, {resource: value}, generator) == arch:
            return resource.arguments(value)
    return dict(arch=arch.to_dict())


def _lines(saved: SavedModel, choice: Mapping[str, Any], repo_id: str | None) -> list[str]:
    """What to type for a subnet, in Python and in a shell."""
    name, around = repo_id or saved.name, (saved.record.backbone or {}).get('network')
    build = ', network=build' if around else ''  # the function that builds the network around a backbone
    if saved.kind == 'subnet':
        return [f'net = tsn.from_pretrained({name!r}{build})']
    python = ', '.join(f'{key}={value!r}' for key, value in choice.items())
    lines = [f'net = tsn.from_pretrained({name!r}, {python}{build})']
    if repo_id is None and not around:  # `extract` reads directories, and runs no code of the user
        shell = ' '.join(
            f'--{key.replace("_", "-")} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}'
            for key, value in choice.items())
        lines.append(f'timm-shiftnas extract {shlex.quote(name)} {shell} --output subnet')
    return lines
