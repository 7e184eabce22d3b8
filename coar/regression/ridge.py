"""Ridge regression for thousands of columns that share one design.

Objective, per column, on standardised masks x (mean 0, deviation 1):

    (1 / 2 rows) |y - x w - b|^2 + (penalty / 2) |w|^2

With the correlation matrix G = Q diag(e) Q' and c = x'y / rows the path is W = Q (Q'c) / (e + penalty):
one eigendecomposition serves all penalties and all columns. The penalty is chosen per column by
generalised cross-validation (Golub, Heath and Wahba 1979), from the statistics alone, or by exact
leave-one-row-out errors, which takes a second pass over the rows. Weights come back in output units
per component kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from coar.attribution_blocks import Block
from coar.errors import FitError
from coar.regression.statistics import MaskStatistics, OutputStatistics
from coar.rows import RowBlock
from coar.settings import Setting

DEFAULT_PENALTIES = tuple(float(f"{x:.4g}") for x in np.geomspace(1e-4, 1e2, 20))
RANK_TOLERANCE = 1e-9  # of the largest eigenvalue; X'X is exact, so rounding is far below
Penalty = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Ridge(Setting):
    """Ridge regression; the default solver.

    Args:
        penalties: candidates, or one number; on standardised masks, so 1 is as strong as the data.
        choose: how each column picks its penalty: "gcv" (no second pass) or "loo" (exact, slower).
        errors: also compute standard errors (for the penalty chosen, noise of one size per column).

    >>> Ridge(penalties=0.5).grid
    (0.5,)
    """

    name: Literal["ridge"] = "ridge"
    penalties: Penalty | Annotated[tuple[Penalty, ...], Field(min_length=1, strict=False)] = DEFAULT_PENALTIES
    choose: Literal["gcv", "loo"] = "gcv"
    errors: bool = True

    @property
    def grid(self) -> tuple[float, ...]:
        """The candidates."""
        return self.penalties if isinstance(self.penalties, tuple) else (self.penalties,)

    def prepare(self, masks: MaskStatistics) -> RidgePath:
        """Decompose the design once for all columns.

        Raises:
            FitError: a penalty of 0 where the masks do not determine every weight.
        """
        determined = int((masks.deviation > 0).sum())
        path = RidgePath(self, masks)
        if min(self.grid) == 0 and (masks.rows <= determined + 1 or path.rank < determined):
            raise FitError(
                "a penalty of 0 needs masks that determine every weight",
                expected=f"more than {determined + 1} rows of rank {determined}, or penalties above 0",
                got=f"{masks.rows} rows, rank {path.rank}, penalty 0",
                todo="leave the penalties to the default, add rows with study.extend, or draw Bernoulli "
                "masks (those of sets of one size always sum to the same number)",
            )
        return path


class RidgePath:
    """The eigendecomposition of one design, ready to fit any block of columns."""

    def __init__(self, settings: Ridge, masks: MaskStatistics) -> None:
        self.settings, self.masks = settings, masks
        self.penalties = np.array(settings.grid)
        values, self.vectors = np.linalg.eigh(masks.correlation())
        # Directions in which the masks never vary (sets of one size, fewer rows than components) hold
        # rounding alone: they get no weight, as in the minimum-norm solution.
        varies = values > RANK_TOLERANCE * values.max()
        self.values = np.where(varies, values, 0.0)
        constant = int((masks.deviation == 0).sum())  # each has an eigenvalue of 1 that stands for nothing
        self.rank = int(varies.sum()) - constant
        inverse = 1.0 / (np.where(varies, values, 1.0) + self.penalties[:, None])
        self.shrinkage = np.where(varies, inverse, 0.0)  # [penalties, components]
        self.freedom = (self.values * self.shrinkage).sum(axis=1) - constant / (1.0 + self.penalties)

    def fit(self, outputs: OutputStatistics, start: int, reread: Callable[[], Iterable[RowBlock]]) -> Block:
        """Fit some columns.

        Args:
            outputs: their statistics.
            start: number of the first column, for the block.
            reread: the rows once more; called only for `choose="loo"`.
        """
        rotated = self.vectors.T @ outputs.covariance(self.masks)  # [components, columns]
        residual = self._residual_variance(rotated, outputs)
        if self.settings.choose == "gcv":
            scores = self._gcv(residual)
        else:
            scores = self._leave_one_out(rotated, outputs, reread())
        choice = np.argmin(scores, axis=0)
        weights = np.empty((len(choice), len(self.values)))
        for number in np.unique(choice):
            columns = choice == number
            weights[columns] = (rotated[:, columns] * self.shrinkage[number][:, None]).T @ self.vectors.T
        weights = self._per_mask_unit(weights)
        chosen = np.take_along_axis(residual, choice[None], axis=0)[0]
        variance = outputs.variance
        details = {
            "penalty": self.penalties[choice],
            "score": np.take_along_axis(scores, choice[None], axis=0)[0],
            "r2": 1.0 - np.divide(chosen, variance, out=np.ones_like(chosen), where=variance > 0),
        }
        intercept = outputs.mean - weights @ self.masks.mean
        return Block(start, weights, intercept, self._errors(choice, chosen), details)

    def _per_mask_unit(self, standardised: np.ndarray) -> np.ndarray:
        deviation = self.masks.deviation
        return np.divide(standardised, deviation, out=np.zeros_like(standardised), where=deviation > 0)

    def _residual_variance(self, rotated: np.ndarray, outputs: OutputStatistics) -> np.ndarray:
        """Mean squared residual on the rows themselves, [penalties, columns]."""
        # With d = e / (e + penalty): variance - sum A^2 (2 - d) / (e + penalty)
        gain = (2.0 - self.values * self.shrinkage) * self.shrinkage
        return np.maximum(outputs.variance - gain @ rotated**2, 0.0)

    def _gcv(self, residual: np.ndarray) -> np.ndarray:
        left = 1.0 - (1.0 + self.freedom) / self.masks.rows
        safe = np.where(left > 1e-9, left, np.nan)
        return np.nan_to_num(residual / safe[:, None] ** 2, nan=np.inf)

    def _leave_one_out(
        self, rotated: np.ndarray, outputs: OutputStatistics, blocks: Iterable[RowBlock]
    ) -> np.ndarray:
        """Mean squared error of each row predicted by a fit to all others, [penalties, columns]."""
        rows = self.masks.rows
        scores = np.zeros((len(self.penalties), rotated.shape[1]))
        for block in blocks:
            standard = self._per_mask_unit(block.masks - self.masks.mean) @ self.vectors
            centred = block.outputs.astype(np.float64) - outputs.mean
            for number, shrinkage in enumerate(self.shrinkage):
                leverage = 1.0 / rows + (standard**2 @ shrinkage) / rows
                error = (centred - standard @ (rotated * shrinkage[:, None])) / (1.0 - leverage)[:, None]
                scores[number] += np.einsum("ij,ij->j", error, error)
        return scores / rows

    def _errors(self, choice: np.ndarray, residual: np.ndarray) -> np.ndarray | None:
        if not self.settings.errors:
            return None
        # Per penalty, the spread of each standardised weight for noise of size 1, [penalties, components]
        spread = (self.values * self.shrinkage**2) @ (self.vectors**2).T
        left = np.maximum(self.masks.rows - 1.0 - self.freedom, 1.0)
        noise = residual * self.masks.rows / left[choice]
        errors = self._per_mask_unit(np.sqrt(noise[:, None] * spread[choice] / self.masks.rows))
        errors[:, self.masks.deviation == 0] = np.inf
        return errors
