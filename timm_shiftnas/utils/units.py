"""Counts with units, parsed and formatted for users."""
from __future__ import annotations

import math
import re
from contextlib import suppress
from reprlib import repr as short
from typing import SupportsFloat

__all__ = ['format_count', 'parse_count']

_COUNT = re.compile(r'\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([kKmMgGtT]?)\s*')
_UNITS = {'': 1, 'k': 10 ** 3, 'm': 10 ** 6, 'g': 10 ** 9, 't': 10 ** 12}


def parse_count(value: SupportsFloat | str, name: str = 'flops') -> float:
    """Parse a budget: `1.4e9`, `'1.4G'`, `'1400M'`, `'1400000000'` and `Decimal('1.4e9')` are equal.

    Args:
        value: A number of any library, such as a tensor without dimensions, or a string with an optional unit of k, M,
            G or T.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `value` is not a positive, finite number.
    """
    number = math.nan
    if isinstance(value, str):
        if match := _COUNT.fullmatch(value):
            number = float(match[1]) * _UNITS[match[2].lower()]
    elif (isinstance(value, SupportsFloat) and getattr(value, 'ndim', 0) == 0
          and 'bool' not in str(getattr(value, 'dtype', type(value)))):
        with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # 10 ** 400, a tensor without data
            number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{name}={short(value)} is not a budget; give a positive number such as 1.4e9 or '1.4G'")
    return number


def format_count(value: float) -> str:
    """Format a count with four digits and a unit: 1281241344 -> '1.281G'."""
    for unit, scale in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= scale:
            return f'{value / scale:.4g}{unit}'
    return f'{value:.4g}'
