"""Text for messages."""
from __future__ import annotations

__all__ = ['one_line']


def one_line(message: object, limit: int | None = None) -> str:
    """A message, such as another library's error, as a single line of at most `limit` characters."""
    return ' '.join(str(message).split())[:limit]
