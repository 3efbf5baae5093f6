"""The commands of `timm-shiftnas`: elastic, info, extract, evaluate, search, export, measure, report, push, convert.

Their parser is in `timm_shiftnas_cli`, which is fast to import.
"""
from .elastic import run_elastic
from .evaluate import run_evaluate
from .export import run_export
from .info import describe, run_info
from .measure import run_measure
from .report import run_report
from .search import run_search
from .subnets import run_convert, run_extract, run_push

__all__ = ['COMMANDS', 'describe']

COMMANDS = dict(
    elastic=run_elastic, info=run_info, extract=run_extract, convert=run_convert, push=run_push, evaluate=run_evaluate,
    search=run_search, export=run_export, measure=run_measure, report=run_report)
