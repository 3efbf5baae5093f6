"""Counts with units, as users type and read them."""
from __future__ import annotations

import math
import re

__all__ = ['format_count', 'parse_count']

_UNITS = {'': 1, 'k': 10 ** 3, 'm': 10 ** 6, 'g': 10 ** 9, 't': 10 ** 12}


def parse_count(value: int | float | str, name: str = 'flops') -> float:
    """A budget as a number: `1.4e9`, `'1.4G'`, `'1400M'` and `'1400000000'` are the same.

    Raises:
        ValueError: If `value` is not a positive, finite number with an optional unit of k, M, G or T.
    """
    number = math.nan
    if isinstance(value, str):
        match = re.fullmatch(r'\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMgGtT]?)\s*', value)
        try:
            number = float(match[1]) * _UNITS[match[2].lower()] if match else math.nan
        except ValueError:
            pass
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}={value!r} is not a budget; give a positive number such as 1.4e9 or '1.4G'")
    return number


def format_count(value: float) -> str:
    """A count in the unit a reader expects: 1281241344 -> '1.281G'."""
    for unit, scale in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= scale:
            return f'{value / scale:.4g}{unit}'
    return f'{value:.4g}'
