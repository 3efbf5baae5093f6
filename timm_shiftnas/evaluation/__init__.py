"""Accuracy of subnets (`accuracy`), the search for them (`search`), and the tables and pictures of a run."""
from .plots import plot_accuracy, plot_shift
from .tables import COLUMNS, format_table, write_budgets_csv, write_shift_csv

__all__ = ['COLUMNS', 'format_table', 'plot_accuracy', 'plot_shift', 'write_budgets_csv', 'write_shift_csv']
