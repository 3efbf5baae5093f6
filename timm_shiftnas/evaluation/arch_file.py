"""A file of measurements of archs, which survives a kill."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..space.core import Arch, SearchSpace
from ..utils.files import atomic_write

__all__ = ['ArchFile']


class ArchFile:
    """Numbers by arch in a file of JSON lines, each written when it is known.

    The first line says what they were measured with. A kill may cut off the last line, which is then ignored.

    Args:
        path: The file; created with the first arch.
        measured_with: JSON data that the numbers depend on, besides the arch.
        names: Names of the numbers.
        remedy: What to do if the file holds something else, for the error message.

    Raises:
        ValueError: If there is no folder for it, or it holds other numbers, or some that were measured with something
            else.
    """

    def __init__(
            self, path: str | os.PathLike, measured_with: Mapping[str, Any], names: tuple[str, ...], remedy: str,
    ) -> None:
        self.path, self.names, self._header = Path(path), names, json.dumps(dict(measured_with))
        if not self.path.parent.is_dir():
            raise ValueError(f'{self.path.parent} is no folder; create it, or give a file in another one')
        text = self.path.read_text(encoding='utf-8') if self.path.exists() else ''
        whole = text[:text.rfind('\n') + 1]
        cut_off = self._header.startswith(text)  # a kill while the first line was written; other text is not ours
        header, *lines = whole.splitlines() or [self._header if cut_off else text]
        try:
            found, rows = json.loads(header), [json.loads(line) for line in lines]
            own = json.loads(self._header)
            different = [name for name in own | found if own.get(name) != found.get(name)]
            self._rows = [(row['arch'], tuple(row[name] for name in names)) for row in rows]
        except (AttributeError, KeyError, TypeError, ValueError):
            different = ['settings']
        if different:
            raise ValueError(
                f'{self.path} holds what was measured with other {" and ".join(different)}; {remedy}, or remove it')
        if whole != text:
            with atomic_write(self.path) as temporary:
                temporary.write_text(whole, encoding='utf-8')

    def read(self, space: SearchSpace) -> dict[Arch, tuple[float, ...]]:
        """The numbers that were in the file when it was opened."""
        return {space.from_dict(arch): numbers for arch, numbers in self._rows}

    def append(self, arch: Arch, numbers: tuple[float, ...]) -> None:
        """Write the numbers of an arch."""
        row = dict(zip(self.names, numbers, strict=True), arch=arch.to_dict())
        with open(self.path, 'a', encoding='utf-8') as file:
            if not file.tell():
                file.write(self._header + '\n')
            file.write(json.dumps(row) + '\n')
