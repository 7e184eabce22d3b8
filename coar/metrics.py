"""Correlation, R2 and slope per column, and their two-way bootstrap over rows and columns."""

from __future__ import annotations

import numpy as np

from coar.randomness import integers

COLUMN_BLOCK = 4096  # columns bootstrapped at a time: bounds memory, changes no number


def pearson(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Correlation over rows per column, float64 [columns]; NaN where either is constant.

    >>> pearson(np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [4.0], [8.0]])).round(6)
    array([1.])
    """
    y, p = _centred(truth), _centred(predicted)
    product, scale = (y * p).sum(axis=0), np.sqrt((y * y).sum(axis=0) * (p * p).sum(axis=0))
    return np.divide(product, scale, out=np.full(len(scale), np.nan), where=scale > 0)


def per_column(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Figures per column from [rows, columns] arrays.

    Returns:
        pearson, spearman; r2 = 1 - squared error / squared deviation of the truth (negative where the
        mean would predict better); slope of truth on prediction (1 = calibrated).
    """
    from scipy.stats import rankdata

    y, p = _centred(truth), _centred(predicted)
    error = ((truth.astype(np.float64) - predicted) ** 2).sum(axis=0)
    spread, spread_predicted = (y * y).sum(axis=0), (p * p).sum(axis=0)
    return {
        "pearson": pearson(truth, predicted),
        "spearman": pearson(rankdata(truth, axis=0), rankdata(predicted, axis=0)),
        "r2": 1.0 - _ratio(error, spread),
        "slope": _ratio((y * p).sum(axis=0), spread_predicted),
    }


def bootstrap_means(truth: np.ndarray, predicted: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Mean correlation over columns under resampled rows and columns, float64 [draws].

    Rows and columns are resampled independently (a two-way, or pigeonhole, bootstrap: Owen 2007;
    conservative). Draw i depends on (seed, i) alone, so two methods see the same draws.
    """
    rows, columns = truth.shape
    row_weights = _counts(seed, "bootstrap rows", draws, rows)
    column_weights = _counts(seed, "bootstrap columns", draws, columns)
    total, weight = np.zeros(draws), np.zeros(draws)
    for start in range(0, columns, COLUMN_BLOCK):
        part = slice(start, start + COLUMN_BLOCK)
        correlation = _weighted_correlation(row_weights / rows, truth[:, part], predicted[:, part])
        defined = np.isfinite(correlation)
        counted = column_weights[:, part] * defined
        total += (counted * np.where(defined, correlation, 0.0)).sum(axis=1)
        weight += counted.sum(axis=1)
    return np.divide(total, weight, out=np.full(draws, np.nan), where=weight > 0)


def interval(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    if not np.isfinite(drawn).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weighted_correlation(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[draws, columns] from row weights [draws, rows]."""
    y, p = _centred(truth), _centred(predicted)
    mean_y, mean_p = weights @ y, weights @ p
    variance_y = weights @ (y * y) - mean_y**2
    variance_p = weights @ (p * p) - mean_p**2
    # A draw in which a column is constant leaves rounding, not zero: treat it as constant.
    tiny = 1e-12
    scale_y, scale_p = np.maximum((y * y).mean(axis=0), 1e-300), np.maximum((p * p).mean(axis=0), 1e-300)
    defined = (variance_y > tiny * scale_y) & (variance_p > tiny * scale_p)
    product = np.sqrt(np.where(defined, variance_y * variance_p, 1.0))
    return np.where(defined, (weights @ (y * p) - mean_y * mean_p) / product, np.nan)


def _counts(seed: int, stream: str, draws: int, size: int) -> np.ndarray:
    """How often each of `size` things is drawn, float64 [draws, size]."""
    chosen = (integers(seed, stream, draw, size, below=size) for draw in range(draws))
    return np.stack([np.bincount(c, minlength=size) for c in chosen]).astype(np.float64)


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    # The mean of equal numbers may differ from them in the last bit; constant means constant.
    centred[:, (values == values[:1]).all(axis=0)] = 0.0
    return centred


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(denominator), np.nan), where=denominator > 0)
