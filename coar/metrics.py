"""Correlation, R2 and slope per column, and their two-way bootstrap over rows and columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from coar.randomness import integers

COLUMN_BLOCK = 4096  # columns at a time, at most
BLOCK_NUMBERS = 2**21  # rows x columns at a time: bounds memory, changes no number


class Table(Protocol):
    """[rows, columns]: an array, or what is read or computed as it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, columns."""

    def __getitem__(self, key: Any, /) -> Any:
        """`table[:, columns]`."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    >>> print(Estimate(0.75, 0.7, 0.8))
    0.750 [0.700, 0.800]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def known(self) -> bool:
        """Whether value and interval are numbers."""
        return bool(np.isfinite(self.to_json()).all())

    def to_json(self) -> list[float]:
        """Value, low, high."""
        return [self.value, self.low, self.high]


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
        "slope": _ratio((y * p).sum(axis=0), np.where(spread > 0, spread_predicted, 0.0)),
    }


def column_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the columns of a table, fewer at a time where there are many rows."""
    rows, columns = shape
    size = max(1, min(COLUMN_BLOCK, BLOCK_NUMBERS // max(1, rows)))
    for start in range(0, columns, size):
        yield slice(start, min(start + size, columns))


def bootstrap_means(truth: Table, predicted: Table, seed: int, draws: int) -> np.ndarray:
    """Mean correlation over columns under resampled rows and columns, float64 [draws].

    Rows and columns are resampled independently (a two-way, or pigeonhole, bootstrap: Owen 2007;
    conservative). Draw i depends on (seed, i) alone, so two methods see the same draws.
    """
    bootstrap = Bootstrap(truth.shape, seed, draws)
    for block in column_blocks(truth.shape):
        bootstrap.add(block, *(np.ascontiguousarray(table[:, block]) for table in (truth, predicted)))
    return bootstrap.means()


class Bootstrap:
    """`bootstrap_means` while columns come, block by block.

    Args:
        shape: rows, columns.
        seed: of the draws.
        draws: how many.
    """

    def __init__(self, shape: tuple[int, ...], seed: int, draws: int) -> None:
        rows, columns = shape
        self._rows = _counts(seed, "bootstrap rows", draws, rows) / rows
        self._columns = _counts(seed, "bootstrap columns", draws, columns)
        self._total, self._weight = np.zeros(draws), np.zeros(draws)

    def add(self, columns: slice, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Add some columns, [rows, columns]."""
        correlation = _weighted_correlation(self._rows, truth, predicted)
        defined = np.isfinite(correlation)
        counted = self._columns[:, columns] * defined
        self._total += (counted * np.where(defined, correlation, 0.0)).sum(axis=1)
        self._weight += counted.sum(axis=1)

    def means(self) -> np.ndarray:
        """Mean correlation of each draw, float64 [draws]; NaN where it is defined in no column."""
        nothing = np.full(len(self._total), np.nan)
        return np.divide(self._total, self._weight, out=nothing, where=self._weight > 0)


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
    """How often each of `size` things is drawn, uint16 [draws, size]."""
    found = np.empty((draws, size), np.uint16)  # columns may be many: 2 bytes each, not 8
    for draw in range(draws):
        found[draw] = np.bincount(integers(seed, stream, draw, size, below=size), minlength=size)
    return found


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    # The mean of equal numbers may differ from them in the last bit; constant means constant.
    centred[:, (values == values[:1]).all(axis=0)] = 0.0
    return centred


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(denominator), np.nan), where=denominator > 0)
