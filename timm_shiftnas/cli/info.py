"""`timm-shiftnas info`: what a model directory holds."""
from __future__ import annotations

import argparse
import json
from typing import Any

from ..data.modes import default_mode
from ..evaluation.tables import format_table
from ..hub.format import KEY
from ..hub.load import SavedModel
from ..space import complexity
from ..space.resources import LATENCY, RESOURCES
from ..utils.text import printable
from ..utils.units import format_count

__all__ = ['describe', 'run_info']


def run_info(args: argparse.Namespace) -> None:
    """Print what a model directory holds."""
    data = describe(SavedModel(args.directory))
    print(json.dumps(data, indent=2) if args.json else info_text(data))


def describe(saved: SavedModel) -> dict[str, Any]:
    """Describe a saved model as JSON-able data, after checking its files.

    Raises:
        ValueError: If a file has changed since it was saved, or the config does not describe a network.
    """
    ours = saved.config[KEY]
    for name in ours['files']:
        saved.read(name)
    net, space, counts = saved.skeleton(), saved.space, dict(macs=complexity.macs, params=complexity.params)
    data = dict(
        directory=saved.name, kind=saved.kind, architecture=saved.config['architecture'],
        input_size=list(net.pretrained_cfg['input_size']), image_mode=net.image_mode, num_classes=net.num_classes)
    if saved.kind == 'supernet':
        ends = space.smallest, space.largest
        data.update(
            space=space.unbind().to_dict(), size=space.size,
            **{name: [count(space, arch) for arch in ends] for name, count in counts.items()})
        if archs := saved.archs('searched', space):
            data.update(searched=[complexity.macs(space, arch) for arch in archs])
    else:
        data.update(arch=net.arch.to_dict(), **{name: count(space, net.arch) for name, count in counts.items()})
    names = ('groups', 'resource', 'device', 'probabilities', 'results')
    optional = {name: ours[name] for name in names if name in ours}
    if around := saved.record.backbone:
        optional['backbone'] = {name: around[name] for name in ('network', 'out_indices')}
    if devices := saved.devices():
        optional['devices'] = {}
        for name, device in devices.items():
            low, high = map(LATENCY.format, device.resource(space).range(space))
            optional['devices'][name] = f'{device}: {low} to {high}'
    return dict(data, **optional, files=ours['files'])


def info_text(data: dict[str, Any]) -> str:
    """The description of a saved model for the terminal."""
    data = printable(data)
    channels, height, width = data['input_size']
    mode = '' if data['image_mode'] == default_mode(channels) else f' {data["image_mode"]}'
    around = data.get('backbone')
    lines = [
        f'{data["directory"]}: {data["kind"]} {data["architecture"]}',
        f'input    {channels} x {height} x {width}{mode}' + ('' if around else f', {data["num_classes"]} classes')]
    if around:
        maps = ', '.join(map(str, around['out_indices']))
        network = f'network  {around["network"]}, around a backbone' if around['network'] else 'network  a backbone'
        lines.append(f'{network} with the feature maps {maps}')
    if data['kind'] == 'supernet':
        lines += [f'{unit:<9}{format_count(data[name][0])} to {format_count(data[name][1])}'
                  for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append(f'space    {data["size"]:,} archs')
        if 'searched' in data:
            low, high = min(data['searched']), max(data['searched'])
            lines.append(f'searched {len(data["searched"])} archs of {format_count(low)} to {format_count(high)} MACs')
        lines += [field_line(name, values) for name, values in data['space'].items() if name != 'family']
    else:
        lines += [f'{unit:<9}{format_count(data[name])}' for unit, name in (('MACs', 'macs'), ('params', 'params'))]
        lines.append('arch')
        lines += [field_line(name, value) for name, value in data['arch'].items()]
    resource = RESOURCES.get(data.get('resource', 'macs'), LATENCY)
    if 'groups' in data:
        edges = [resource.format(edge) for edge in data['groups']]
        shares = data.get('probabilities', [None] * (len(edges) - 1))
        lines.append(f'groups   {len(shares)}, of {resource.label}')
        lines += [f'  {low} to {high}' + ('' if share is None else f': P = {share:.4f}')
                  for low, high, share in zip(edges, edges[1:], shares, strict=False)]
    if 'results' in data:
        lines += ['results', *(f'  {line}' for line in format_table(data['results'], resource).splitlines())]
    lines += [f'device   {device}' for device in data.get('devices', {}).values()]
    lines.append('files    unchanged since they were saved')
    lines += [f'  {name}: {format_count(entry["size"])}B, sha256 {entry["sha256"][:12]}'
              for name, entry in data['files'].items()]
    return '\n'.join(lines)


def field_line(name: str, value: Any) -> str:
    """A field of a space or an arch; a bar separates layers that have their own choices."""
    def plain(value: Any) -> str:
        if isinstance(value, list):
            return (' | ' if any(isinstance(item, list) for item in value) else ' ').join(map(plain, value))
        return str(value) if isinstance(value, (str, bool)) else f'{value:g}'

    return f'  {name:<13}{plain(value)}'
