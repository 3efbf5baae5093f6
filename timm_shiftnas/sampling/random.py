"""Random streams that are functions of (seed, purpose, step): equal on all ranks and after a resume, with no state."""
from __future__ import annotations

import hashlib

import torch

__all__ = ['stream']


def stream(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step; different arguments give unrelated numbers."""
    digest = hashlib.blake2b(f'{seed}/{purpose}/{step}'.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)
