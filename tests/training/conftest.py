"""Trainings of these tests draw no pictures, which would be a fifth of their time.

Those that a module's own fixtures start still do: they run before the fixture below.
"""
import sys

import pytest

from timm_shiftnas.evaluation import plots


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch):
    """An environment in which matplotlib is not installed."""
    plots._has_matplotlib.cache_clear()
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    yield
    plots._has_matplotlib.cache_clear()
