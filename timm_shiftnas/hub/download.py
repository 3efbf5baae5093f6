"""Retries and error hints for the Hugging Face Hub."""
from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..utils.paths import expand_home
from .format import CONFIG, KEY

__all__ = ['HubOptions', 'check_repo_id', 'download', 'is_transient', 'retry', 'with_hints']

_logger = logging.getLogger(__name__)
Result = TypeVar('Result')


@dataclass
class HubOptions:
    """Keyword arguments of `huggingface_hub.hf_hub_download`."""
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        self.cache_dir = None if self.cache_dir is None else expand_home(self.cache_dir)


def check_repo_id(name: str | os.PathLike) -> None:
    """Raise a `ValueError` unless `name` can be a repository."""
    try:
        validate_repo_id(name)
        valid = '/' in name
    except errors.HFValidationError:  # for a path, too
        valid = False
    if not valid:
        raise ValueError(f"{str(name)!r} is neither a directory nor a repository 'owner/name' on the Hugging Face Hub")


def download(repo_id: str, name: str, options: HubOptions) -> Path:
    """`hf_hub_download` with retries and hints, and with a warning where the cache may hold an older commit."""
    with with_hints(repo_id, name):
        return Path(_cached(repo_id, name, options) or retry(
            hf_hub_download, repo_id, name, library_name=KEY, **vars(options)))


def _cached(repo_id: str, name: str, options: HubOptions) -> str | None:
    """A file of a branch from the cache, if the branch has not moved or the Hub does not answer.

    huggingface_hub falls back to its cache too, but silently, so that the user may get an older commit than expected.
    The HEAD request here replaces that of huggingface_hub; a second one follows only if the branch has moved.
    """
    if options.force_download or options.local_files_only or is_commit(options.revision):
        return None
    path = try_to_load_from_cache(repo_id, name, cache_dir=options.cache_dir, revision=options.revision)
    if not isinstance(path, str):
        return None
    commit = Path(path).parent.name
    try:
        found = get_hf_file_metadata(
            hf_hub_url(repo_id, name, revision=options.revision), token=options.token, library_name=KEY)
        return path if found.commit_hash == commit else None
    except (errors.OfflineModeIsEnabled, errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError):
        return None  # offline on purpose, or not there: hf_hub_download knows
    except Exception as error:
        if not isinstance(error, errors.HfHubHTTPError) and not _from_http_library(error):
            raise
        _logger.warning(
            f'{repo_id}: loading commit {commit} from the cache, but {options.revision or "main"!r} may have a newer '
            f'one: the Hub did not answer ({type(error).__name__}). {_hint(error, name)}')
        return path


def is_commit(revision: str | None) -> bool:
    return re.fullmatch('[0-9a-f]{40}', revision or '') is not None


def matches_etag(path: Path, content: bytes) -> bool:
    """Whether a file in the cache has the content that the Hub named, as far as the cache shows it.

    The cache stores a file under its ETag and links to it. The ETag is the git object id of a small file, the sha256 of
    a large one, and a plain sha1 on some mirrors. Without links (on Windows), nothing is known.
    """
    etag = Path(os.readlink(path)).name if path.is_symlink() else ''
    if is_commit(etag):
        return etag in (git_hash(content), hashlib.sha1(content).hexdigest())
    return not re.fullmatch('[0-9a-f]{64}', etag) or etag == hashlib.sha256(content).hexdigest()


def retry(call: Callable[..., Result], repo_id: str, *args: Any, unless: Callable[[Exception], bool] | None = None,
          **kwargs: Any) -> Result:
    """`call(repo_id, *args, **kwargs)`, with two more tries after transient errors, `unless` another could do harm."""
    for wait in (1, 3):
        try:
            return call(repo_id, *args, **kwargs)
        except Exception as error:
            if not is_transient(error) or unless is not None and unless(error):
                raise
            _logger.warning(f'{repo_id}: {type(error).__name__}; trying again in {wait} s')
            time.sleep(wait)
    return call(repo_id, *args, **kwargs)


def is_transient(error: BaseException) -> bool:
    """Whether another try may succeed: the server had a fault, or the connection was cut."""
    error = _cause(error)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return False  # without a connection, huggingface_hub has tried for long enough
    if isinstance(error, errors.HfHubHTTPError):
        return status_of(error) == 429 or status_of(error) >= 500
    return _from_http_library(error) or isinstance(error, OSError) and 'Consistency check failed' in str(error)


def status_of(error: BaseException) -> int:
    """The HTTP status of an error, 0 without an answer."""
    return getattr(getattr(error, 'response', None), 'status_code', 0)


def _cause(error: BaseException) -> BaseException:
    """The server's error, where huggingface_hub reports a missing cache entry instead."""
    hidden = isinstance(error, errors.LocalEntryNotFoundError) or 'Force download failed' in str(error)
    return error.__cause__ if hidden and isinstance(error.__cause__, errors.HfHubHTTPError) else error


def _from_http_library(error: BaseException) -> bool:
    """Whether the HTTP library raised an error; which library depends on the version of huggingface_hub."""
    return type(error).__module__.partition('.')[0] in ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')


@contextmanager
def with_hints(repo_id: str, file: str = '') -> Iterator[None]:
    """Append a hint to errors, such as one about `file`; raise those of the HTTP library as a `ConnectionError`."""
    try:
        yield
    except Exception as error:
        found = _cause(error)
        if _from_http_library(found) and not isinstance(found, OSError):
            raise ConnectionError(f'{repo_id}: {type(found).__name__}: {found}; {_hint(found, file)}') from error
        append_line(found, _hint(found, file))
        if found is error:
            raise
        raise found from None


def append_line(error: BaseException, line: str) -> None:
    """Extend the message of an error in place."""
    if error.args and line:
        error.args = (f'{error.args[0]}\n{line}', *error.args[1:])


def _hint(error: BaseException, file: str) -> str:
    """What to do about an error, where huggingface_hub does not say it."""
    if isinstance(error, errors.RevisionNotFoundError):
        return 'check revision=: a branch, a tag or a commit to load; a branch or refs/pr/N to push'
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ('the repository holds no model of timm_shiftnas; load others with timm.create_model' if file == CONFIG
                else f'{file} was removed from the repository; give a revision= that has it')
    if isinstance(error, errors.RepositoryNotFoundError) or status_of(error) in (401, 403):
        return 'check the name and the access; give another token=, or log in again (hf auth login)'
    return 'the connection failed: try again' if _from_http_library(error) else ''
