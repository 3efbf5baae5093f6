"""YAML files of settings."""
from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .paths import expand_home
from .text import one_line

__all__ = ['read_yaml']


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != '<<']
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f'{key.value!r} appears twice; remove one of the lines', key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike) -> dict[Any, Any]:
    """Read a file of `name: value` lines; an empty file holds none.

    Raises:
        ValueError: If it cannot be read, is not YAML, holds something else, or holds a key twice.
    """
    try:
        values = yaml.load(Path(expand_home(path)).read_text(encoding='utf-8'), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'cannot read {str(path)!r}: {one_line(error)}') from None
    if not isinstance(values, dict | None):
        raise ValueError(f'{str(path)!r} must hold "name: value" lines, such as "epochs: 10"')
    return values or {}
