"""Text of messages."""
from __future__ import annotations

from typing import Any

__all__ = ['one_line', 'printable']


def one_line(message: object, limit: int | None = None) -> str:
    """A message, such as an error of another library, as one line of at most `limit` characters."""
    return printable(' '.join(str(message).split()))[:limit]


def printable(data: Any) -> Any:
    """JSON data with its control characters escaped, so that a foreign file cannot control the terminal."""
    if isinstance(data, str):
        return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in data)
    if isinstance(data, dict):
        return {printable(name): printable(value) for name, value in data.items()}
    return [printable(value) for value in data] if isinstance(data, list) else data
