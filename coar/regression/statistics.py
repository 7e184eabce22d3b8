"""Sufficient statistics of a study: all that a linear fit needs, in one pass over the rows.

All columns share one 0/1 design X [rows, components], so with outputs Y [rows, columns] the sums
X'X, X'Y, X'1, Y'1 and y'y determine every least-squares fit. Memory does not grow with the rows.
Statistics of disjoint rows add up: those of training and of held-out rows to those of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from coar.errors import FitError
from coar.regression.products import FixedPoint, add_counts, add_products, mirror

_TILE = 1024  # rows of the correlation matrix at a time, in float64


@dataclass(frozen=True)
class MaskCounts:
    """How often each component was kept, int64 [components], in how many rows."""

    rows: int
    counts: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Share of rows in which each component was kept, [components]."""
        return self.counts / max(1, self.rows)

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of each component's mask, [components]; 0 if never or always kept."""
        return np.where(self.constant, 0.0, np.sqrt(np.maximum(self.mean - self.mean**2, 0.0)))

    @property
    def constant(self) -> np.ndarray:
        """Components that were kept, or ablated, in every row, bool [components]."""
        return (self.counts == 0) | (self.counts == self.rows)

    def per_mask_unit(self, standardised: np.ndarray) -> np.ndarray:
        """Weights of standardised masks [..., components] as weights per component kept; 0 if constant."""
        return standardised * (1.0 / np.where(self.constant, np.inf, self.deviation))

    def __add__(self, other: MaskCounts) -> MaskCounts:
        require_equal_shape(self.counts, other.counts)
        return MaskCounts(self.rows + other.rows, self.counts + other.counts)


@dataclass(frozen=True)
class MaskStatistics(MaskCounts):
    """The counts, and X'X: in how many rows both components were kept, int32 [components, components]."""

    gram: np.ndarray

    @classmethod
    def from_gram(cls, rows: int, gram: np.ndarray) -> MaskStatistics:
        """From X'X, whose diagonal is the counts."""
        return cls(rows, np.diag(gram).astype(np.int64), gram)

    def correlation(self, dtype: type = np.float64) -> np.ndarray:
        """Correlation matrix of the masks, [components, components], computed in float64.

        Rows and columns of constant components are those of the identity.
        """
        found = self.covariance(self.deviation, dtype)
        np.fill_diagonal(found, 1.0)
        return found

    def covariance(self, deviation: np.ndarray, dtype: type = np.float64) -> np.ndarray:
        """Covariance matrix of masks divided by `deviation` [components]; 0 where that is 0."""
        found: np.ndarray = np.empty(self.gram.shape, dtype)
        inverse = 1.0 / np.where(deviation > 0, deviation, np.inf)
        for start in range(0, len(found), _TILE):
            here = slice(start, start + _TILE)
            tile = self.gram[here] / self.rows
            tile -= np.multiply.outer(self.mean[here], self.mean)
            tile *= inverse[here, None]
            tile *= inverse
            found[here] = tile
        return found

    def __add__(self, other: MaskCounts) -> MaskStatistics:
        if not isinstance(other, MaskStatistics):
            raise FitError("counts alone cannot be added to X'X", expected="MaskStatistics", got=repr(other))
        require_equal_shape(self.gram, other.gram)
        return MaskStatistics(self.rows + other.rows, self.counts + other.counts, self.gram + other.gram)


@dataclass(frozen=True)
class OutputStatistics:
    """Sums over rows of the shifted outputs Y - shift.

    Attributes:
        rows: number of rows.
        shift: [columns].
        cross: X'(Y - shift), float64 [components, columns].
        total: column sums, [columns].
        squares: column sums of squares, [columns].
    """

    rows: int
    shift: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean output, [columns]."""
        return self.shift + self.total / self.rows

    @cached_property
    def variance(self) -> np.ndarray:
        """Variance over rows (divided by their number), [columns]."""
        return np.maximum(self.squares / self.rows - (self.total / self.rows) ** 2, 0.0)

    def covariance(self, masks: MaskCounts, deviation: np.ndarray | None = None) -> np.ndarray:
        """Covariance of standardised masks with outputs, [components, columns]; 0 if constant.

        Args:
            masks: counts of the same rows.
            deviation: that masks are divided by; default their own.
        """
        deviation = masks.deviation if deviation is None else deviation
        found = self.cross / self.rows
        found -= np.multiply.outer(masks.mean, self.total / self.rows)
        found *= (1.0 / np.where(deviation > 0, deviation, np.inf))[:, None]
        return found

    def __add__(self, other: OutputStatistics) -> OutputStatistics:
        require_equal_shape(self.cross, other.cross)
        if not np.array_equal(self.shift, other.shift):
            raise FitError(
                "statistics of outputs with different shifts do not add up",
                expected="the untouched outputs of one study",
                got="two sets of untouched outputs",
            )
        sums = (self.cross + other.cross, self.total + other.total, self.squares + other.squares)
        return OutputStatistics(self.rows + other.rows, self.shift, *sums)


def require_equal_shape(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Refuse to add statistics of other components or columns."""
    if ours.shape != theirs.shape:
        raise FitError("statistics of different components or columns", expected=ours.shape, got=theirs.shape)


class MaskSums:
    """Running sums over masks.

    Args:
        num_components: length of a mask.
        gram: also X'X, or counts alone.
        device: where to sum.
    """

    def __init__(self, num_components: int, gram: bool, device: torch.device) -> None:
        self.rows = 0
        self.counts = torch.zeros(num_components, dtype=torch.int64, device=device)
        shape = (num_components, num_components)
        self.gram = torch.zeros(shape, dtype=torch.int32, device=device) if gram else None

    def add(self, masks: torch.Tensor) -> None:
        """Add rows, int8 [rows, components]."""
        self.rows += len(masks)
        self.counts += masks.sum(dim=0, dtype=torch.int64)
        if self.gram is not None and len(masks):
            add_counts(masks, self.gram)

    def load(self, found: MaskCounts) -> None:
        """Go on from sums made earlier."""
        self.rows = found.rows
        self.counts.copy_(torch.from_numpy(found.counts))
        if self.gram is not None:
            assert isinstance(found, MaskStatistics)
            self.gram.copy_(torch.from_numpy(found.gram))

    def found(self) -> MaskCounts:
        """`MaskStatistics` if X'X was asked for; add nothing afterwards."""
        counts = self.counts.cpu().numpy()
        if self.gram is None:
            return MaskCounts(self.rows, counts)
        mirror(self.gram)
        return MaskStatistics(self.rows, counts, self.gram.cpu().numpy())


class OutputSums:
    """Running sums over outputs, relative to `shift` [columns]."""

    def __init__(self, num_components: int, shift: np.ndarray, device: torch.device) -> None:
        self.rows, self.shift = 0, shift
        self.cross = torch.zeros(num_components, len(shift), dtype=torch.float64, device=device)
        self.total = torch.zeros(len(shift), dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.total)

    def add(self, masks: torch.Tensor, outputs: FixedPoint, columns: slice = slice(None)) -> None:
        """Add some columns of rows: masks int8 [rows, components], outputs less their shift.

        Rows are counted (`rows`) by who adds them, once for all columns.
        """
        if len(masks):
            add_products(masks, outputs, self.cross[:, columns])
        self.total[columns] += outputs.total()
        self.squares[columns] += outputs.squares()

    def load(self, found: OutputStatistics) -> None:
        """Go on from sums made earlier."""
        self.rows = found.rows
        pairs = ((self.cross, found.cross), (self.total, found.total), (self.squares, found.squares))
        for sums, values in pairs:
            sums.copy_(torch.from_numpy(values))

    def found(self) -> OutputStatistics:
        """The statistics; add nothing afterwards."""
        sums = (part.cpu().numpy() for part in (self.cross, self.total, self.squares))
        return OutputStatistics(self.rows, self.shift, *sums)
