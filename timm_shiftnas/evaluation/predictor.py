"""Fitting the predictor of a device file: non-negative prices of features (see `space.latency`)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy as np
import torch

from ..space.core import Arch, SearchSpace
from ..space.latency import CONSTANT, choice_features, operator_features

__all__ = ['errors_of', 'fit_predictor']

FOLDS = 5
# strengths of the regularisation for features scaled to their mean: pairs for features of operators and of choices
STRENGTHS = [(a, b) for a in (1e-5, 1e-4, 1e-3, 1e-2) for b in (1e-4, 1e-3, 1e-2)]


def fit_predictor(
        space: SearchSpace, archs: Sequence[Arch], seconds: Sequence[float],
) -> tuple[dict[str, float], dict[str, float]]:
    """Fit prices to measured latencies: `min sum_i ((x_i · p - y_i) / y_i)^2 + strength · |p|^2` over `p >= 0`.

    Features of operators, tables of choices, and both together are tried. Those with the least median error in
    cross-validation are taken, and fitted to all archs.

    Args:
        space: The bound space.
        archs: The archs that were measured.
        seconds: Latencies y.

    Returns:
        The prices by name of the feature, and the errors of the cross-validation, as in `Device`.

    Raises:
        ValueError: If scipy is not installed.
    """
    if find_spec('scipy') is None:
        raise ValueError("a predictor is fitted with scipy; run pip install 'timm_shiftnas[measure]'")
    one_hots = space.one_hot(list(archs))
    known = {True: operator_features(space, one_hots), False: choice_features(space, one_hots)}
    y = np.asarray(seconds, dtype=np.float64)
    best: tuple[float, list[str], np.ndarray, np.ndarray, np.ndarray] | None = None
    for kinds in ((True,), (False,), (True, False)):
        names, x, of_operators = _matrix(kinds, known, len(y))
        for a, b in STRENGTHS:
            if len(kinds) == 1 and b != STRENGTHS[0][1]:
                continue
            strength = np.where(of_operators, a, b if len(kinds) == 2 else a)
            strength[0] = 0.  # of the constant
            predicted = _cross_validated(x, y, strength)
            error = float(np.median(np.abs(predicted / y - 1)))
            if best is None or error < best[0]:
                best = error, names, x, strength, predicted
    assert best is not None
    _, names, x, strength, predicted = best
    prices = _solve(x, y, strength)
    return {name: float(price) for name, price in zip(names, prices, strict=True) if price > 0}, errors_of(predicted, y)


def errors_of(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of the relative error, and the rank correlation."""
    from scipy.stats import spearmanr
    relative = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    return dict(
        median=float(np.median(relative)), p95=float(np.quantile(relative, .95)),
        spearman=float(spearmanr(predicted, measured).statistic))


def _matrix(
        kinds: Sequence[bool], known: Mapping[bool, Mapping[str, torch.Tensor]], rows: int,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names and values, [N, features], of the features that differ between archs, and whether each is of operators."""
    names, columns, flags = [CONSTANT], [np.ones(rows)], [True]
    for kind in kinds:
        for name, values in known[kind].items():
            column = values.numpy()
            if np.ptp(column) > 0:
                names.append(name)
                columns.append(column)
                flags.append(kind)
    return names, np.stack(columns, 1), np.array(flags)


def _solve(x: np.ndarray, y: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The prices."""
    from scipy.optimize import nnls
    weighted = x / y[:, None]
    scale = np.abs(weighted).mean(0) + 1e-300
    ridge = np.diag(np.sqrt(strength * len(y)))
    a, b = np.concatenate([weighted / scale, ridge]), np.concatenate([np.ones(len(y)), np.zeros(len(scale))])
    return nnls(a, b, maxiter=50 * len(scale))[0] / scale


def _cross_validated(x: np.ndarray, y: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Latencies of all archs, each predicted from the other folds."""
    fold = np.arange(len(y)) % FOLDS
    predicted = np.empty_like(y)
    for k in range(FOLDS):
        train = fold != k
        predicted[~train] = x[~train] @ _solve(x[train], y[train], strength)
    return predicted
