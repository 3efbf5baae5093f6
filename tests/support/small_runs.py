"""Shared by the tests of training: the program, the flags of a run of seconds, comparison of checkpoints."""
from argparse import Namespace
from pathlib import Path

import torch

from timm_shiftnas.training import trainer as train

ROOT = Path(__file__).parents[2]

# a run of seconds: images of four tokens, and half of the digits in ten batches an epoch
TINY = ['--model', 'test_shiftformer_supernet', '--img-size', '16', '-j', '0', '-b', '70', '--lr', '2e-3',
        '--warmup-epochs', '0', '--num-groups', '3', '--generator-fit-steps', '20', '--shift-interval', '4',
        '--shift', 'hypergradient', '--shift-batch-size', '16', '--shift-warmup-epochs', '0',
        '--generator-images', '16', '--log-interval', '5']
FAST = ['--dataset', 'sklearn/digits', '--held-out', '0.5', *TINY]


def run_script(argv):
    """Run `python train.py` in this process."""
    return train.launch(argv)


def load(path):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def same(a, b, where=''):
    """Assert that two values, or nested containers of them, are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f'{where}/{i}')
    else:
        assert a == b, where
