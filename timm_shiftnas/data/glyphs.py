"""Rendered letters of installed fonts: labelled images of any number and difficulty, without a download.

The 52 letters A-Z, a-z are drawn with random size, position, slant, rotation, grey levels and noise. Training and
validation images use different fonts, so accuracy is measured on unseen shapes.
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
from safetensors.torch import load_file, save

from ..utils.files import atomic_write
from .in_memory import PixelImages, is_training_split

__all__ = ['Glyphs', 'draw_letter', 'find_fonts']

RENDERING = 1  # version; increase it when the same arguments draw other images, which invalidates the cache
STENCIL = 96  # side, in pixels, of the square in which a letter is drawn once, before it is rotated and scaled


class Glyphs(PixelImages):
    """Rendered letters as PIL images with targets 0..51 (A-Z, a-z), the same number of each.

    Every fourth usable font, by file name, is used for validation, the others for training. Files are split, not
    families: an italic may be in one split and its upright in the other. Images are rendered once and cached in
    `$XDG_CACHE_HOME/timm_shiftnas` (by default `~/.cache/timm_shiftnas`).

    Args:
        split: 'train' or 'validation', or one of timm's synonyms for them.
        fonts: A folder, searched recursively for .ttf and .otf files; `None` uses the fonts of matplotlib.
        images: Number of training images; validation has a quarter of it. Rounded up to a multiple of the classes.
        difficulty: From 0 (upright, centred, full contrast) to 1 (rotated by up to 40 degrees, sheared, half the size,
            faint, noisy, half of them dark on light).
        pixels: Height and width of the images, 8 or more.
        input_img_mode: Mode of the PIL images, as in timm: 'RGB' or 'L'.
        transform: Applied to the image.
        target_transform: Applied to the target.

    Raises:
        ValueError: If a number is out of range, the split is unknown or there are fewer than two usable fonts.
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
        training = is_training_split('glyphs', split)
        if not (0 <= difficulty <= 1 and images >= 1 and pixels >= 8):
            raise ValueError(
                f'glyphs of difficulty={difficulty!r}, images={images!r}, pixels={pixels!r}: give a difficulty from 0 '
                'to 1, at least 1 image and at least 8 pixels')
        files = find_fonts(fonts)
        if len(files) < 2:
            raise ValueError(
                f'{len(files)} font with all of A-Z and a-z in {str(fonts or "matplotlib")!r}; glyphs needs two: give '
                'a folder with more .ttf or .otf files, or none for the fonts of matplotlib')
        files = [file for i, file in enumerate(files) if (i % 4 == 1) != training]
        per_class = math.ceil((images if training else images / 4) / len(self.classes))
        drawn = _cached(files, training, per_class, difficulty, pixels)
        targets = torch.arange(len(drawn)).remainder(len(self.classes)).tolist()
        super().__init__(drawn, targets, input_img_mode, transform, target_transform)


def find_fonts(folder: str | os.PathLike | None = None) -> list[Path]:
    """Font files with all 52 letters, sorted by file name, without symbol fonts, whose 'a' is another shape.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise ImportError("glyphs needs matplotlib: run pip install 'timm_shiftnas[quickstart]'") from error
    root = Path(matplotlib.get_data_path(), 'fonts', 'ttf') if folder is None else Path(folder)
    usable: dict[bytes, Path] = {}
    for path in sorted(root.rglob('*'), key=lambda path: (path.name, str(path))):
        if path.suffix.lower() not in ('.ttf', '.otf'):
            continue
        try:
            font = FT2Font(str(path))
        except (RuntimeError, OSError):  # a broken file
            continue
        codes = font.get_charmap()
        names = {letter: font.get_glyph_name(codes[ord(letter)])
                 for letter in string.ascii_letters if ord(letter) in codes}
        if len(names) == 52 and all(
                name == letter or name.lower().startswith(('uni', 'glyph', 'g', 'cid')) and len(name) > 1
                for letter, name in names.items()):
            usable.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)  # copies could get into both splits
    return list(usable.values())


def _cached(files: list[Path], training: bool, per_class: int, difficulty: float, pixels: int) -> np.ndarray:
    """Rendered images, uint8 [N, pixels, pixels], read from the cache or written to it."""
    described = [RENDERING, Image.__version__, training, per_class, float(difficulty), pixels]
    described += [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    name = 'glyphs-' + hashlib.sha256(repr(described).encode()).hexdigest()[:16] + '.safetensors'
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'timm_shiftnas', name)
    try:
        return load_file(cache)['images'].numpy()
    except (OSError, SafetensorError, KeyError):  # missing, or a broken file, which is replaced
        images = _render(files, training, per_class, difficulty, pixels)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as temporary:
            temporary.write_bytes(save(dict(images=torch.from_numpy(images))))
    except OSError:
        pass  # with a read-only home or a full disk, images are rendered each time
    return images


def _render(files: list[Path], training: bool, per_class: int, difficulty: float, pixels: int) -> np.ndarray:
    """Draw `per_class` images of every letter, cycling through the letters."""
    rng = np.random.default_rng([RENDERING, training])
    stencils: dict[tuple[int, str], Image.Image] = {}
    images = np.empty((per_class * len(Glyphs.classes), pixels, pixels), dtype=np.uint8)
    for i in range(len(images)):
        letter = Glyphs.classes[i % len(Glyphs.classes)]
        key = int(rng.integers(len(files))), letter
        if key not in stencils:
            stencils[key] = draw_letter(files[key[0]], letter)
        images[i] = _distort(stencils[key], rng, difficulty, pixels)
    return images


def draw_letter(file: Path, letter: str) -> Image.Image:
    """A white letter on black, on a common baseline, so that upper and lower case differ in height."""
    image = Image.new('L', (STENCIL, STENCIL))
    font = ImageFont.truetype(str(file), round(0.75 * STENCIL))
    left, _, right, _ = font.getbbox(letter, anchor='ls')
    ImageDraw.Draw(image).text(
        ((STENCIL - left - right) / 2, 0.74 * STENCIL), letter, fill=255, font=font, anchor='ls')
    return image


def _distort(stencil: Image.Image, rng: np.random.Generator, difficulty: float, pixels: int) -> np.ndarray:
    """A stencil with random geometry, contrast and noise, uint8 [pixels, pixels]."""
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
    # bilinear sampling skips pixels when it shrinks by more than two: draw at twice the size, then average
    data = (matrix[0] / 2, matrix[1] / 2, offset[0], matrix[2] / 2, matrix[3] / 2, offset[1])
    drawn = stencil.transform((2 * pixels, 2 * pixels), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    letter = np.asarray(drawn.reduce(2), dtype=np.float32) / 255
    contrast = 1 - 0.85 * difficulty * contrast
    low = (1 - contrast) * level
    picture = low + contrast * (1 - letter if inverted < difficulty / 2 else letter)
    picture = picture + 0.25 * difficulty * rng.standard_normal(picture.shape, dtype=np.float32)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
