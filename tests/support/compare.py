"""Bitwise comparison of nested containers."""
import torch


def assert_identical(a, b, where=''):
    """Assert that two values, nested containers included, have equal types, keys, dtypes and bits."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_identical(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f'{where}/{i}')
    else:
        assert a == b, where


def identical(a, b):
    """Whether two values are equal bit for bit, nested containers included."""
    try:
        assert_identical(a, b)
    except AssertionError:
        return False
    return True
