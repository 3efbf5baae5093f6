"""Bright letters on dark, textured ground, with a label for every pixel and a box for every letter: no download.

The set is written in the layouts of real data, which `data.dense` reads:

    FOLDER/{train,validation}/images/NAME.png
    FOLDER/{train,validation}/masks/NAME.png          # class of every pixel; 0 is the ground
    FOLDER/{train,validation}/annotations.json        # COCO: images, categories (1, 2, ...), boxes
"""
from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..utils.files import atomic_write
from .glyphs import draw_letter, find_fonts

__all__ = ['write_scenes']

LETTERS = 'ACEX'
LEAST = .3  # share of a letter that has to be visible


def write_scenes(
        folder: str | os.PathLike,
        images: int = 2000,
        *,
        letters: str = LETTERS,
        pixels: int = 64,
        most: int = 3,
        fonts: str | os.PathLike | None = None,
        seed: int = 0,
) -> Path:
    """Write the set, unless it is in the folder already. Training and validation images use different fonts.

    Args:
        folder: Where to write; created if missing. `annotations.json` is written last in each split.
        images: Number of training images; validation has a quarter of it.
        letters: The classes.
        pixels: Height and width of the images.
        most: The largest number of letters in an image.
        fonts: As for `Glyphs`.
        seed: Seed of all draws.

    Returns:
        The folder.

    Raises:
        ValueError: If another set was written there, or there are fewer than two usable fonts.
        ImportError: If matplotlib, which reads the fonts' tables, is not installed.
    """
    folder = Path(folder)
    about = dict(images=images, letters=letters, pixels=pixels, most=most, seed=seed)
    files = find_fonts(fonts)
    if len(files) < 2:
        raise ValueError(f'{len(files)} usable font in {str(fonts or "matplotlib")!r}; two are needed')
    for split, count in (('train', images), ('validation', -(-images // 4))):
        index = folder / split / 'annotations.json'
        if index.exists():
            if json.loads(index.read_text())['info'] != about:
                raise ValueError(f'{index} is of another set than {about}; give another folder, or remove this one')
            continue
        own = [file for i, file in enumerate(files) if (i % 4 == 1) != (split == 'train')]
        rng = np.random.default_rng([seed, split == 'train'])
        records: dict[str, Any] = dict(
            info=about, images=[], annotations=[],
            categories=[dict(id=i, name=letter) for i, letter in enumerate(letters, start=1)])
        for kind in ('images', 'masks'):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f'{number:05}.png'
            image, mask, boxes = _scene(rng, own, letters, pixels, most)
            Image.fromarray(image).save(folder / split / 'images' / name)
            Image.fromarray(mask).save(folder / split / 'masks' / name)
            records['images'].append(dict(id=number, file_name=name, height=pixels, width=pixels))
            for label, (x, y, width, height), area in boxes:
                records['annotations'].append(dict(
                    id=len(records['annotations']) + 1, image_id=number, category_id=label, iscrowd=0, area=area,
                    bbox=[x, y, width, height]))
        with atomic_write(index) as temporary:
            temporary.write_text(json.dumps(records))
    return folder


def _scene(rng: np.random.Generator, files: list[Path], letters: str, pixels: int, most: int) -> tuple[
        np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int], int]]]:
    """An image [pixels, pixels, 3], its mask [pixels, pixels], and (label, (x, y, width, height), area) of its letters.

    A later letter covers an earlier one. Boxes enclose the visible part.
    """
    image = _texture(rng, pixels)
    owners, labels = np.zeros((pixels, pixels), np.int64), [0]
    sizes = [0]
    for number in range(1, int(rng.integers(1, most + 1)) + 1):
        label = int(rng.integers(len(letters)))
        alpha = _letter(rng, files[int(rng.integers(len(files)))], letters[label], pixels)
        image = image * (1 - alpha[..., None]) + alpha[..., None] * (.6 + .4 * rng.random(3))
        owners[alpha > .5] = number
        labels.append(label + 1)
        sizes.append(int((alpha > .5).sum()))
    boxes = []
    for number, label in enumerate(labels):
        ys, xs = np.nonzero(owners == number)
        if not number or len(ys) < LEAST * sizes[number] or not len(ys):
            continue
        x, y = int(xs.min()), int(ys.min())
        boxes.append((label, (x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y), len(ys)))
    image = image + .04 * rng.standard_normal(image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), np.array(labels, np.uint8)[owners], boxes


def _texture(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Ground [pixels, pixels, 3] in 0 to 0.5: smooth noise of several scales, and a grating."""
    ground = np.zeros((pixels, pixels, 3))
    for cells in (3, 6, 12, 24):
        noise = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
        smooth = Image.fromarray(noise).resize((pixels, pixels), Image.Resampling.BICUBIC)
        ground += np.asarray(smooth) / 255 * rng.random() / 3
    y, x = np.mgrid[:pixels, :pixels] / pixels
    angle, frequency = rng.random() * np.pi, 3 + 9 * rng.random()
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    return (ground / 2 + .1 * wave[..., None] * rng.random(3) + .1 * rng.random(3)).clip(0, .5)


def _letter(rng: np.random.Generator, file: Path, letter: str, pixels: int) -> np.ndarray:
    """Opacity [pixels, pixels] of a letter of 0.3 to 0.6 of the image, rotated by up to 20 degrees, at any place."""
    drawn = _stencil(file, letter).rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC)
    drawn = drawn.crop(drawn.getbbox())
    scale = pixels * rng.uniform(.3, .6) / max(drawn.size)
    drawn = drawn.resize([max(round(side * scale), 1) for side in drawn.size], Image.Resampling.BOX)
    canvas = Image.new('L', (pixels, pixels))
    place = [int(rng.integers(0, pixels - side + 1)) for side in drawn.size]
    canvas.paste(drawn, tuple(place))
    return np.asarray(canvas, np.float64) / 255


@cache
def _stencil(file: Path, letter: str) -> Image.Image:
    return draw_letter(file, letter)
