"""Atomic writing of files, a lock on a folder, and a check of zip files."""
from __future__ import annotations

import errno
import os
import secrets
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

__all__ = ['FolderLock', 'atomic_write', 'find_cause', 'name_disk_errors', 'zip_is_intact']

DISK_ERRORS = {
    errno.ENOSPC: 'the disk is full', errno.EDQUOT: 'the disk is full: the quota is used up',
    errno.EROFS: 'the file system is read-only',
}
LOCK = '.lock'
LOCKED_BYTE = 1 << 30  # Windows refuses to read locked bytes, so the lock lies behind the text


class DiskError(OSError):
    """A full or read-only disk."""

    def __str__(self) -> str:
        return f'{self.strerror}: {self.filename}'


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends, and is removed if the block fails.

    The temporary file is new and empty and has a random name, `.NAME.RANDOM.tmp`. A link with this name, or at `path`,
    is never followed.

    Raises:
        OSError: If it cannot be written; a full or read-only disk is named as such.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{secrets.token_hex(8)}.tmp')
    with name_disk_errors(path):
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # the error of the block says more
                temporary.unlink(missing_ok=True)


@contextmanager
def name_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Replace the error of a full or read-only disk by one in plain words that names `path`.

    torch's writer raises a `RuntimeError` on top of an `OSError` or of Ctrl-C. The original error is raised instead.
    """
    try:
        yield
    except Exception as error:
        cause = find_cause(error, OSError, KeyboardInterrupt)
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            cause = DiskError(cause.errno, f'{DISK_ERRORS[cause.errno]} ({os.strerror(cause.errno)})', str(path))
        elif cause is None or cause is error:
            raise
        raise cause from None


def find_cause(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first error of some kinds in the chain of an error, beginning with that error; `None` if there is none."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


class FolderLock:
    """A lock on a folder, which the operating system releases when the process ends, however it ends.

    It is held by the file `.lock` in the folder. Processes that this one starts do not inherit it: workers that
    outlive a killed run for some seconds do not block its continuation.

    Args:
        folder: An existing folder.

    Raises:
        BlockingIOError: If another process has locked the folder; the message names it.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder, LOCK)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0)
        self._file = open(os.open(self.path, flags, 0o666), 'r+b', buffering=0)
        try:
            if fcntl is not None:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                self._file.seek(LOCKED_BYTE)
                msvcrt.locking(self._file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                self._file.seek(0)
                holder = self._file.read(200).decode(errors='replace')
                self._file.close()
                raise BlockingIOError(f'{holder or "another process"} is writing to {folder}') from None
        else:  # another error means a file system without locks
            with suppress(OSError):  # a full disk
                self._file.seek(0)
                self._file.truncate()
                self._file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())

    @property
    def held(self) -> bool:
        """Whether the locked file is still in the folder: another program may have removed the folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def release(self) -> None:
        self._file.close()


def zip_is_intact(path: str | os.PathLike) -> bool:
    """Whether every member of a zip file, such as a checkpoint, still matches its checksum.

    `torch.load` does not verify checksums: a flipped bit would silently change a weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
