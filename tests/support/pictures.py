"""Leaving out pictures, which take longer to draw than a network of the tests takes to train."""
import sys
from contextlib import contextmanager

from timm_shiftnas.evaluation import plots


@contextmanager
def without_matplotlib():
    """An environment in which matplotlib cannot draw, as if it was not installed."""
    kept = sys.modules.get('matplotlib.figure')
    plots._has_matplotlib.cache_clear()
    sys.modules['matplotlib.figure'] = None  # makes the import fail
    try:
        yield
    finally:
        sys.modules.pop('matplotlib.figure', None)
        if kept is not None:
            sys.modules['matplotlib.figure'] = kept
        plots._has_matplotlib.cache_clear()
