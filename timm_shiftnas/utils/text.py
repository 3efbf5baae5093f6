"""Text of messages."""
from __future__ import annotations

__all__ = ['one_line']


def one_line(message: object, limit: int | None = None) -> str:
    """A message, such as an error of another library, as one line of at most `limit` characters."""
    return ' '.join(str(message).split())[:limit]
