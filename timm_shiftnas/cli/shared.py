"""Helpers of several commands."""
from __future__ import annotations

import argparse
import sys

import torch

from ..utils.text import one_line

__all__ = ['autocast_of', 'open_device', 'warn']


def warn(message: str) -> None:
    print(f'timm-shiftnas: warning: {message}', file=sys.stderr)


def open_device(name: str | None) -> torch.device:
    """The device of --device; by default a GPU if there is one.

    Raises:
        ValueError: If torch cannot use it.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise ValueError(f'--device {name} cannot be used ({one_line(error, 200)}); give cpu or cuda') from error


def autocast_of(args: argparse.Namespace, device: torch.device) -> torch.autocast | None:
    """The mixed precision of --amp."""
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else None
