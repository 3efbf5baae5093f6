"""Publishing on the Hugging Face Hub: one commit with a model directory, its table, its pictures and a model card.

Uploads, commits and cards are huggingface_hub's; what is here says what goes up, and what became of it. Nothing pickled
is ever uploaded.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from ..evaluation.plots import plot_accuracy
from ..evaluation.tables import write_budgets_csv
from ..method.generator import ArchitectureGenerator
from .card import ACCURACY, CARD, MARK, SHIFT, TABLE, model_card
from .download import again, append_line, explained
from .load import BN_STATS, CONFIG, GENERATOR, KEY, SavedModel, check_repo_id, git_id, save_pretrained

__all__ = ['published_files', 'push_directory', 'push_to_hub']

_logger = logging.getLogger(__name__)


def push_to_hub(
        repo_id: str,
        net: nn.Module,
        generator: ArchitectureGenerator | None = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        license: str | None = None,
        **saved: Any,
) -> str:
    """Publish a supernet and its generator, or an extracted subnet: in one commit, with a model card.

    Args:
        repo_id: 'owner/name'; made if it does not exist.
        net, generator, **saved: As for `save_pretrained`.
        private, revision, token, create_pr, commit_message, license: As for `push_directory`.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: As `save_pretrained` does.
        huggingface_hub.errors.HfHubHTTPError: As `push_directory` does.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(Path(folder, 'model'), net, generator, **saved)
        return push_directory(
            folder, repo_id, private=private, revision=revision, token=token, create_pr=create_pr,
            commit_message=commit_message, license=license)


def push_directory(
        directory: str | os.PathLike,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        license: str | None = None,
) -> str:
    """Publish what `save_pretrained` or `train.py` wrote: in one commit, or none if the repository has it already.

    Every file is checked against `config.json` first. The table and the accuracy picture are made from the results in
    it; the picture of the shift is taken from the directory of the training. Files of an earlier model of ours that
    this one lacks are deleted; nothing else is, and a README.md that is not ours stays.

    Args:
        directory: A directory of `save_pretrained`, or one of `train.py` with such a directory `model`.
        repo_id: 'owner/name'; made if it does not exist.
        private: Whether to make it private, if it is made.
        revision: Branch; default is 'main'. One that does not exist is made, from 'main'.
        token: As for huggingface_hub.
        create_pr: Open a pull request instead of committing; it is to 'main' of a repository that exists.
        commit_message: Default says what it is.
        license: For the card: one of the Hub's names, such as 'apache-2.0'.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: If the directory holds no whole model, or `repo_id` or `revision` cannot be pushed to.
        huggingface_hub.errors.HfHubHTTPError: Whatever the Hub refuses, with a line that says what to do, and whether
            the commit exists.
    """
    check_repo_id(repo_id)
    if revision and re.fullmatch('[0-9a-f]{40}', revision):
        raise ValueError(f'revision={revision!r} is a commit, to which nothing can be pushed; give a branch')
    if create_pr and revision not in (None, 'main'):
        raise ValueError(f"a pull request is to 'main'; leave revision={revision!r} or create_pr out")
    directory = Path(directory).resolve()
    if not directory.is_dir():
        raise ValueError(f'{directory} is not a directory; give one that save_pretrained or train.py wrote')
    run = directory if not (directory / CONFIG).exists() else directory.parent
    if directory == run:
        directory = run / 'model'
    trained = run if directory.name == 'model' and (run / 'summary.csv').exists() else None
    saved = SavedModel(directory)
    files = published_files(saved, repo_id, trained, license)
    api = HfApi(token=token, library_name=KEY)
    made: list[str] = []
    with _explained_before_the_commit(repo_id, made, create_pr):
        info = _target(api, repo_id, revision, private, create_pr, made)
        stale = _clear(api, info.id, info.sha, files)
    repo_id, before = info.id, info.sha
    message = commit_message or f'{saved.config["architecture"]} by {KEY}'
    operations = [CommitOperationAdd(name, io.BytesIO(content)) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    try:
        with explained(repo_id):
            # on top of what was looked at: two pushes at once must not mix their files
            commit = again(
                repo_id, api.create_commit, repo_id, operations, commit_message=message, revision=revision,
                create_pr=create_pr, parent_commit=before, unless=_was_sent)
            return commit.pr_url or commit.commit_url
    except Exception as error:
        address, said = '', _nothing_done(made, create_pr)
        status = getattr(getattr(error, 'response', None), 'status_code', 500)
        if status == 412:
            said += '; it changed meanwhile: push again'
        elif status >= 500 and _was_sent(error):  # or no answer at all
            address = None if create_pr else _commit_after(api, repo_id, revision, before, files)
        if address:
            _logger.warning(
                f'the answer of the Hub was lost ({type(error).__name__}), but the commit exists: {address}')
            return address
        if address is None:
            what = 'pull request' if create_pr else 'commit'
            said = f'whether the {what} exists could not be found out: see its page'
        append_line(error, f'{repo_id}: {said}')
        raise


@contextmanager
def _explained_before_the_commit(repo_id: str, made: list[str], create_pr: bool) -> Iterator[None]:
    """`explained`, with the word that nothing was committed, and what was `made` for it."""
    try:
        with explained(repo_id):
            yield
    except Exception as error:
        append_line(error, f'{repo_id}: {_nothing_done(made, create_pr)}')
        raise


def _nothing_done(made: Sequence[str], create_pr: bool) -> str:
    said = 'no commit and no pull request was made' if create_pr else 'no commit was made'
    return '; '.join([said, *made]) if made else f'it is as it was: {said}'


def _target(api: HfApi, repo_id: str, revision: str | None, private: bool | None, create_pr: bool,
            made: list[str]) -> ModelInfo:
    """What is to be committed to, as it is before; repository and branch are made, and told in `made`, if need be."""
    try:
        info = again(repo_id, api.repo_info, repo_id)
    except RepositoryNotFoundError as error:
        if create_pr or isinstance(error, GatedRepoError):
            raise
        try:
            again(repo_id, api.create_repo, repo_id, private=private)
            made.append('the repository is new and empty: push again, or delete it')
        except HfHubHTTPError as refused:
            if refused.response.status_code != 409:
                raise
            # it is there, but hidden from this token, or the answer to a first attempt was lost: the next line tells
        info = again(repo_id, api.repo_info, repo_id)
        if not made:
            made.append('the repository is new')
    if private and not info.private:
        raise ValueError(f'{repo_id} is public already: make it private on its page, or publish without private')
    if revision in (None, 'main'):
        return info
    try:
        return again(repo_id, api.repo_info, repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision.startswith('refs/'):
            raise
        again(repo_id, api.create_branch, repo_id, branch=revision, exist_ok=True)
        made.append(f'its branch {revision!r} is new, with what main has')
        return again(repo_id, api.repo_info, repo_id, revision=revision)


def _clear(api: HfApi, repo_id: str, commit: str, files: dict[str, bytes]) -> set[str]:
    """Files of an earlier model of ours to delete; and no card in the place of one that is not ours."""
    present = set(again(repo_id, api.list_repo_files, repo_id, revision=commit))

    def read(name: str) -> str:
        path = again(f'{repo_id}/{name}', api.hf_hub_download, repo_id, name, revision=commit)
        return Path(path).read_text(encoding='utf-8', errors='replace')

    if CARD in present and MARK not in read(CARD):
        _logger.warning(f'{repo_id} has a {CARD} of its own, which stays')
        files.pop(CARD)
    earlier = CONFIG in present and f'"{KEY}"' in read(CONFIG)
    return {GENERATOR, BN_STATS, TABLE, ACCURACY, SHIFT} - set(files) & present if earlier else set()


def _was_sent(error: Exception) -> bool:
    """Whether a commit may be there after an error: not if it is that of an earlier request."""
    for found in (error, error.__cause__):
        try:
            return '/commit/' in found.request.url.path
        except (AttributeError, RuntimeError):  # it is of no request that is known
            pass
    return True


def _commit_after(api: HfApi, repo_id: str, revision: str | None, before: str, files: dict[str, bytes]) -> str | None:
    """After a push without an answer: the address of its commit, '' if there is none, `None` if that is not known."""
    try:
        after = again(repo_id, api.repo_info, repo_id, revision=revision).sha
        if after == before:
            return ''
        found = {file.path: file for file in again(
            repo_id, lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=after)))}
        for name, content in files.items():
            lfs = getattr(found.get(name), 'lfs', None)
            own = hashlib.sha256(content).hexdigest() if lfs else git_id(content)
            if name not in found or own != (lfs.sha256 if lfs else found[name].blob_id):
                return None
        return f'{api.endpoint}/{repo_id}/commit/{after}'
    except Exception:
        return None


def published_files(saved: SavedModel, repo_id: str, run: Path | None, license: str | None) -> dict[str, bytes]:
    """What a repository gets, by name: the checked files, table, pictures and card.

    Args:
        saved: The model.
        repo_id: The repository, for the card.
        run: The directory of its training, if there is one.
        license: For the card.
    """
    files = {name: saved.read(name) for name in saved.info['files']}
    for name in files:
        saved.tensors(name)  # tensors and nothing else
    files[CONFIG] = Path(saved.name, CONFIG).read_bytes()
    results = saved.info.get('results')
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        if results:
            write_budgets_csv(folder / TABLE, results)
            if saved.kind == 'supernet':
                plot_accuracy(folder / ACCURACY, results)
        if run is not None and (run / SHIFT).is_file():
            (folder / SHIFT).write_bytes((run / SHIFT).read_bytes())
        files |= {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files[CARD] = str(model_card(saved, repo_id, set(files), license)).encode()
    return files


# -- the model card ----------------------------------------------------------------------------------------------------


