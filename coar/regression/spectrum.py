"""Ridge regression in the directions of the design: the algebra that its direct and dual forms share.

With the correlation matrix of the masks G = Q diag(e) Q' and c their covariance with the outputs,

    W(penalty) = Q (A / (e + penalty)),  A = Q'c

so one decomposition serves all penalties and all columns. Fitted values shrink by d = e / (e + penalty)
per direction; the mean squared residual and generalised cross-validation (Golub, Heath and Wahba 1979)
follow from A alone.
"""

from __future__ import annotations

import numpy as np

from coar.errors import FitError
from coar.regression.statistics import MaskCounts, OutputStatistics

RANK_TOLERANCE = 1e-9  # of the largest eigenvalue; X'X is exact, so rounding is far below


class Spectrum:
    """Eigenvalues of a design, and what a grid of penalties makes of them.

    Args:
        values: eigenvalues of G, any number of them; those left out are 0.
        penalties: [penalties].
        counts: of the masks.
        constants: constant components among the eigenvalues (each has a 1 that stands for nothing).

    Attributes:
        rank: directions in which the masks vary.
        shrinkage: 1 / (e + penalty), [penalties, directions]; 0 where nothing varies.
        freedom: degrees of freedom of each penalty, [penalties].
    """

    def __init__(self, values: np.ndarray, penalties: np.ndarray, counts: MaskCounts, constants: int) -> None:
        self.penalties, self.counts = penalties, counts
        # Directions in which the masks never vary (sets of one size, fewer rows than components) hold
        # rounding alone: they get no weight, as in the minimum-norm solution.
        varies = values > RANK_TOLERANCE * values.max(initial=1e-300)
        self.values = np.where(varies, values, 0.0)
        self.rank = int(varies.sum()) - constants
        inverse = 1.0 / (np.where(varies, values, 1.0) + penalties[:, None])
        self.shrinkage = np.where(varies, inverse, 0.0)
        self.freedom = (self.values * self.shrinkage).sum(axis=1) - constants / (1.0 + penalties)

    def residual_variance(self, rotated: np.ndarray, outputs: OutputStatistics) -> np.ndarray:
        """Mean squared residual on the rows, [penalties, columns], from A [directions, columns]."""
        # variance - sum A^2 (2 - d) / (e + penalty)
        gain = (2.0 - self.values * self.shrinkage) * self.shrinkage
        return np.maximum(outputs.variance - gain @ rotated**2, 0.0)

    def gcv(self, residual: np.ndarray) -> np.ndarray:
        """Generalised cross-validation score, [penalties, columns]."""
        return gcv(residual, self.freedom, self.counts.rows)

    @property
    def spread(self) -> np.ndarray:
        """Variance of the standardised weight along each direction, for noise of size 1 and one row."""
        return self.values * self.shrinkage**2


def gcv(residual: np.ndarray, freedom: np.ndarray, rows: int) -> np.ndarray:
    """Generalised cross-validation score of residuals [penalties, columns]; inf where no row is left."""
    left = 1.0 - (1.0 + freedom) / rows
    safe = np.where(left > 1e-9, left, np.nan)
    return np.nan_to_num(residual / safe[:, None] ** 2, nan=np.inf)


def standard_errors(
    residual: np.ndarray, freedom: np.ndarray, spread: np.ndarray, counts: MaskCounts
) -> np.ndarray:
    """Standard errors in output units per component kept, [columns, components]; inf for constant ones.

    Args:
        residual: mean squared residual of each column, [columns].
        freedom: degrees of freedom of each column's penalty, [columns].
        spread: variance of the standardised weights for noise of size 1 and one row, [columns, components].
        counts: of the masks.
    """
    left = np.maximum(counts.rows - 1.0 - freedom, 1.0)
    errors = np.sqrt((residual / left)[:, None] * np.maximum(spread, 0.0))
    errors = counts.per_mask_unit(errors)
    errors[:, counts.constant] = np.inf
    return errors


def explained(residual: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """R2 on the rows themselves; 0 for a column without variance."""
    share = np.divide(residual, variance, out=np.ones_like(residual), where=variance > 0)
    return np.asarray(1.0 - share)


def require_determined(counts: MaskCounts, rank: int) -> None:
    """Refuse a penalty of 0 where the masks do not determine every weight."""
    determined = int((~counts.constant).sum())
    if counts.rows <= determined + 1 or rank < determined:
        raise FitError(
            "a penalty of 0 needs masks that determine every weight",
            expected=f"more than {determined + 1} rows of rank {determined}, or penalties above 0",
            got=f"{counts.rows} rows, rank {rank}, penalty 0",
            todo="leave the penalties to the default, add rows with study.extend, or draw Bernoulli "
            "masks (those of sets of one size always sum to the same number)",
        )
