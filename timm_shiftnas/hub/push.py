"""Publishing on the Hugging Face Hub: one commit with a model directory, table, pictures, report and model card.

huggingface_hub uploads and commits. Nothing pickled is ever uploaded.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, errors
from huggingface_hub.utils.sha import git_hash
from torch import nn

from ..evaluation.plots import plot_accuracy
from ..evaluation.tables import write_budgets_csv
from ..method.generator import ArchitectureGenerator
from ..space.resources import MACS
from ..utils.paths import expand_home
from ..utils.run_files import ACCURACY, MODEL, REPORT, SHIFT, TABLE, run_of
from .card import CARD, MARK, model_card
from .download import TIMEOUT, Retry, append_line, check_repo_id, http_error, is_commit, path_of, status_of
from .format import BN_STATS, CONFIG, GENERATOR, KEY, device_name
from .load import SavedModel
from .report import model_report
from .save import save_pretrained

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
    """Publish a supernet and its generator, or an extracted subnet, in one commit with a model card.

    `net`, `generator` and `saved` are as for `save_pretrained`; the rest, the result and the errors are as for
    `push_directory`.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(Path(folder, MODEL), net, generator, **saved)
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
    """Publish what `save_pretrained` or `train.py` wrote, in one commit; in none if the repository has it already.

    Every file is checked against `config.json` first. Table, accuracy picture and report show the results in it; the
    picture of the shift comes from the directory of the training. Files of an earlier model of this package that the
    new one lacks are deleted. All other files stay, and so does a README.md that this package did not write.

    Args:
        directory: A directory of `save_pretrained`, or one of `train.py` with such a directory `model`.
        repo_id: 'owner/name'; created if missing.
        private: Whether a new repository is private.
        revision: Branch; default is 'main'. A missing branch is created from 'main'.
        token: As for huggingface_hub.
        create_pr: Open a pull request to 'main' of an existing repository instead of committing.
        commit_message: Default names the model.
        license: For the card: one of the Hub's names, such as 'apache-2.0'.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: If the directory holds no valid model, or `repo_id` or `revision` cannot be pushed to.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses; the message says whether there is a commit.
    """
    check_repo_id(repo_id)
    if is_commit(revision):
        raise ValueError(f'revision={revision!r} is a commit, which cannot be pushed to; give a branch')
    if create_pr and revision not in (None, 'main'):
        raise ValueError(f"a pull request goes to 'main'; omit revision={revision!r} or create_pr")
    directory = Path(expand_home(directory)).resolve()
    if not directory.is_dir():
        raise ValueError(f'{directory} is not a directory; give one that save_pretrained or train.py wrote')
    saved = SavedModel(directory if (directory / CONFIG).exists() else directory / MODEL)
    files = published_files(saved, repo_id, run_of(Path(saved.name)), license)
    push = _Push(HfApi(token=token, library_name=KEY), Retry(repo_id), revision, create_pr)
    try:
        return push.commit(files, private, commit_message or f'{saved.config["architecture"]} by {KEY}')
    except Exception as error:
        address = push.find_commit(files) if push.parent and _may_exist(error) else ''
        if not address:
            first = '; another commit came first: push again' if status_of(error) == 412 else ''
            append_line(error, f'{repo_id}: {push.outcome(unknown=address is None)}{first}')
            raise
        _logger.warning(f'the answer of the Hub was lost ({type(error).__name__}), but the commit exists: {address}')
        return address


def _may_exist(error: Exception) -> bool:
    """Whether the commit may exist after an error: not if the Hub refused it, or an earlier request failed."""
    error = http_error(error)
    return not 0 < status_of(error) < 500 and (path_of(error) == '' or '/commit/' in path_of(error))


class _Push:
    """A push of some files.

    Attributes:
        created: What of the repository was created so far, for an error message.
        parent: The commit that the new one builds on, once it is known.
    """

    def __init__(self, api: HfApi, retry: Retry, revision: str | None, create_pr: bool) -> None:
        self.api, self.retry, self.revision, self.create_pr = api, retry, revision, create_pr
        self.created: list[str] = []
        self.parent: str | None = None

    def commit(self, files: dict[str, bytes], private: bool | None, message: str) -> str:
        """Commit files, and return the address; a README.md of others is kept, and left out of `files`."""
        info = self.ensure_repo(private)
        present = {file.rfilename for file in info.siblings or ()}
        if CARD in present and MARK not in self.content(CARD, info.sha):
            _logger.warning(f'{info.id} has its own {CARD}, which stays')
            del files[CARD]
        ours = CONFIG in present and f'"{KEY}"' in self.content(CONFIG, info.sha)
        own = {GENERATOR, BN_STATS, TABLE, ACCURACY, SHIFT, REPORT, *(name for name in present if device_name(name))}
        operations = [
            *(CommitOperationAdd(name, io.BytesIO(content)) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in sorted(own & present - {*files}) if ours)]
        # on top of this commit alone: two pushes at once must not mix their files
        self.retry.repo_id, self.parent = info.id, info.sha
        commit = self.retry(
            self.api.create_commit, operations, revision=self.revision, create_pr=self.create_pr,
            parent_commit=self.parent, commit_message=message, unless=_may_exist)
        return commit.pr_url or commit.commit_url

    def ensure_repo(self, private: bool | None) -> ModelInfo:
        """The repository state to commit on; a missing repository or branch is created, and listed in `created`."""
        try:
            info = self.info()
        except errors.RepositoryNotFoundError as error:
            if self.create_pr or isinstance(error, errors.GatedRepoError):
                raise
            self.retry(self.api.create_repo, private=private, exist_ok=True)
            self.created.append('the repository is new and empty: push again, or delete it')
            try:
                info = self.info()
            except errors.RepositoryNotFoundError:  # it existed, but is hidden from this token
                self.created.clear()
                raise
        if private and not info.private:
            raise ValueError(
                f'{self.retry.repo_id} is public already: make it private on its page, or publish without private')
        if self.revision in (None, 'main'):
            return info
        try:
            return self.info(revision=self.revision)
        except errors.RevisionNotFoundError:
            if self.revision.startswith('refs/'):
                raise
            self.retry(self.api.create_branch, branch=self.revision, exist_ok=True)
            self.created.append(f'its branch {self.revision!r} is new, with the content of main')
            return self.info(revision=self.revision)

    def info(self, **options: Any) -> ModelInfo:
        return self.retry(self.api.repo_info, timeout=TIMEOUT, **options)

    def content(self, name: str, commit: str | None) -> str:
        path = self.retry(self.api.hf_hub_download, name, revision=commit)
        return Path(path).read_text(encoding='utf-8', errors='replace')

    def find_commit(self, files: dict[str, bytes]) -> str | None:
        """After a push without an answer: the address of its commit, '' if there is none, `None` if unknown."""
        if self.create_pr:
            return None
        try:
            head = self.info(revision=self.revision, files_metadata=True)
        except Exception:  # the error of the push is raised instead
            return None
        found = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in head.siblings or ()}
        same = all(found.get(name) in (git_hash(content), hashlib.sha256(content).hexdigest())
                   for name, content in files.items())
        return '' if head.sha == self.parent else f'{self.api.endpoint}/{head.id}/commit/{head.sha}' if same else None

    def outcome(self, unknown: bool) -> str:
        """What a push that failed has left behind."""
        if unknown:
            return f'whether the {"pull request" if self.create_pr else "commit"} exists is unknown: see its page'
        outcome = 'no commit and no pull request was created' if self.create_pr else 'no commit was created'
        return '; '.join([outcome, *self.created]) if self.created else f'it is unchanged: {outcome}'


def published_files(saved: SavedModel, repo_id: str, run: Path | None, license: str | None) -> dict[str, bytes]:
    """The content of every file to publish, by name: the checked files, table, pictures, report and card.

    `run` is the directory of the training, if there is one; `repo_id` and `license` are for the card.
    """
    model, pictures = Path(saved.name), [] if run is None else [run / SHIFT]
    for path in (model, *(model / name for name in (CONFIG, *saved.record.files)), *pictures):
        if path.is_symlink():  # it could lead to any file of the user
            raise ValueError(f'{path} is a link, and what it leads to is not published; copy it to its place')
    saved.check()
    files = {CONFIG: (model / CONFIG).read_bytes(), **{name: saved.read(name) for name in saved.record.files}}
    if results := saved.record.results:
        with TemporaryDirectory() as folder:
            write_budgets_csv(Path(folder, TABLE), results)
            if saved.kind == 'supernet':
                plot_accuracy(
                    Path(folder, ACCURACY), results, resource=saved.resource, metric=saved.record.metric,
                    beside=[MACS, *saved.latencies(saved.space)], space=saved.space)
            files |= {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        files[REPORT] = model_report(saved, repo_id=repo_id).encode()
    files |= {path.name: path.read_bytes() for path in pictures if path.is_file()}
    files[CARD] = str(model_card(saved, repo_id, set(files), license)).encode()
    return files
