"""Decoding of image files to 8-bit images: formats, ranges of grey levels, orientation, color mode."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

__all__ = ['Decoder', 'image_extensions', 'image_formats']

# For EPS, Pillow would run Ghostscript; of the others, it reads only the header.
NOT_READ = frozenset({'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'})
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
WHITE = tuple(2 ** bits - 1 for bits in (8, 10, 12, 14, 16, 24, 32))  # usual largest grey levels

Range = tuple[float, float]


def image_formats() -> list[str]:
    """Names of the formats that are read, in the order in which Pillow tries them; plugins may register more."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_READ]


def image_extensions() -> frozenset[str]:
    """Extensions of files in these formats, and those that were added to timm's."""
    formats = image_formats()
    known = (extension for extension, name in Image.registered_extensions().items() if name in formats)
    return frozenset({*known, *get_img_extensions(), '.mpo'})  # Pillow reads .mpo as JPEG


class Decoder:
    """Reads an image as an upright 8-bit image of one mode.

    Pillow clips grey levels of more than 8 bits to 0..255. Here black to white of their range becomes 0..255. Files
    do not tell this range: camera images of 12 bits are stored in 16. So it is measured once on images of the dataset,
    and rounded up to a usual one (8, 10, 12, 14, 16, 24 or 32 bits; 0..1 for fractions; from its negative, if there are
    negative levels). An image that exceeds it gets the smallest usual range that holds it.

    Args:
        mode: Mode of the PIL images, such as 'RGB'; '' leaves them as they are stored.
        upright: Turn photographs by the orientation in their EXIF data; timm does not.
    """

    def __init__(self, mode: str = 'RGB', upright: bool = True) -> None:
        self.mode = mode
        self.upright = upright
        self.ranges: dict[bool, Range] = {}  # black and white; of integers (False) and of floats (True)

    def open(self, file: Any) -> Image.Image:
        """Read the image of a path or an open file."""
        image = Image.open(file, formats=image_formats())
        image.load()
        return self.convert(image)

    def convert(self, image: Image.Image) -> Image.Image:
        """Convert an image that is in memory."""
        if self.upright:
            image = turn_upright(image)
        if self.mode and is_deep(image):
            image = self._to_8_bits(image)
        return image.convert(self.mode) if self.mode and image.mode != self.mode else image

    def measure(self, files: Iterable[Any]) -> None:
        """Measure the ranges of those images of open files that have more than 8 bits per grey level."""
        for file in files:
            try:
                with file, Image.open(file, formats=image_formats()) as image:
                    if is_deep(image):
                        key = image.mode == 'F'
                        self.ranges[key] = usual_range(grey_levels(image), key, self.ranges.get(key))
            except Exception:  # a broken file is an error when it is used
                continue

    def _to_8_bits(self, image: Image.Image) -> Image.Image:
        levels = grey_levels(image)
        key = image.mode == 'F'
        black, white = usual_range(levels, key, self.ranges.get(key))
        scaled = (levels - black) * (255 / (white - black))
        return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Whether the image has grey levels of more than 8 bits."""
    return image.mode in ('I', 'F') or image.mode.startswith('I;16')


def grey_levels(image: Image.Image) -> np.ndarray:
    """The grey levels, float64 [height, width]; what is not a number is 0."""
    return np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0., posinf=0., neginf=0.)


def usual_range(levels: np.ndarray, fractions: bool, known: Range | None = None) -> Range:
    """The smallest usual range that holds some grey levels and, if given, a known range."""
    low, high = float(levels.min()), float(levels.max())
    if known is not None:
        low, high = min(low, known[0]), max(high, known[1])
    largest = max(high, -low)
    white = next((white for white in ((1,) if fractions else ()) + WHITE if largest <= white), largest)
    return (-white if low < 0 else 0), white


def turn_upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF data raises many kinds of errors; the pixels are intact
        return image
    return image if method is None else image.transpose(method)
