"""The table of docs/elastic.md: which networks of timm are elastic, counted by trying all.

    PYTHONPATH=tests python -m support.elastic_table
"""
import re
from collections import defaultdict
from unittest import mock

import timm

import timm_shiftnas  # noqa: F401
from timm_shiftnas.models.elastic import why_not_elastic

MODULES = ('vision_transformer', 'deit', 'efficientnet', 'mobilenetv3', 'hardcorenas')


def created(name):
    """A network of timm on the meta device; ViTs with two of their layers, which are alike."""
    layers = dict(depth=2) if timm.models.is_model_in_modules(name, MODULES[:2]) else {}
    # without timm's initialization, which takes half of the time and means nothing on the meta device
    with mock.patch.object(timm.models.efficientnet, 'efficientnet_init_weights'), mock.patch.object(
            timm.models.mobilenetv3, 'efficientnet_init_weights'):
        return timm.create_model(name, device='meta', **layers)


def rows(module, reasons):
    """Rows of Markdown: how many networks of a module are elastic, then the others by the part that is not.

    Args:
        module: Its name in timm's registry.
        reasons: Why each of its networks is not elastic, by name; `None` if it is.
    """
    others = defaultdict(list)
    for name, reason in reasons.items():
        if reason is not None:
            part = re.sub(r'blocks\.\d+\.\d+\.?', '', reason.removeprefix('its ').partition(' and not ')[0])
            part = re.sub(r'has \d+ groups', 'has groups', part)
            others[part.replace('is of the class ', '').replace('are of the class ', '').strip()].append(name)
    elastic = sum(reason is None for reason in reasons.values())
    return [f'| `{module}` | {elastic} of {len(reasons)} are elastic | |'] + [
        f'| | {part} | {", ".join(names)} |' for part, names in sorted(others.items())]


if __name__ == '__main__':
    for module in MODULES:
        print('\n'.join(rows(module, {
            name: why_not_elastic(created(name)) for name in timm.list_models(module=module)})))
