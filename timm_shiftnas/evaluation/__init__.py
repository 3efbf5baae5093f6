"""Evaluation of a supernet: accuracy of subnets, search for the best ones, tables and pictures of a run.

`accuracy`, `archs` and `search` are not imported here: they need `timm.task`, which saving and loading models does not.
"""
from .plots import plot_accuracy, plot_front, plot_shift
from .tables import COLUMNS, format_table, read_budgets_csv, write_budgets_csv, write_shift_csv

__all__ = [
    'COLUMNS', 'format_table', 'plot_accuracy', 'plot_front', 'plot_shift', 'read_budgets_csv',
    'write_budgets_csv', 'write_shift_csv',
]
