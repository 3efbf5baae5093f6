"""The folder of a run."""
from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from ..utils.files import FolderLock, atomic_write, name_disk_errors

__all__ = ['RunFolder']

_logger = logging.getLogger('train')


class RunFolder:
    """The folder of a run, which is locked while the run lasts. Only the first process of a run has it.

    Args:
        path: The folder; created if missing.
        flags: The content of its args.yaml.

    Raises:
        OSError: If it cannot be created, or if another run writes to it.
    """

    def __init__(self, path: Path, flags: str = '') -> None:
        self.path, self.flags = path, flags
        self.lock: FolderLock | None = None
        self.create()

    def create(self) -> None:
        with name_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = FolderLock(self.path)
        with atomic_write(self.path / 'args.yaml') as temporary:
            temporary.write_text(self.flags, encoding='utf-8')

    def restore(self) -> None:
        """Create the folder again if another program has removed it."""
        if not self.lock.held:
            _logger.warning(f'another program has removed the folder {self.path}: creating it again')
            self.create()

    def remove_temporaries(self, *names: str) -> None:
        """Remove unfinished files of a killed run: temporary files of `atomic_write`, and files of these names."""
        for path in (*self.path.glob('.*.tmp'), *(self.path / name for name in names)):
            with suppress(OSError):
                path.unlink()

    def close(self) -> None:
        """Release the lock."""
        self.lock.release()
