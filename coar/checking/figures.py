"""Figures over all columns at once: slope in output units, and the linear ceiling.

With 95 % intervals from a bootstrap over rows, whose draws are the very ones that `coar.metrics` makes for
correlations.
"""

from __future__ import annotations

import numpy as np

from coar.metrics import COLUMN_BLOCK, Estimate, bootstrap_means, interval, pearson
from coar.randomness import integers

DRAWS = 500
_ROUNDING = 64 * float(np.finfo(np.float64).eps)  # of a prediction: what moves less does not move
_STILL = 0.01  # a column whose variance is below this share of the median's does not tell its ceiling


def correlation_of(truth: np.ndarray, predicted: np.ndarray, seed: int) -> Estimate:
    """Correlation over rows, mean over the columns in which it is defined; NaN where it is in none."""
    each = pearson(truth, predicted)
    mean = float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
    return Estimate(mean, *interval(bootstrap_means(truth, predicted, seed, DRAWS)))


def slope_of(truth: np.ndarray, predicted: np.ndarray, seed: int) -> Estimate:
    """One slope for all columns: least squares of true on predicted deviations from each column's mean.

    Args:
        truth: [rows, columns].
        predicted: likewise.
        seed: of the bootstrap.

    Returns:
        The slope; NaN where no prediction moves.

    >>> masks = np.random.default_rng(0).random((30, 5)) < 0.9
    >>> truth = masks @ np.ones((5, 3))
    >>> slope_of(truth, 2 * truth + 7, seed=0).value
    0.5
    """
    draws = _row_draws(seed, len(truth))
    every = np.vstack([np.full(len(truth), 1 / len(truth)), draws])
    product, square = np.zeros(len(every)), np.zeros(len(every))
    for start in range(0, truth.shape[1], COLUMN_BLOCK):
        y, p = (part[:, start : start + COLUMN_BLOCK] for part in (truth, predicted))
        y, p = y - y.mean(axis=0), p - p.mean(axis=0)
        mean_y, mean_p = every @ y, every @ p
        product += every @ (y * p).sum(axis=1) - (mean_y * mean_p).sum(axis=1)
        square += every @ (p * p).sum(axis=1) - (mean_p**2).sum(axis=1)
    # A draw of equal rows leaves rounding, and so do predictions that are the same whatever is ablated.
    tiny = max(1e-12 * float(square[0]), _ROUNDING**2 * float((predicted**2).mean(axis=0).sum()), 1e-300)
    slopes = np.divide(product, square, out=np.full(len(every), np.nan), where=square > tiny)
    return Estimate(float(slopes[0]), *interval(slopes[1:]))


def r2_of(truth: np.ndarray, predicted: np.ndarray) -> float:
    """1 - squared error / squared deviation of the truth, median over columns that move; NaN for none."""
    error = ((truth - predicted) ** 2).sum(axis=0)
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    moving = np.ptp(truth, axis=0) > 0
    return float(np.median(1 - error[moving] / spread[moving])) if moving.any() else float("nan")


def ceiling_of(
    correlation: Estimate,
    truth: np.ndarray,
    weights: np.ndarray,
    signal: np.ndarray,
    agreement: np.ndarray | None = None,
) -> Estimate | None:
    """The correlation that the best linear model would reach.

    The best linear model has the true weights w, its R2 is a (1 - a) |w|^2 / var f with a the ablation
    fraction. A variance from 60 rows makes that noisy, and w is known only up to a common scale
    (fractional gates). Both cancel in the ratio of its correlation to that of these weights v, which is
    that of |v| |w| to v . w. So, with means over columns in units of their standard deviations s:

        ceiling = correlation * sqrt(mean (|w|/s)^2) / mean (v . w / (|v| s))

    with |w|^2 and v . w from products of independent replicates. On networks whose masks can all be run its
    spread was a sixth or less of that of the plain ratio, and its mean right.

    Args:
        correlation: of these weights' predictions.
        truth: [rows, columns].
        weights: |v|^2 of each column, [columns].
        signal: unbiased estimates of |w|^2, [columns].
        agreement: unbiased estimates of v . w, [columns]. None takes one angle between v and w for all
            columns, that of posterior means (their |v|^2 and v . w have equal sums over columns): the
            ceiling is then too low where columns differ and v is noisy, by 1 % for a ResNet-20 after 40
            passes, by more for fewer.

    Returns:
        At most 1, at least the correlation; None where it is not determined: nothing moves, or there is more
        noise than signal.
    """
    variance = truth.var(axis=0, ddof=1)
    moving = (variance > _STILL * np.median(variance)) & (weights > 0)
    if not moving.any() or not correlation.value > 0:
        return None
    if agreement is None:
        best, own = float(signal[moving].sum()), float(np.sqrt(weights[moving].sum()))
    else:
        best = float((signal[moving] / variance[moving]).mean())
        own = float((agreement[moving] / np.sqrt(weights[moving] * variance[moving])).mean())
    if not (own > 0 and best > 0):
        return None
    factor = max(1.0, float(np.sqrt(best)) / own)  # these weights are a linear model, too
    value, low, high = (min(1.0, factor * part) for part in correlation.to_json())
    return Estimate(value, low, high)


def _row_draws(seed: int, rows: int) -> np.ndarray:
    """Weight of each row in each draw, [draws, rows]."""
    chosen = (integers(seed, "bootstrap rows", draw, rows, below=rows) for draw in range(DRAWS))
    return np.stack([np.bincount(c, minlength=rows) for c in chosen]) / rows
