"""The model card."""
from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.tables import score_columns
from ..space.resources import MACS, PARAMS, Resource
from ..utils.run_files import ACCURACY, REPORT, SHIFT
from ..utils.text import one_line
from ..utils.units import format_count
from .format import KEY, ModelRecord, Training
from .load import SavedModel

__all__ = ['MARK', 'model_card']

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
    name, results, training = saved.config['architecture'], saved.record.results or [], saved.record.training or {}
    source, _, dataset = training.get('dataset', '').partition('/')
    around = saved.record.backbone
    task = 'image-classification' if around is None else training.get('task', 'image-feature-extraction')
    data = ModelCardData(
        library_name='timm' if around is None else KEY, pipeline_tag=task,
        license=license,
        tags=['timm', KEY, 'neural-architecture-search', task],
        datasets=[dataset] if source == 'hfds' else None,  # only those are on the Hub
        model_name=name, eval_results=_eval_results(results, training, task, metric_of(saved.record)) or None)
    parts = [f'---\n{data.to_yaml()}\n---', MARK, f'# {name}', _introduction(saved)]
    if results:
        title = '## Subnets' if saved.kind == 'supernet' else '## Accuracy'
        parts += [title, _table(saved, results, training)]
        if ACCURACY in files:
            what = 'top-1' if around is None else _plain(metric_of(saved.record))
            drawn = dict.fromkeys(each.label for each in (saved.resource, MACS, *saved.latencies(saved.space)))
            parts.append(f'![{what} against {_plain(" and ".join(drawn))}]({ACCURACY})')
        if REPORT in files:
            parts.append(f'[{REPORT}]({REPORT}) shows each of them layer by layer, with what it needs and what to type '
                         'for it: download it, and open it in a browser.')
    if SHIFT in files:
        parts.append(f'![probability of each budget group over training]({SHIFT})')
    parts += ['## Use', _usage(saved, repo_id), '## Training', _training(training), '## Citation', CITATION]
    return ModelCard('\n\n'.join(parts) + '\n', ignore_metadata_errors=False)


def metric_of(record: ModelRecord) -> str:
    """What the first percentage of the results is."""
    return 'top-1 accuracy' if record.backbone is None else (record.training or {}).get('metric', 'score')


def _eval_results(results: Sequence[Any], training: Training, task: str, metric: str) -> list[EvalResult]:
    dataset, key = training.get('dataset') or 'unknown', score_columns(results)[0]
    kind, name = ('accuracy', 'top-1') if key == 'top1' else (metric, metric)
    return [EvalResult(
        task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=kind,
        metric_name=f'{name}, {row["name"]}, {format_count(row["macs"])} MACs', metric_value=round(row[key], 3))
        for row in results]


def _introduction(saved: SavedModel) -> str:
    """What a model is; of a network around a backbone, that loading it needs its code."""
    space, about, code = saved.space, saved.record.backbone, ''
    if about is None:
        what = f'An image classifier for {saved.skeleton().num_classes} classes'
    elif about['network'] is None:
        what = 'A backbone'
    else:
        what = f'`{_plain(about["network"])}`: a network around a backbone'
        code = ' Its code is not in this repository: loading takes the function that builds it.'
    trained = 'that was trained with [ShiftNAS](https://arxiv.org/abs/2307.08300).'
    low, high = map(format_count, MACS.range(space))
    if saved.kind == 'subnet':
        params = format_count(PARAMS.count(space, space.largest))
        return f'{what}, of {high} MACs and {params} parameters, extracted from a supernet {trained}{code}'
    return (f'{what}, elastic: a supernet of {space.size:,} subnets from {low} to {high} MACs {trained} Extract the '
            f'one for your budget, with its weights: no search, no retraining.{code}')


def _table(saved: SavedModel, rows: Sequence[Any], training: Training) -> str:
    """The results, with what budgets bound and the latency on every device beside MACs."""
    scores, metric, resource, space = score_columns(rows), metric_of(saved.record), saved.resource, saved.space
    titles = [dict(top1='top-1', top5='top-5', score=_plain(metric))[name] for name in scores]
    latencies = saved.latencies(space)
    further = [each for each in dict.fromkeys([resource, *latencies]) if each not in (MACS, PARAMS)]
    columns = ['budget', 'MACs', 'params', *(_plain(each.label) for each in further), *titles]
    lines = [f'| subnet | {" | ".join(columns)} |', f'| --- | {" | ".join(["---:"] * len(columns))} |']
    archs = [space.from_dict(row['arch']) for row in rows]
    counted = [[each.format(count) for count in each.count(space, archs).tolist()] for each in further]
    for i, row in enumerate(rows):
        budget = '' if row['budget'] is None else (
            _digits(row['budget']) if resource.kind == 'count' else resource.format(row['budget']))
        cells = [_digits(row['macs']), _digits(row['params']), *(column[i] for column in counted),
                 *(f'{row[name]:.2f}' for name in scores)]
        lines.append(f'| {_plain(row["name"])} | {budget} | {" | ".join(cells)} |')
    where = f' on the validation images ({_plain(training["dataset"])})' if training.get('dataset') else ''
    what = 'accuracy' if scores[0] == 'top1' else _plain(metric)
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
    arguments, build, network = [f"'{repo_id}'"], [], (saved.record.backbone or {}).get('network')
    examples: list[str] = []
    if saved.kind == 'supernet':
        space, resource = saved.space, saved.resource
        budgets = [row['budget'] for row in saved.record.results or () if row['budget'] is not None] or [
            sum(resource.range(space)) / 2]
        budget = _arguments(resource, budgets[len(budgets) // 2])
        arguments.append(budget if saved.has_generator else f'arch={space.smallest.to_dict()}')
        if saved.has_generator:  # of every device, but the one whose latency all budgets bound
            examples = [_arguments(each, sum(each.range(space)) / 2)
                        for each in saved.latencies(space) if each != resource]
    if network:
        arguments.append('network=build')
        build = [f'def build(backbone): return {_plain(network)}(backbone, ...)  # as it was trained', '']
    lines = [*build, f'net = timm_shiftnas.from_pretrained({", ".join(arguments)})  # a plain, static network']
    lines += [f"net = timm_shiftnas.from_pretrained('{repo_id}', {each})" for each in examples]
    if saved.record.backbone is None:
        name = 'supernet' if saved.kind == 'supernet' else 'the_same'
        lines.append(f"{name} = timm.create_model('hf-hub:{repo_id}', pretrained=True)")
    code = '\n'.join(['```python', 'import timm, timm_shiftnas', '', *lines, '```'])
    mode = saved.record.image_mode
    return f"{code}\n\nImages are PIL images of mode {mode}: `image.convert('{mode}')`." if mode else code


def _arguments(resource: Resource, budget: float) -> str:
    """A budget as the arguments of a call."""
    return ', '.join(f'{name}={value!r}' for name, value in resource.arguments(resource.format(budget)).items())


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
