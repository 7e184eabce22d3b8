"""Sufficient statistics of a study: all that a linear fit needs, in one pass over the rows.

All columns share one 0/1 design X [rows, components], so with outputs Y [rows, columns] the sums
X'X, X'Y, X'1, Y'1 and y'y determine every least-squares fit. Memory does not grow with the rows.

X'X is exact (whole numbers). X'Y is summed in float64 over fixed blocks of row numbers in order, so
that it does not depend on how rows were sharded; Y is shifted by the untouched outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from coar.errors import FitError
from coar.rows import RowBlock

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class MaskStatistics:
    """X'X [components, components] as whole numbers in float64, and the number of rows."""

    rows: int
    gram: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Share of rows in which each component was kept, [components]."""
        return np.diag(self.gram) / self.rows

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of each component's mask, [components]; 0 if never or always kept."""
        return np.sqrt(np.maximum(self.mean - self.mean**2, 0.0))

    def correlation(self) -> np.ndarray:
        """Correlation matrix of the masks, float64; rows of constant components are those of the identity."""
        mean, deviation = self.mean, self.deviation
        scale = np.where(deviation > 0, deviation, 1.0)
        matrix = (self.gram / self.rows - np.outer(mean, mean)) / np.outer(scale, scale)
        constant = deviation == 0
        matrix[constant, :] = matrix[:, constant] = 0.0
        np.fill_diagonal(matrix, 1.0)
        return matrix


@dataclass(frozen=True)
class OutputStatistics:
    """Sums over rows of the shifted outputs Y - shift.

    Attributes:
        rows: number of rows.
        shift: [columns].
        cross: X'(Y - shift), [components, columns].
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

    @property
    def variance(self) -> np.ndarray:
        """Variance over rows (divided by their number), [columns]."""
        return np.maximum(self.squares / self.rows - (self.total / self.rows) ** 2, 0.0)

    def covariance(self, masks: MaskStatistics) -> np.ndarray:
        """Covariance of standardised masks with outputs, [components, columns]; 0 for constant components."""
        deviation = masks.deviation
        centred = self.cross / self.rows - np.outer(masks.mean, self.total / self.rows)
        return np.divide(
            centred, deviation[:, None], out=np.zeros_like(centred), where=deviation[:, None] > 0
        )


def collect(
    blocks: Iterable[RowBlock], shift: np.ndarray, num_components: int, gram: bool = True
) -> tuple[MaskStatistics | None, OutputStatistics]:
    """Sum over row blocks.

    Args:
        blocks: from `coar.rows.row_blocks` with `BLOCK_ROWS`.
        shift: untouched outputs of these columns, [columns].
        num_components: length of a mask.
        gram: also sum X'X; not needed again for further blocks of columns.

    Raises:
        FitError: fewer than two rows.
    """
    rows, columns = 0, len(shift)
    product = np.zeros((num_components, num_components)) if gram else None
    cross, total, squares = np.zeros((num_components, columns)), np.zeros(columns), np.zeros(columns)
    for block in blocks:
        masks = block.masks.astype(np.float32)
        shifted = block.outputs.astype(np.float64) - shift
        if product is not None:
            product += masks.T @ masks  # exact: whole numbers below 2**24
        # float64: where masks are nearly dependent (few rows, sets of one size) rounding is amplified.
        cross += block.masks.T.astype(np.float64) @ shifted
        total += shifted.sum(axis=0)
        squares += np.einsum("ij,ij->j", shifted, shifted)
        rows += len(block.rows)
        del block, masks, shifted  # before the next block is read: one in memory, not two
    if rows < 2:
        raise FitError("too few rows to fit", expected="at least 2", got=rows, todo="run the study first")
    outputs = OutputStatistics(rows, np.asarray(shift, np.float64), cross, total, squares)
    return (MaskStatistics(rows, product) if product is not None else None), outputs
