"""The model card."""
from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..models import static_counts
from ..space.resources import Resource
from ..utils.text import one_line
from ..utils.units import format_count
from .format import KEY, Row, Training
from .load import SavedModel

__all__ = ['MARK', 'model_card']

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


def model_card(saved: SavedModel, repo_id: str, files: Collection[str] = (), license: str | None = None) -> ModelCard:
    """The card of a saved model: metadata for the Hub, the table, the pictures, how to load, how it was trained.

    Args:
        saved: The model.
        repo_id: The repository.
        files: Names of the files beside the card; the card shows the pictures among them.
        license: One of the Hub's names.
    """
    name, results, training = saved.config['architecture'], saved.record.results or [], saved.record.training or {}
    source, _, dataset = training.get('dataset', '').partition('/')
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        license=license,
        tags=['timm', KEY, 'neural-architecture-search', 'image-classification'],
        datasets=[dataset] if source == 'hfds' else None,  # only those are on the Hub
        model_name=name, eval_results=_eval_results(results, training) or None)
    parts = [f'---\n{data.to_yaml()}\n---', MARK, f'# {name}', _introduction(saved)]
    if results:
        title = '## Subnets' if saved.kind == 'supernet' else '## Accuracy'
        parts += [title, _table(results, training, saved.resource)]
        if ACCURACY in files:
            parts.append(f'![top-1 against {saved.resource.label}]({ACCURACY})')
    if SHIFT in files:
        parts.append(f'![probability of each budget group over training]({SHIFT})')
    parts += ['## Use', _usage(saved, repo_id), '## Training', _training(training), '## Citation', CITATION]
    return ModelCard('\n\n'.join(parts) + '\n', ignore_metadata_errors=False)


def _eval_results(results: Sequence[Row], training: Training) -> list[EvalResult]:
    dataset = training.get('dataset') or 'unknown'
    return [EvalResult(
        task_type='image-classification', dataset_type=dataset, dataset_name=dataset, metric_type='accuracy',
        metric_name=f'top-1, {row["name"]}, {format_count(row["macs"])} MACs', metric_value=round(row['top1'], 3))
        for row in results]


def _introduction(saved: SavedModel) -> str:
    net, paper = saved.skeleton(), '[ShiftNAS](https://arxiv.org/abs/2307.08300)'
    if saved.kind == 'subnet':
        macs, params = map(format_count, static_counts(net))
        return (f'An image classifier with {macs} MACs and {params} parameters for {net.num_classes} classes: a subnet '
                f'extracted, with its weights, from a supernet that was trained with {paper}.')
    low, high = (format_count(net.macs(arch)) for arch in (net.space.smallest, net.space.largest))
    return (f'A supernet of {net.space.size:,} image classifiers for {net.num_classes} classes, from {low} to {high} '
            f'MACs, trained with {paper}. Extract the one for your budget: no search, no retraining.')


def _table(rows: Sequence[Row], training: Training, resource: Resource) -> str:
    further = [resource] if resource.name not in ('macs', 'params') else []
    columns = ['budget', 'MACs', 'params', *(each.label for each in further), 'top-1', 'top-5']
    lines = [f'| subnet | {" | ".join(columns)} |', f'| --- | {" | ".join(["---:"] * len(columns))} |']
    for row in rows:
        budget = '' if row['budget'] is None else (
            _digits(row['budget']) if resource.kind == 'count' else resource.format(row['budget']))
        counts = ' | '.join([
            _digits(row['macs']), _digits(row['params']), *(each.format(row[each.name]) for each in further)])
        lines.append(f'| {_plain(row["name"])} | {budget} | {counts} | {row["top1"]:.2f} | {row["top5"]:.2f} |')
    where = f' on the validation images ({_plain(training["dataset"])})' if training.get('dataset') else ''
    return '\n'.join(lines) + f'\n\nMACs are multiply-accumulates per image; accuracy in percent{where}.'


def _digits(value: float) -> str:
    """A count with four digits, so that a column lines up: '3.970M', where `format_count` gives '3.97M'."""
    text = format_count(value)
    return text if text[-1].isdigit() else f'{float(text[:-1]):#.4g}'.rstrip('.') + text[-1]


def _plain(text: Any) -> str:
    """Text of a config as one line without Markdown."""
    return one_line(str(text).replace('|', '/').replace('`', "'").replace('<', '('))


def _usage(saved: SavedModel, repo_id: str) -> str:
    ours = f"timm_shiftnas.from_pretrained('{repo_id}'"
    timms = f"timm.create_model('hf-hub:{repo_id}', pretrained=True)"
    lines = [f'net = {ours})', f'net = {timms}  # the same']
    if saved.kind == 'supernet':
        net, resource = saved.skeleton(), saved.resource
        ends = resource.range(net.space)
        budgets = [row['budget'] for row in saved.record.results or () if row['budget'] is not None] or [sum(ends) / 2]
        budget = f"{resource.keyword}='{resource.format(budgets[len(budgets) // 2])}'"
        budget += f", device_file='{saved.record.device}'" * (resource.device is not None)
        which = budget if saved.has_generator else f'arch={net.space.smallest.to_dict()}'
        lines = ['# a plain, static network', f'net = {ours}, {which})', '# the supernet', f'supernet = {timms}']
    code = '\n'.join(['```python', 'import timm, timm_shiftnas', '', *lines, '```'])
    mode = saved.record.image_mode
    return f"{code}\n\nImages are PIL images of mode {mode}: `image.convert('{mode}')`." if mode else code


def _training(training: Training) -> str:
    lines = []
    if training.get('command'):
        # a flag stays on the line of its values
        command = re.sub(' (?!--)', '\xa0', _plain(training['command']))
        command = ' \\\n    '.join(textwrap.wrap(command, 88, break_long_words=False, break_on_hyphens=False))
        lines.append('```\n' + command.replace('\xa0', ' ') + '\n```')
    if training.get('versions'):
        lines.append(', '.join(f'{_plain(name)} {_plain(version)}' for name, version in training['versions'].items()))
    return '\n\n'.join(lines) or 'Not recorded.'
