"""`timm-shiftnas report`: a page about a saved model."""
from __future__ import annotations

import argparse

from ..evaluation.report import MARK
from ..evaluation.tables import read_budgets_csv
from ..hub.load import SavedModel
from ..hub.report import write_report
from ..utils.run_files import FRONT, REPORT, SEARCH, run_of
from ..utils.text import one_line

__all__ = ['run_report']


def run_report(args: argparse.Namespace) -> None:
    """Write what a model directory holds as one HTML file."""
    saved, front = SavedModel(args.directory), args.directory / SEARCH / FRONT
    try:
        rows = read_budgets_csv(front) if front.is_file() else []
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{front} is not the table of a search ({one_line(error, 200)}); remove it') from error
    output = args.output or (run_of(args.directory) or args.directory) / REPORT
    if output.is_dir() or (output.exists() and MARK.encode() not in output.read_bytes()[:1000]):
        raise ValueError(f'--output {output} exists already and is not a report; give another file')
    output.parent.mkdir(parents=True, exist_ok=True)
    write_report(output, saved, rows)
    print(f'{output}: open it in a browser')
