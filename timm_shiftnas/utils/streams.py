"""Random streams without state: functions of (seed, purpose, step), equal on all ranks and after a resume."""
from __future__ import annotations

import hashlib

import torch
from timm.utils import random_seed

__all__ = ['seed_process', 'stream', 'stream_seed']


def stream_seed(seed: int, purpose: str, step: int) -> int:
    """A seed in [0, 2**63) for one purpose at one step. Different arguments give unrelated seeds."""
    digest = hashlib.blake2b(f'{seed}/{purpose}/{step}'.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def stream(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator for one purpose at one step."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, step))


def seed_process(seed: int, purpose: str, step: int) -> None:
    """Seed the global generators of this process from a stream: torch on all devices, numpy and Python."""
    random_seed(stream_seed(seed, purpose, step) % 2 ** 32)
