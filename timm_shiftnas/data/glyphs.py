"""Rendered letters of installed fonts: labelled images for experiments, as many and as hard as wanted, no download.

The 52 letters A-Z, a-z, drawn with random size, place, slant, rotation, grey levels and noise. No font of the
validation images is among those of the training images, so that accuracy is on unseen shapes.
"""
from __future__ import annotations

import hashlib
import math
import os
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..utils.files import atomic_write
from .in_memory import PixelImages, is_training

__all__ = ['Glyphs', 'find_fonts']

RENDERING = 1  # to be raised when the same arguments draw other images: cached ones are of no use then
STENCIL = 96  # pixels of the square in which a letter is drawn once, before it is turned and scaled


class Glyphs(PixelImages):
    """Rendered letters as PIL images with targets 0..51 (A-Z, a-z), equally many of each.

    Every fourth usable font, by file name, is kept for validation, the others draw the training images. A font is a
    file: an italic that is kept may be of a family whose upright is not. Images are rendered once and cached in
    `$XDG_CACHE_HOME/timm_shiftnas` (by default `~/.cache/timm_shiftnas`).

    Args:
        split: 'train' or 'validation', or one of timm's synonyms for them.
        fonts: A font file's folder, searched with all below it for .ttf and .otf; `None` takes those of matplotlib.
        images: Training images; there are a quarter as many for validation. Rounded up to a multiple of the classes.
        difficulty: From 0 (upright, centred, full contrast) to 1 (turned by up to 40 degrees, sheared, half the size,
            faint, noisy, half of them dark on light).
        pixels: Height and width of the images.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB' or 'L'.
        transform: Applied to the image.
        target_transform: Applied to the target.

    Raises:
        ValueError: If a number is out of its range, there is no such split or there are fewer than two usable fonts.
        ImportError: If matplotlib, which reads the fonts' tables, is not installed.
    """
    classes = string.ascii_uppercase + string.ascii_lowercase

    def __init__(
            self,
            split: str,
            fonts: str | os.PathLike | None = None,
            images: int = 12_000,
            difficulty: float = 0.5,
            pixels: int = 32,
            input_img_mode: str = 'RGB',
            transform: Callable | None = None,
            target_transform: Callable | None = None,
    ) -> None:
        training = is_training('glyphs', split)
        if not 0 <= difficulty <= 1:
            raise ValueError(f'glyph difficulty {difficulty!r} is out of range; give a number from 0 to 1')
        if not 8 <= pixels <= 512 or not 1 <= images <= 10_000_000:
            raise ValueError(
                f'{images} glyphs of {pixels} pixels: give 1 to 10,000,000 images and 8 to 512 pixels')
        files = find_fonts(fonts)
        if len(files) < 2:
            raise ValueError(
                f'{len(files)} font with all of A-Z and a-z in {str(fonts or "matplotlib")!r}; glyphs needs two, one '
                'of them for validation: give a folder with more .ttf or .otf files, or none for those of matplotlib')
        files = [file for i, file in enumerate(files) if (i % 4 == 1) != training]
        per_class = math.ceil((images if training else images / 4) / len(self.classes))
        drawn = _cached(files, training, per_class, difficulty, pixels)
        targets = torch.arange(len(drawn)).remainder(len(self.classes)).tolist()
        super().__init__(drawn, targets, input_img_mode, transform, target_transform)


def find_fonts(folder: str | os.PathLike | None = None) -> list[Path]:
    """Font files that have all 52 letters, by file name; symbol fonts, whose 'a' is something else, are left out.

    Raises:
        ValueError: If the folder does not exist.
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError("glyphs needs matplotlib: run pip install 'timm_shiftnas[quickstart]'") from error
    root = Path(matplotlib.get_data_path(), 'fonts', 'ttf') if folder is None else Path(folder)
    if not root.is_dir():
        raise ValueError(f'the folder of fonts {str(root)!r} does not exist')
    usable: dict[bytes, Path] = {}
    for path in sorted(root.rglob('*'), key=lambda path: (path.name, str(path))):
        if path.suffix.lower() not in ('.ttf', '.otf'):
            continue
        try:
            font = FT2Font(str(path))
        except (RuntimeError, OSError):  # a broken file among many is no reason to stop
            continue
        codes = font.get_charmap()
        names = {letter: font.get_glyph_name(codes[ord(letter)])
                 for letter in string.ascii_letters if ord(letter) in codes}
        if len(names) == 52 and all(
                name == letter or name.lower().startswith(('uni', 'glyph', 'g', 'cid')) and len(name) > 1
                for letter, name in names.items()):
            usable.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)  # a copy would be in both splits
    return list(usable.values())


def _cached(files: list[Path], training: bool, per_class: int, difficulty: float, pixels: int) -> np.ndarray:
    """Rendered images, uint8 [N, pixels, pixels], from the cache or put into it."""
    described = [RENDERING, Image.__version__, training, per_class, float(difficulty), pixels]
    described += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    name = 'glyphs-' + hashlib.sha256(repr(described).encode()).hexdigest()[:16] + '.safetensors'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'timm_shiftnas', name)
    try:
        return load_file(cache)['images'].numpy()
    except (OSError, SafetensorError, KeyError):  # not there yet, or a broken file, which is replaced
        images = _render(files, training, per_class, difficulty, pixels)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as temporary:
            save_file(dict(images=torch.from_numpy(images)), temporary)
    except OSError:
        pass  # a read-only home costs the time to render, nothing else
    return images


def _render(files: list[Path], training: bool, per_class: int, difficulty: float, pixels: int) -> np.ndarray:
    """Draw `per_class` images of every letter, the letters in turn."""
    rng = np.random.default_rng([RENDERING, training])
    stencils: dict[tuple[int, str], Image.Image] = {}
    images = np.empty((per_class * len(Glyphs.classes), pixels, pixels), dtype=np.uint8)
    for i in range(len(images)):
        letter = Glyphs.classes[i % len(Glyphs.classes)]
        key = int(rng.integers(len(files))), letter
        if key not in stencils:
            stencils[key] = _stencil(files[key[0]], letter)
        images[i] = _draw(stencils[key], rng, difficulty, pixels)
    return images


def _stencil(file: Path, letter: str) -> Image.Image:
    """A white letter on black, placed as it stands on the line, so that cases differ in height."""
    image = Image.new('L', (STENCIL, STENCIL))
    font = ImageFont.truetype(str(file), round(0.75 * STENCIL))
    left, _, right, _ = font.getbbox(letter, anchor='ls')
    ImageDraw.Draw(image).text(
        ((STENCIL - left - right) / 2, 0.74 * STENCIL), letter, fill=255, font=font, anchor='ls')
    return image


def _draw(stencil: Image.Image, rng: np.random.Generator, difficulty: float, pixels: int) -> np.ndarray:
    angle, shear, scale, dx, dy, contrast, level, inverted = rng.random(8)
    angle = math.radians(40) * difficulty * (2 * angle - 1)
    shear = 0.3 * difficulty * (2 * shear - 1)
    zoom = STENCIL / pixels / (1 - 0.5 * difficulty * scale)  # stencil pixels per image pixel
    a, b = zoom * math.cos(angle), zoom * math.sin(angle)
    matrix = (a + shear * b, b, -b + shear * a, a)  # of the inverse map, from the image to the stencil
    wander = 0.15 * difficulty * pixels
    centre = pixels / 2 + wander * (2 * dx - 1), pixels / 2 + wander * (2 * dy - 1)
    offset = (STENCIL / 2 - matrix[0] * centre[0] - matrix[1] * centre[1],
              STENCIL / 2 - matrix[2] * centre[0] - matrix[3] * centre[1])
    # shrinking by more than two reads too few pixels of the stencil; twice the size and a box filter read them all
    data = (matrix[0] / 2, matrix[1] / 2, offset[0], matrix[2] / 2, matrix[3] / 2, offset[1])
    drawn = stencil.transform((2 * pixels, 2 * pixels), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    letter = np.asarray(drawn.reduce(2), dtype=np.float32) / 255
    contrast = 1 - 0.85 * difficulty * contrast
    low = (1 - contrast) * level
    picture = low + contrast * (1 - letter if inverted < difficulty / 2 else letter)
    picture = picture + 0.25 * difficulty * rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
