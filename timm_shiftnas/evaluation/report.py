"""The report of a model: one HTML file with the curve of its subnets, a slider over them, and their archs.

The file holds its style, its script and its data, and fetches nothing. `report.html` beside this module is the page;
this module fills it in. The data are JSON in which every `<` is escaped, all other text is escaped as HTML.
"""
from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..space.core import Arch, SearchSpace
from ..space.resources import Resource
from ..utils.units import scale_of
from .tables import Row

__all__ = ['MARK', 'EvaluatedSubnet', 'report_html']

MARK = '<!-- written by timm_shiftnas: replaced when the report is written again -->'


@dataclass(frozen=True)
class EvaluatedSubnet:
    """A subnet of a report.

    Args:
        row: Its row in a table, as in `evaluation.tables`; accuracies may be missing.
        arch: Its arch.
        lines: What to type for it.
        series: 'results', or 'search' if its accuracy is that of a search.
    """
    row: Row
    arch: Arch
    lines: Sequence[str] = ()
    series: str = 'results'


def report_html(
        title: str,
        subtitle: str,
        space: SearchSpace,
        subnets: Sequence[EvaluatedSubnet],
        resources: Sequence[Resource],
        *,
        resource: Resource,
        edges: Sequence[float] | None = None,
        probabilities: Sequence[float] | None = None,
        scores: Mapping[str, str],
) -> str:
    """The report as HTML.

    Args:
        title: Its heading.
        subtitle: A line below it.
        space: The bound search space.
        subnets: At least one subnet.
        resources: What is counted for every subnet, one of them latency for each device.
        resource: The one of them that budgets bound.
        edges: The K + 1 edges of the budget groups, in the unit of that resource.
        probabilities: P, the K probabilities of the groups.
        scores: Labels of the accuracies in percent, by their columns in the rows; the first one is drawn.
    """
    counts = [each.count(space, [subnet.arch for subnet in subnets]).tolist() for each in resources]
    data = dict(
        axis=list(resources).index(resource),
        resources=[_axis(each, max(column)) for each, column in zip(resources, counts)],
        scores=list(scores.values()),
        fields=_fields(space),
        subnets=[
            _subnet(subnet, space, needs, resources, resource, list(scores))
            for subnet, needs in zip(subnets, zip(*counts))])
    parts = dict(
        mark=MARK, title=html.escape(title), subtitle=html.escape(subtitle),
        score=html.escape(next(iter(scores.values()))), table=_table(data), data=_script_json(data),
        devices=_devices(resources),
        shares='' if probabilities is None else _shares(edges or (), probabilities, resource))
    # one pass: what is filled in is not searched for further places
    return re.sub(r'\{\{(\w+)\}\}', lambda match: parts[match[1]], _page())


def _page() -> str:
    return files(__package__).joinpath('report.html').read_text(encoding='utf-8')


def _script_json(data: Any) -> str:
    """JSON for a script element, which a `</script>` or `<!--` in a text would end or change."""
    return json.dumps(data, allow_nan=False).replace('<', '\\u003c')


def _axis(resource: Resource, largest: float) -> dict[str, Any]:
    scale, unit = scale_of(largest, resource.kind)
    return dict(label=resource.label, scale=scale, unit=unit)


def _fields(space: SearchSpace) -> list[dict[str, Any]]:
    """The fields of archs, with the positions of their choices in `_values`."""
    positions: dict[str, list[int]] = {}
    for i, choice in enumerate(space.choices):
        positions.setdefault(choice.name, []).append(i)
    return [
        dict(name=name, choices=choices, layered=space.choices[choices[0]].layer is not None,
             gated=space.choices[choices[0]].gate is not None,
             largest=[space.choices[i].values[-1] for i in choices])
        for name, choices in positions.items()]


def _values(space: SearchSpace, arch: Arch) -> list[Any]:
    """The value of every choice in an arch; `None` where it is not active."""
    indices = space.encode(arch)
    chosen = [choice.values[index] for choice, index in zip(space.choices, indices)]
    return [value if space.is_active(choice, indices) else None for choice, value in zip(space.choices, chosen)]


def _subnet(
        subnet: EvaluatedSubnet, space: SearchSpace, counts: Sequence[float], resources: Sequence[Resource],
        resource: Resource, scores: Sequence[str]) -> dict[str, Any]:
    row, budget = subnet.row, subnet.row.get('budget')
    return dict(
        name=row['name'], series=subnet.series, score=row.get(scores[0]),
        scores=[None if row.get(score) is None else f'{row[score]:.2f}' for score in scores],
        budget=None if budget is None else f'{resource.format(budget)} {resource.label}',
        counts=counts, texts=[each.format(count) for each, count in zip(resources, counts)],
        values=_values(space, subnet.arch), lines=list(subnet.lines))


def _table(data: Mapping[str, Any]) -> str:
    """All subnets as a table, which needs no script."""
    lines = [_cells('th', ['subnet', *data['scores'], *(each['label'] for each in data['resources'])])]
    for subnet in data['subnets']:
        name = subnet['name'] + (' (search)' if subnet['series'] == 'search' else '')
        scores = [f'{score}%' if score else '-' for score in subnet['scores']]
        lines.append(_cells('td', [name, *scores, *subnet['texts']]))
    head, *body = (f'<tr>{line}</tr>' for line in lines)
    body = '\n'.join(body)
    return f'<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _cells(tag: str, texts: Sequence[str]) -> str:
    return ''.join(f'<{tag}{" class=wrap" * (tag == "th" or i == 0)}>{html.escape(text)}</{tag}>'
                   for i, text in enumerate(texts))


def _devices(resources: Sequence[Resource]) -> str:
    """Notes on the device of each latency."""
    notes = [each.device.note for each in resources if each.device is not None]
    return '\n'.join(f'<p class="soft note">{html.escape(note)}</p>' for note in notes)


def _shares(edges: Sequence[float], probabilities: Sequence[float], resource: Resource) -> str:
    """The last distribution P over budget groups, as a section with a bar for each group."""
    rows = []
    for k, share in enumerate(probabilities):
        bounds = f'{resource.format(edges[k])} to {resource.format(edges[k + 1])}'
        bar = f'<span class="track"><span style="width:{100 * share / max(probabilities):.4g}%"></span></span>'
        rows.append(f'<tr><td>{k + 1}</td><td>{bounds}</td><td class="value"><span class="bar"><span>{share:.4f}</span>'
                    f'{bar}</span></td></tr>')
    head = f'<tr><th>group</th><th>{html.escape(resource.label)}</th><th class="value">P</th></tr>'
    body = '\n'.join(rows)
    table = f'<table class="bars">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    return ('<section>\n<h2>Where training drew budgets: P over groups</h2>\n'
            f'<div class="scroll">{table}</div>\n</section>')
