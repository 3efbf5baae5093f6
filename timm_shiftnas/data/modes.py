"""Modes of PIL images: what the channels of an image are."""
from __future__ import annotations

__all__ = ['MODES', 'choose_mode', 'default_mode']

# Channels of each mode with values 0 to 255. Values of other modes are not intensities: color numbers (P), bits (1).
MODES = dict(L=1, LA=2, RGB=3, HSV=3, YCbCr=3, LAB=3, RGBA=4, RGBX=4, CMYK=4)


def default_mode(channels: int) -> str:
    """timm's mode for images of a number of channels."""
    return 'L' if channels == 1 else 'RGB'


def choose_mode(mode: str | None, channels: int, asks: str = 'the network takes') -> str:
    """A mode, or the default one, for images of a number of channels.

    Args:
        mode: The mode that was asked for, if any.
        channels: Channels of the network.
        asks: Subject and verb of the error: what needs this number of channels.

    Raises:
        ValueError: If the mode is unknown, or its images have another number of channels.
    """
    mode = mode or default_mode(channels)
    if MODES.get(mode) != channels:
        is_what = f'have {MODES[mode]}' if mode in MODES else 'are not read'
        known = ', '.join(f'{name} ({count})' for name, count in MODES.items())
        raise ValueError(
            f'{asks} {channels} channels, but images of mode {mode} {is_what}; give a matching --input-img-mode: '
            f'{known}')
    return mode
