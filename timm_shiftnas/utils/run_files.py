"""Names of the files in the folder of a run, some of which are also beside a published model."""
from __future__ import annotations

from pathlib import Path

__all__ = [
    'ACCURACY', 'BEFORE', 'FRONT', 'MODEL', 'REPORT', 'SEARCH', 'SHIFT', 'SHIFT_TABLE', 'SUMMARY', 'TABLE', 'run_of']

MODEL, SUMMARY = 'model', 'summary.csv'  # the model directory, and a line for every epoch
TABLE, ACCURACY, REPORT = 'budgets.csv', 'accuracy.png', 'report.html'
SHIFT_TABLE, SHIFT = 'shift.csv', 'shift.png'
BEFORE = 'before.csv'  # budgets.csv of a pretrained network before training
SEARCH, FRONT = 'search', 'front.csv'  # the folder of a search, in that of the model


def run_of(model: Path) -> Path | None:
    """The folder of the run that wrote a model directory; `None` if train.py did not write it."""
    model = model.absolute()
    return model.parent if model.name == MODEL and (model.parent / SUMMARY).exists() else None
