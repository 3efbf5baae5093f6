"""Checkpoints of training scripts."""
from argparse import Namespace

import torch


def load_checkpoint(path):
    """A checkpoint's contents, on terms that execute no code."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)
