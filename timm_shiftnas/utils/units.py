"""Counts, bytes and times with units, parsed and formatted for users."""
from __future__ import annotations

import math
import re
from contextlib import suppress
from reprlib import repr as short
from typing import SupportsFloat

__all__ = ['KINDS', 'format_count', 'format_quantity', 'parse_count', 'parse_quantity', 'scale_of']

_QUANTITY = re.compile(r'\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Zµ]*)\s*')
# By kind of quantity: the units in lower case, and numbers that are given as examples.
_UNITS = {
    'count': {'': 1, 'k': 10 ** 3, 'm': 10 ** 6, 'g': 10 ** 9, 't': 10 ** 12},
    'bytes': {'': 1, 'b': 1, 'kb': 10 ** 3, 'mb': 10 ** 6, 'gb': 10 ** 9, 'kib': 2 ** 10, 'mib': 2 ** 20,
              'gib': 2 ** 30},
    'seconds': {'': 1, 's': 1, 'ms': 1e-3, 'us': 1e-6, 'µs': 1e-6},
}
KINDS = tuple(_UNITS)
_EXAMPLES = {
    'count': "a positive number such as 1.4e9 or '1.4G'", 'bytes': "bytes such as '5MB' or '64MiB'",
    'seconds': "a time such as '8ms' or '0.8s'"}
_FORMATS = {
    'count': (('G', 1e9), ('M', 1e6), ('k', 1e3), ('', 1)), 'bytes': (('GB', 1e9), ('MB', 1e6), ('kB', 1e3), ('B', 1)),
    'seconds': (('s', 1), ('ms', 1e-3), ('us', 1e-6))}


def parse_count(value: SupportsFloat | str, name: str = 'flops') -> float:
    """Parse a budget: `1.4e9`, `'1.4G'`, `'1400M'`, `'1400000000'` and `Decimal('1.4e9')` are equal.

    Args:
        value: A number of any library, such as a tensor without dimensions, or a string with an optional unit of k, M,
            G or T.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `value` is not a positive, finite number.
    """
    return parse_quantity(value, 'count', name)


def parse_quantity(value: SupportsFloat | str, kind: str, name: str) -> float:
    """Parse a budget of a kind: a 'count' as `parse_count`, 'bytes' such as '5MB', or 'seconds' such as '8ms'.

    >>> parse_quantity('64MiB', 'bytes', 'memory')
    67108864.0

    Args:
        value: A number of any library (in bytes or seconds), or a string with a unit of that kind.
        kind: 'count', 'bytes' or 'seconds'.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: If `value` is not a positive, finite number with a unit of that kind.
    """
    number = math.nan
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match and match[2].lower() in _UNITS[kind]:
            number = float(match[1]) * _UNITS[kind][match[2].lower()]
    elif (isinstance(value, SupportsFloat) and getattr(value, 'ndim', 0) == 0
          and 'bool' not in str(getattr(value, 'dtype', type(value)))):
        with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # 10 ** 400, a tensor without data
            number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f'{name}={short(value)} is not a budget; give {_EXAMPLES[kind]}')
    return number


def format_count(value: float) -> str:
    """Format a count with four digits and a unit: 1281241344 -> '1.281G'."""
    return format_quantity(value, 'count')


def format_quantity(value: float, kind: str) -> str:
    """Format a 'count', 'bytes' or 'seconds' with four digits and a unit: 0.0081239 s -> '8.124ms'."""
    scale, unit = scale_of(value, kind)
    return f'{value / scale:.4g}{unit}'


def scale_of(value: float, kind: str) -> tuple[float, str]:
    """The largest unit of a kind that is not above a value, and its name."""
    return next(((scale, unit) for unit, scale in _FORMATS[kind] if value >= scale), _FORMATS[kind][-1][::-1])
