"""Evaluation of a run that trains one network, and the files that it writes."""
from __future__ import annotations

from typing import Any

from torch import nn

from ..evaluation.accuracy import evaluate
from ..evaluation.tables import write_budgets_csv
from ..models import static_counts
from ..space.resources import MACS
from ..utils.run_files import TABLE
from .results import Results

__all__ = ['NetworkResults']


class NetworkResults(Results):
    """Evaluates a single network: its table has one row, and there are no pictures."""
    metrics = ('top1', 'top5')
    resource = MACS  # in the table

    def measure(self, net: nn.Module, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        device, ranks = options.pop('device'), options.pop('ranks')
        top1, top5 = evaluate(net, self.loaders.validation, device, distributed=ranks.size > 1, **options)
        macs, params = static_counts(net)
        return [dict(name='subnet', budget=None, macs=macs, params=params, top1=top1, top5=top5,
                     arch=net.arch.to_dict())], {}

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        return {name: rows[0][name] for name in self.metrics}

    def shares(self) -> dict[str, float]:
        return {}

    def write(self, net: nn.Module, rows: list[dict[str, Any]]) -> None:
        write_budgets_csv(self.output / TABLE, rows)
        self.save(net, rows)
