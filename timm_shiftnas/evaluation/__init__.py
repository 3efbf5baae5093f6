"""Evaluation of a supernet: accuracy of subnets, search for the best ones, tables and pictures of a run."""
from .accuracy import evaluate, evaluate_budgets
from .plots import plot_accuracy, plot_shift
from .search import search_archs
from .tables import COLUMNS, format_table, write_budgets_csv, write_shift_csv

__all__ = [
    'COLUMNS', 'evaluate', 'evaluate_budgets', 'format_table', 'plot_accuracy', 'plot_shift', 'search_archs',
    'write_budgets_csv', 'write_shift_csv',
]
