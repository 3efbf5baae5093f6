"""Requests to the Hugging Face Hub: sizes before downloads, short waits, and hints in errors."""
from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub as hf
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..utils.paths import expand_home
from ..utils.text import one_line
from .format import CONFIG, KEY

__all__ = ['HubOptions', 'Retry', 'check_repo_id', 'download', 'http_error']

_logger = logging.getLogger(__name__)
Result = TypeVar('Result')
MOST_WAIT = 30  # seconds between the tries of a load or a push, in all
TIMEOUT = 8  # seconds for a first answer: three tries without one take less than 30, too


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
    with suppress(errors.HFValidationError):  # for a path, too
        validate_repo_id(name)
        if '/' in name:
            return
    raise ValueError(f"{str(name)!r} is neither a directory nor a repository 'owner/name' on the Hugging Face Hub")


def download(retry: Retry, name: str, options: HubOptions, check_size: Callable[[int], None]) -> Path:
    """A file in the cache, after `hf_hub_download` if need be.

    huggingface_hub falls back to its cache silently, so that the user may get an older commit of a branch than
    expected. Here the first request asks for the commit of the branch, and a warning says what was not answered.

    Args:
        retry: For the repository.
        name: Name of the file.
        options: Where, and which commit.
        check_size: Called with the size of the file before it is downloaded; raises an error to prevent that.
    """
    repo_id, branch = retry.repo_id, options.revision or 'main'
    cached = None if options.force_download else hf.try_to_load_from_cache(
        repo_id, name, cache_dir=options.cache_dir, revision=branch)
    path = Path(cached) if isinstance(cached, str) else None
    if name == CONFIG and not options.local_files_only and not (path and is_commit(branch)):
        try:
            found = retry(
                lambda _: hf.get_hf_file_metadata(
                    hf.hf_hub_url(repo_id, name, revision=branch), token=options.token, library_name=KEY,
                    timeout=TIMEOUT),
                tries=1 if path else 3, check_size=check_size)
            if path and found.commit_hash == path.parent.name:
                return path
        except errors.OfflineModeIsEnabled:
            pass  # hf_hub_download reads the cache
        except (errors.HfHubHTTPError, ConnectionError) as error:
            if not path or isinstance(error, (errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError)):
                raise
            _logger.warning(
                f'{repo_id}: loading commit {path.parent.name} from the cache, but {branch!r} may have a newer one: '
                f'the Hub did not answer ({one_line(error)})')
            return path
    return Path(retry(hf.hf_hub_download, name, library_name=KEY, check_size=check_size, **vars(options)))


def is_commit(revision: str | None) -> bool:
    return re.fullmatch('[0-9a-f]{40}', revision or '') is not None


def matches_etag(path: Path, content: bytes) -> bool:
    """Whether a file in the cache has the content that the Hub named, as far as the cache shows it.

    The cache stores a file under its ETag and links to it. The ETag is the git object id of a small file, the sha256 of
    a large one, and a plain sha1 on some mirrors. Without links (on Windows), nothing is known.
    """
    etag = Path(os.readlink(path)).name if path.is_symlink() else ''
    hashes = git_hash(content), hashlib.sha1(content).hexdigest(), hashlib.sha256(content).hexdigest()
    return etag in hashes or not re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', etag)


class Retry:
    """`retry(call, ...)` is `call(repo_id, ...)`, tried again after transient errors, for at most 30 seconds in all.

    huggingface_hub itself waits for minutes, or for as long as a busy server asks. A hook on its HTTP client raises the
    server's error before it does, and sees the sizes of files before they are downloaded.
    """

    def __init__(self, repo_id: str) -> None:
        self.repo_id, self.left = repo_id, float(MOST_WAIT)

    def __call__(self, call: Callable[..., Result], *args: Any, tries: int = 3,
                 unless: Callable[[Exception], bool] = lambda error: False,
                 check_size: Callable[[int], None] | None = None, **kwargs: Any) -> Result:
        """Call; do not try again `unless(error)`: if another try could do harm.

        Raises:
            ConnectionError: If there was no answer.
            Exception: Any other error, the server's if there is one, with a hint in its last line.
        """
        for attempt in itertools.count(1):
            try:
                with _responses(check_size):
                    return call(self.repo_id, *args, **kwargs)
            except Exception as raised:
                error = http_error(raised) or raised
                status, wait = status_of(error), max(3 ** (attempt - 1), _asked_wait(error))
                unanswered = isinstance(error, errors.HTTPError) and not status
                transient = unanswered or _busy(status) or 'Consistency check failed' in str(error)
                if attempt == tries or wait > self.left or not transient or unless(error):
                    if unanswered:
                        raise ConnectionError(f'{self.repo_id}: {type(error).__name__}: {error}; the connection '
                                              'failed: try again') from error
                    append_line(error, _hint(error))
                    raise error from None
                self.left -= wait
                reason = f'the Hub answered with status {status}' if status else type(error).__name__
                _logger.warning(f'{self.repo_id}: {reason}; trying again in {wait} s')
                time.sleep(wait)
        raise AssertionError('a try returns or raises')


@contextmanager
def _responses(check_size: Callable[[int], None] | None) -> Iterator[None]:
    """Check every answer of the Hub to this thread, and to threads that it starts, before huggingface_hub sees it."""
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def check(response: Any) -> None:
        if threading.get_ident() in others:
            return
        if _busy(response.status_code):
            response.read()
            hf_raise_for_status(response)
        size = response.headers.get('X-Linked-Size') or (
            None if response.is_redirect else response.headers.get('Content-Length'))
        if check_size and size and response.request.method == 'HEAD' and response.status_code < 400:
            check_size(int(size))

    hooks = hf.get_session().event_hooks['response']
    hooks.append(check)
    try:
        yield
    finally:
        hooks.remove(check)


def _busy(status: int) -> bool:
    return status == 429 or status >= 500


def http_error(error: Exception) -> Any:
    """An error, or that among its causes, of the server or of the HTTP library; `None` if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, errors.HTTPError):  # httpx's, or httpx2's in huggingface_hub 2
        found = found.__cause__
    return found


def status_of(error: Exception) -> int:
    """The HTTP status of an error, 0 without an answer."""
    return getattr(getattr(error, 'response', None), 'status_code', 0)


def path_of(error: Any) -> str:
    """The path of the request that failed; '' if it is not known."""
    with suppress(AttributeError, RuntimeError):
        return getattr(error, 'response', error).request.url.path
    return ''


def _asked_wait(error: Exception) -> int:
    """The seconds that a busy server asks to wait."""
    asked = error.response.headers.get('Retry-After', '') if status_of(error) else ''
    return int(asked) if asked.isdecimal() else 0


def append_line(error: Exception, line: str) -> None:
    """Extend the message of an error in place."""
    if error.args and line:
        error.args = (f'{error.args[0]}\n{line}', *error.args[1:])


def _hint(error: Any) -> str:
    """What to do about an error, where huggingface_hub does not say it."""
    if isinstance(error, errors.RevisionNotFoundError):
        return 'check revision=: a branch, a tag or a commit to load; a branch or refs/pr/N to push'
    if isinstance(error, errors.RemoteEntryNotFoundError):
        file = path_of(error).rpartition('/')[2]
        return ('the repository holds no model of timm_shiftnas; load others with timm.create_model' if file == CONFIG
                else f'{file} was removed from the repository; give a revision= that has it')
    if isinstance(error, errors.RepositoryNotFoundError) or status_of(error) in (401, 403):
        return 'check the name and the access; give another token=, or log in again (hf auth login)'
    if _asked_wait(error) > MOST_WAIT:
        return f'the Hub asks to wait for {_asked_wait(error)} s, and at most {MOST_WAIT} s are waited: try again later'
    return ''
