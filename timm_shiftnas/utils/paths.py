"""Paths as users type them."""
from __future__ import annotations

import os

__all__ = ['expand_home']


def expand_home(path: str | os.PathLike) -> str:
    """A path whose leading '~' or '~user' is replaced by that home directory.

    Shells leave the '~' in `--output=~/runs`, in YAML files and in Python.

    Raises:
        ValueError: If there is no such home directory; the path would create a folder with the name '~user'.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded.startswith('~'):
        user = expanded.partition('/')[0]
        raise ValueError(f'{path!r}: there is no home directory {user!r}; type ./{user} for a folder of that name')
    return expanded
