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
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData, ModelInfo,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

from . import report
from .complexity import format_count
from .generator import ArchitectureGenerator
from .hub import BN_STATS, CONFIG, GENERATOR, KEY, SavedModel, check_repo_id, git_id, save_pretrained, static_counts
from .remote import again, append_line, explained

__all__ = ['model_card', 'push_directory', 'push_to_hub']

CARD, TABLE, ACCURACY, SHIFT = 'README.md', 'budgets.csv', 'accuracy.png', 'shift.png'
MARK = f'<!-- written by {KEY}: replaced when the model is published again -->'
CITATION = '''```bibtex
@inproceedings{zhang2023shiftnas,
  title     = {ShiftNAS: Improving One-shot NAS via Probability Shift},
  author    = {Zhang, Mingyang and Yu, Xinyi and Zhao, Haodong and Ou, Linlin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}
```'''

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
            report.write_budgets_csv(folder / TABLE, results)
            if saved.kind == 'supernet':
                report.plot_accuracy(folder / ACCURACY, results)
        if run is not None and (run / SHIFT).is_file():
            (folder / SHIFT).write_bytes((run / SHIFT).read_bytes())
        files |= {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files[CARD] = str(model_card(saved, repo_id, set(files), license)).encode()
    return files


# -- the model card ----------------------------------------------------------------------------------------------------


def model_card(saved: SavedModel, repo_id: str, files: Collection[str] = (), license: str | None = None) -> ModelCard:
    """The card of a saved model: metadata that the Hub reads, the table, the pictures, how to load, how it was trained.

    Args:
        saved: The model.
        repo_id: The repository.
        files: Names of what lies beside the card: pictures among them are shown.
        license: One of the Hub's names.
    """
    training: Mapping[str, Any] = saved.info.get('training', {})
    name = saved.config['architecture']
    source, _, dataset = str(training.get('dataset', '')).partition('/')
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        license=license,
        tags=['timm', KEY, 'neural-architecture-search', 'image-classification'],
        datasets=[dataset] if source == 'hfds' else None,  # the others are none of the Hub
        model_name=name, eval_results=_eval_results(saved, training) or None)
    parts = [f'---\n{data.to_yaml()}\n---', MARK, f'# {name}', _introduction(saved)]
    if saved.info.get('results'):
        title = '## Subnets' if saved.kind == 'supernet' else '## Accuracy'
        parts += [title, _table(saved.info['results'], training)]
        if ACCURACY in files:
            parts.append(f'![top-1 against MACs]({ACCURACY})')
    if SHIFT in files:
        parts.append(f'![probability of each budget group over training]({SHIFT})')
    parts += ['## Use', _usage(saved, repo_id), '## Training', _training(training), '## Citation', CITATION]
    return ModelCard('\n\n'.join(parts) + '\n', ignore_metadata_errors=False)


def _eval_results(saved: SavedModel, training: Mapping[str, Any]) -> list[EvalResult]:
    dataset = training.get('dataset') or 'unknown'
    return [EvalResult(
        task_type='image-classification', dataset_type=str(dataset), dataset_name=str(dataset), metric_type='accuracy',
        metric_name=f'top-1, {row["name"]}, {format_count(row["macs"])} MACs', metric_value=round(row['top1'], 3))
        for row in saved.info.get('results', ())]


def _introduction(saved: SavedModel) -> str:
    net = saved.skeleton()
    if saved.kind == 'subnet':
        macs, params = static_counts(net)
        return (
            f'An image classifier of {format_count(macs)} MACs and {format_count(params)} parameters for '
            f'{net.num_classes} classes: a subnet taken out of a supernet that was trained with '
            f'[ShiftNAS](https://arxiv.org/abs/2307.08300), weights included.')
    low, high = (net.macs(arch) for arch in (net.space.smallest, net.space.largest))
    return (
        f'A supernet of {net.space.size:,} image classifiers for {net.num_classes} classes, from {format_count(low)} '
        f'to {format_count(high)} MACs, trained with [ShiftNAS](https://arxiv.org/abs/2307.08300). Take the one for '
        f'your budget out of it: no search, no retraining.')


def _table(rows: Sequence[Mapping[str, Any]], training: Mapping[str, Any]) -> str:
    lines = ['| subnet | budget | MACs | params | top-1 | top-5 |', '| --- | ---: | ---: | ---: | ---: | ---: |']
    for row in rows:
        budget = '' if row['budget'] is None else _digits(row['budget'])
        counts = f'{_digits(row["macs"])} | {_digits(row["params"])}'
        lines.append(f'| {_plain(row["name"])} | {budget} | {counts} | {row["top1"]:.2f} | {row["top5"]:.2f} |')
    where = f' on the validation images ({_plain(training["dataset"])})' if training.get('dataset') else ''
    return '\n'.join(lines) + f'\n\nMACs are multiply-accumulates per image; accuracy in percent{where}.'


def _digits(value: float) -> str:
    """A count with all of its four digits, so that those of a column line up: '3.970M', elsewhere '3.97M'."""
    text = format_count(value)
    return text if text[-1].isdigit() else f'{float(text[:-1]):#.4g}'.rstrip('.') + text[-1]


def _plain(text: Any) -> str:
    """Text of a config as one line in which nothing is Markdown."""
    return ' '.join(str(text).replace('|', '/').replace('`', "'").replace('<', '(').split())


def _usage(saved: SavedModel, repo_id: str) -> str:
    if saved.kind == 'subnet':
        return (f"```python\nimport timm, timm_shiftnas\n\nnet = timm_shiftnas.from_pretrained('{repo_id}')\n"
                f"net = timm.create_model('hf-hub:{repo_id}', pretrained=True)  # the same\n```")
    net = saved.skeleton()
    budgets = [row['budget'] for row in saved.info.get('results', ()) if row['budget'] is not None]
    middle = budgets[len(budgets) // 2] if budgets else (net.macs(net.space.smallest) + net.macs(net.space.largest)) / 2
    which = f"flops='{format_count(middle)}'" if saved.has_generator else f'arch={net.space.smallest.to_dict()}'
    return (f"```python\nimport timm, timm_shiftnas\n\n"
            f"# a plain, static network\nnet = timm_shiftnas.from_pretrained('{repo_id}', {which})\n"
            f"# all of them\nsupernet = timm.create_model('hf-hub:{repo_id}', pretrained=True)\n```")


def _training(training: Mapping[str, Any]) -> str:
    lines = []
    if training.get('command'):
        # a flag stays on the line of its values
        command = re.sub(' (?!--)', '\xa0', _plain(training['command']))
        command = ' \\\n    '.join(textwrap.wrap(command, 88, break_long_words=False, break_on_hyphens=False))
        lines.append('```\n' + command.replace('\xa0', ' ') + '\n```')
    if training.get('versions'):
        lines.append(', '.join(f'{_plain(name)} {_plain(version)}' for name, version in training['versions'].items()))
    return '\n\n'.join(lines) or 'Not recorded.'
