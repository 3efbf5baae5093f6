"""What may go wrong between here and the Hugging Face Hub: what is tried again, and what users are told."""
from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ['again', 'append_line', 'download', 'explained']

_logger = logging.getLogger(__name__)
Result = TypeVar('Result')


def _never(error: Exception) -> bool:
    return False


def again(
        what: str, call: Callable[..., Result], *args: Any, unless: Callable[[Exception], bool] = _never,
        **kwargs: Any) -> Result:
    """The result of `call`, which is called again after a fault that may pass, `unless` that could do harm.

    `what` is its name in the log.
    """
    for wait in (1, 3):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not _may_pass(error) or unless(error):
                raise
            _logger.warning(f'{what}: {type(error).__name__}; trying again in {wait} s')
            time.sleep(wait)
    return call(*args, **kwargs)


def download(repo_id: str, name: str, **options: Any) -> str:
    """`hf_hub_download`, again after a fault that may pass; what the cache serves instead of a Hub is told."""
    return _cached(repo_id, name, **options) or again(f'{repo_id}/{name}', hf_hub_download, repo_id, name, **options)


def _cached(
        repo_id: str,
        name: str,
        *,
        revision: str | None,
        token: str | bool | None,
        library_name: str,
        cache_dir: Any = None,
        force_download: bool = False,
        local_files_only: bool = False,
) -> str | None:
    """A file as the cache has it for a branch, if the branch still is there, or if the Hub does not say.

    huggingface_hub serves its cache too when it is refused or gets no answer, but without a word, and so possibly an
    older commit than the user believes. This takes the place of its own HEAD request: one more is made only when the
    branch has moved.
    """
    if force_download or local_files_only or revision and re.fullmatch('[0-9a-f]{40}', revision):
        return None
    path = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
    if not isinstance(path, str):
        return None
    commit = Path(path).parent.name
    try:
        url = hf_hub_url(repo_id, name, revision=revision)
        return path if get_hf_file_metadata(url, token=token, library_name=library_name).commit_hash == commit else None
    except (OfflineModeIsEnabled, RemoteEntryNotFoundError, RevisionNotFoundError):
        return None  # what the user asked for, or an error of what was asked for
    except Exception as error:
        if not isinstance(error, HfHubHTTPError) and not _is_transport(error):
            raise
        _logger.warning(
            f'{repo_id}: {type(error).__name__}, so that this is commit {commit} out of the cache, and there may be a '
            f'newer one of {revision or "main"!r}; {_hint(error, name)}')
        return path


def _cause(error: BaseException) -> BaseException:
    """The server's error behind the client's: it asks its cache first, and then says that nothing is there."""
    hidden = isinstance(error, LocalEntryNotFoundError) or 'Force download failed' in str(error)
    return error.__cause__ if hidden and isinstance(error.__cause__, HfHubHTTPError) else error


def _may_pass(error: BaseException) -> bool:
    """Whether an error is one of the way there (a server's fault, a cut answer), and not of what was asked for."""
    error = _cause(error)
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return False  # there is no connection, which the client has tried for long enough
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        return status == 429 or status >= 500
    return _is_transport(error) or isinstance(error, OSError) and 'Consistency check failed' in str(error)


def _is_transport(error: BaseException | None) -> bool:
    """Whether the HTTP library raised an error, whichever this huggingface_hub uses."""
    return type(error).__module__.partition('.')[0] in ('httpx', 'httpx2', 'httpcore', 'requests', 'urllib3')


@contextmanager
def explained(repo_id: str, file: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub with a line that says what to do; those of its HTTP library as a `ConnectionError`.

    Args:
        repo_id: The repository, for messages.
        file: What is being loaded from it; `None` while publishing.
    """
    try:
        yield
    except Exception as error:
        found, hint = _cause(error), _hint(_cause(error), file)
        if _is_transport(found) and not isinstance(found, OSError):
            raise ConnectionError(f'{repo_id}: {type(found).__name__}: {found}; {hint}') from error
        if hint:
            append_line(found, hint)
        if found is error:
            raise
        raise found from None


def append_line(error: Exception, line: str) -> None:
    """Add to the message of an error, whose class stays."""
    if hasattr(error, 'append_to_message'):
        error.append_to_message(f'\n{line}')
    elif error.args:
        error.args = (f'{error.args[0]}; {line}', *error.args[1:])


def _hint(error: BaseException, file: str | None) -> str:
    if isinstance(error, GatedRepoError):
        return 'ask for access on the page of the repository, and give your token='
    if isinstance(error, RepositoryNotFoundError):
        return ('check the name; for a private repository give token= or log in (hf auth login), again if the token '
                'has expired')
    if isinstance(error, RevisionNotFoundError):
        return 'check revision=: ' + (
            'a branch, or refs/pr/N of a pull request' if file is None else 'a branch, a tag or a commit')
    if isinstance(error, RemoteEntryNotFoundError):
        if file == 'config.json':
            return 'the repository holds no model of timm_shiftnas; load others with timm.create_model'
        return f'{file} was taken out of the repository; give a revision= that has it'
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        if file is None:
            return 'publishing needs the network: switch offline mode off'
        return 'it is not in the cache: connect to the network, without local_files_only and offline mode'
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if status == 401:
        return 'the token is wrong or has expired: log in again (hf auth login), or give another token='
    if status == 403:
        return f'the token may not do this: give one that may {"write" if file is None else "read"}'
    if status is not None and (status >= 500 or status == 429):
        return 'the Hub has a fault or too much to do: try again later'
    return 'the connection failed: try again' if _is_transport(error) else ''
