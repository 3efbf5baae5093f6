"""The model card."""
from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.tables import score_columns
from ..space.resources import MACS, PARAMS
from ..utils.run_files import ACCURACY, REPORT, SHIFT
from ..utils.text import one_line
from ..utils.units import format_count
from .format import KEY, ModelRecord, Training
from .load import SavedModel

__all__ = ['MARK', 'loading_call', 'model_card']

CARD = 'README.md'
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
    name, record, results = saved.config['architecture'], saved.record, saved.record.results
    source, _, dataset = record.training.get('dataset', '').partition('/')
    classifier = record.backbone is None
    task = 'image-classification' if classifier else record.training.get('task', 'image-feature-extraction')
    data = ModelCardData(
        library_name='timm' if classifier else KEY, pipeline_tag=task, license=license,
        tags=['timm', KEY, 'neural-architecture-search', task],
        datasets=[dataset] if source == 'hfds' else None,  # only those are on the Hub
        model_name=name, eval_results=_eval_results(record, task) or None)
    parts = [f'---\n{data.to_yaml()}\n---', MARK, f'# {name}', _introduction(saved)]
    if results:
        parts += ['## Subnets' if saved.kind == 'supernet' else '## Accuracy', _table(saved)]
        if ACCURACY in files:
            drawn = dict.fromkeys(each.label for each in (saved.resource, MACS, *saved.latencies(saved.space)))
            what = 'top-1' if classifier else _plain(record.metric)
            parts.append(f'![{what} against {_plain(" and ".join(drawn))}]({ACCURACY})')
        if REPORT in files:
            parts.append(f'[{REPORT}]({REPORT}) shows each of them layer by layer, with what it needs and what to type '
                         'for it: download it, and open it in a browser.')
    if SHIFT in files:
        parts.append(f'![probability of each budget group over training]({SHIFT})')
    parts += ['## Use', _usage(saved, repo_id), '## Training', _training(record.training), '## Citation', CITATION]
    return ModelCard('\n\n'.join(parts) + '\n', ignore_metadata_errors=False)


def _eval_results(record: ModelRecord, task: str) -> list[EvalResult]:
    dataset, key = record.training.get('dataset') or 'unknown', score_columns(record.results)[0]
    kind, name = ('accuracy', 'top-1') if key == 'top1' else (record.metric, record.metric)
    return [EvalResult(
        task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=kind,
        metric_name=f'{name}, {row["name"]}, {format_count(row["macs"])} MACs', metric_value=round(row[key], 3))
        for row in record.results]


def _introduction(saved: SavedModel) -> str:
    """What a model is; of a network around a backbone, that loading it needs its code."""
    space, network = saved.space, saved.record.network
    what = f'An image classifier for {saved.skeleton().num_classes} classes' if saved.record.backbone is None else (
        f'`{_plain(network)}`: a network around a backbone' if network else 'A backbone')
    code = ' Its code is not in this repository: loading takes the function that builds it.' if network else ''
    trained = 'that was trained with [ShiftNAS](https://arxiv.org/abs/2307.08300).'
    low, high = map(format_count, MACS.range(space))
    if saved.kind == 'subnet':
        params = format_count(PARAMS.count(space, space.largest))
        return f'{what}, of {high} MACs and {params} parameters, extracted from a supernet {trained}{code}'
    return (f'{what}, elastic: a supernet of {space.size:,} subnets from {low} to {high} MACs {trained} Extract the '
            f'one for your budget, with its weights: no search, no retraining.{code}')


def _table(saved: SavedModel) -> str:
    """The results, with what budgets bound and the latency on every device beside MACs."""
    space, resource, rows = saved.space, saved.resource, saved.record.results
    scores, metric, dataset = score_columns(rows), _plain(saved.record.metric), saved.record.training.get('dataset')
    latencies = saved.latencies(space)
    further = [each for each in dict.fromkeys([resource, *latencies]) if each not in (MACS, PARAMS)]
    titles = [dict(top1='top-1', top5='top-5', score=metric)[name] for name in scores]
    table = [['subnet', 'budget', 'MACs', 'params', *(_plain(each.label) for each in further), *titles]]
    table.append(['---', *['---:'] * (len(table[0]) - 1)])
    write = _digits if resource.kind == 'count' else resource.format
    counts = [[each.format(n) for n in each.count(space, saved.archs('results', space)).tolist()] for each in further]
    for row, *own in zip(rows, *counts):
        budget = '' if row['budget'] is None else write(row['budget'])
        table.append([_plain(row['name']), budget, _digits(row['macs']), _digits(row['params']), *own,
                      *(f'{row[name]:.2f}' for name in scores)])
    lines = [f'| {" | ".join(cells)} |' for cells in table]
    where = f' on the validation images ({_plain(dataset)})' if dataset else ''
    what = 'accuracy' if scores[0] == 'top1' else metric
    notes = ' '.join([f'MACs are multiply-accumulates per image; {what} in percent{where}.',
                      *(_plain(each.device.note) for each in latencies)])
    return '\n'.join(lines) + f'\n\n{notes}'


def _digits(value: float) -> str:
    """A count with four digits, so that a column lines up: '3.970M', where `format_count` gives '3.97M'."""
    text = format_count(value)
    return text if text[-1].isdigit() else f'{float(text[:-1]):#.4g}'.rstrip('.') + text[-1]


def _plain(text: Any) -> str:
    """Text of a config as one line without Markdown."""
    return one_line(str(text).replace('|', '/').replace('`', "'").replace('<', '('))


def _usage(saved: SavedModel, repo_id: str) -> str:
    """Code that loads a model; if it is a classifier, timm loads it too."""
    record, network, chosen = saved.record, saved.record.network, [{}]
    if saved.kind == 'supernet' and record.generator is None:
        chosen = [dict(arch=saved.space.smallest.to_dict())]
    elif saved.kind == 'supernet':
        resource, given = saved.resource, [row['budget'] for row in record.results if row['budget'] is not None]
        budgets = {each: sum(each.range(saved.space)) / 2 for each in (resource, *saved.latencies(saved.space))}
        if given:
            budgets[resource] = given[len(given) // 2]
        chosen = [each.arguments(each.format(budget)) for each, budget in budgets.items()]
    lines = [f'net = timm_shiftnas.{loading_call(saved, repo_id, arguments)}' for arguments in chosen]
    lines[0] += '  # a plain, static network'
    if network:
        lines[:0] = [f'def build(backbone): return {_plain(network)}(backbone, ...)  # as it was trained', '']
    if record.backbone is None:
        name = 'supernet' if saved.kind == 'supernet' else 'the_same'
        lines.append(f"{name} = timm.create_model('hf-hub:{repo_id}', pretrained=True)")
    code = '\n'.join(['```python', 'import timm, timm_shiftnas', '', *lines, '```'])
    mode = record.image_mode
    return f"{code}\n\nImages are PIL images of mode {mode}: `image.convert('{mode}')`." if mode else code


def loading_call(saved: SavedModel, name: str, arguments: Mapping[str, Any]) -> str:
    """The call that loads a model, as text; `build` is the function that builds the network around a backbone."""
    typed = [repr(name), *(f'{key}={value!r}' for key, value in arguments.items())]
    return f'from_pretrained({", ".join([*typed, "network=build"] if saved.record.network else typed)})'


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
