"""The tables of a run, as text and as CSV.

A *row* is one evaluated subnet, a dict with the keys

* `name`: 'smallest', 'group 1', 'group 2', ..., 'largest';
* `budget`: the upper limit of its MACs, or of another resource, or `None`;
* `macs`, `params`: counts of the subnet;
* the name of that other resource, such as `latency` (seconds) or `memory` (bytes);
* `top1`, `top5`: accuracy in percent; of tasks other than classification, `score` in percent;
* `arch`: `Arch.to_dict()`.
"""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..space.resources import MACS, NAMES, Resource
from ..utils.files import atomic_write
from ..utils.units import format_count

__all__ = ['COLUMNS', 'format_table', 'read_budgets_csv', 'score_columns', 'write_budgets_csv', 'write_shift_csv']

Row = Mapping[str, Any]
COLUMNS = ('name', 'budget', 'macs', 'params', 'top1', 'top5', 'arch')
# one of them, where budgets bound it
RESOURCE_COLUMNS = tuple(name for name in NAMES if name not in COLUMNS)


def score_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The keys of rows that hold percentages, the most important one first."""
    return ('score',) if rows and 'score' in rows[0] else ('top1', 'top5')


def format_table(rows: Sequence[Row], resource: Resource = MACS, metric: str = 'score') -> str:
    """Format rows as aligned text: name, budget, MACs, params, the resource of the budgets, and percentages.

    There is no final newline.

    Args:
        rows: The rows.
        resource: What the budgets bound.
        metric: What the `score` is called.
    """
    scores = score_columns(rows)
    titles = [dict(top1='top-1', top5='top-5', score=metric)[name] for name in scores]
    further = [resource] if rows and resource.name in {*rows[0]} - {*COLUMNS} else []
    cells: list[tuple[str, ...]] = [('name', 'budget', 'MACs', 'params', *(each.name for each in further), *titles)]
    for row in rows:
        budget = '-' if row['budget'] is None else resource.format(row['budget'])
        counts = format_count(row['macs']), format_count(row['params']), *(
            each.format(row[each.name]) for each in further)
        cells.append((row['name'], budget, *counts, *(f'{row[name]:.2f}' for name in scores)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return '\n'.join(
        '  '.join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in cells)


def write_budgets_csv(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Write rows as CSV with a header line. The arch is JSON, a missing budget an empty cell."""
    further = (name for name in RESOURCE_COLUMNS if rows and name in rows[0])
    columns = (*COLUMNS[:4], *score_columns(rows), 'arch', *further)
    with atomic_write(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        for row in rows:
            writer.writerow({**{column: row[column] for column in columns}, 'arch': json.dumps(row['arch'])})


def read_budgets_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the rows that `write_budgets_csv` wrote."""
    with open(path, newline='', encoding='utf-8') as file:
        return [
            dict(row, budget=float(row['budget']) if row['budget'] else None, macs=int(row['macs']),
                 params=int(row['params']), arch=json.loads(row['arch']), **{
                     name: float(row[name]) for name in (*score_columns([row]), *RESOURCE_COLUMNS) if name in row})
            for row in csv.DictReader(file)]


def write_shift_csv(path: str | os.PathLike, history: Sequence[tuple[int, Sequence[float]]]) -> None:
    """Write the history of P as CSV: the optimizer update from which on it was in effect, and P_1 ... P_K."""
    with atomic_write(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['update', *(f'group {k + 1}' for k in range(len(history[0][1])))])
        writer.writerows([update, *(f'{p:.6g}' for p in probabilities)] for update, probabilities in history)
