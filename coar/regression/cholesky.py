"""Ridge regression by one Cholesky factor per penalty: the fastest way for a few penalties.

(G + penalty) W = c is solved for all columns at once. Degrees of freedom and standard errors need the
diagonal and the trace of the inverse M: with one pass over it, df = components - penalty trace(M), and
the weights spread as diag(M G M) = diag(M) - penalty diag(M M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coar.attribution_blocks import Block
from coar.errors import FitError
from coar.regression.problem import Problem
from coar.regression.ridge_settings import RidgeSettings
from coar.regression.spectrum import explained, gcv, require_determined, standard_errors
from coar.regression.statistics import MaskCounts, MaskStatistics

# Least eigenvalue of G + penalty: below, rounding shows in degrees of freedom and standard errors, which
# come from the inverse (its error is the precision divided by the square of the eigenvalue).
LEAST = {torch.float64: 5e-7, torch.float32: 1e-2}
INVERSE_STEPS = 12
REFINED, REFINEMENTS = 1e-9, 8  # relative residual of a float32 solution; steps to get there
_TILE = 1024


class IllConditionedError(FitError):
    """A factor would lose too many digits."""


@dataclass(frozen=True)
class Factor:
    """G + penalty, factored.

    Attributes:
        lower: Cholesky factor.
        freedom: degrees of freedom; NaN if the inverse was not needed.
        spread: of the standardised weights for noise of size 1 and one row, [components], or None.
    """

    penalty: float
    lower: torch.Tensor
    freedom: float
    spread: np.ndarray | None


class CholeskyFitter:
    """Factors of one design for each penalty, ready to fit any block of columns.

    Args:
        settings: penalties; with several, each column chooses its own by GCV.
        problem: the rows.

    Raises:
        FitError: the matrix of a penalty is not positive definite in the precision at hand.
    """

    def __init__(self, settings: RidgeSettings, problem: Problem) -> None:
        self.settings, self.problem = settings, problem
        masks = problem.masks()
        self.counts = MaskCounts(masks.rows, masks.counts)
        self.rank = rank_bound(masks)
        if min(settings.grid) == 0:
            require_determined(masks, self.rank)
        self.penalties = np.array(settings.grid)
        self.dtype = torch.float64 if fits_double(settings, problem) else torch.float32
        self.notes: dict[str, Any] = {"algorithm": "cholesky", "precision": str(self.dtype)[6:]}
        correlation = masks.correlation(np.float64 if self.dtype == torch.float64 else np.float32)
        self.matrix = torch.from_numpy(correlation).to(problem.device)
        del masks
        problem.forget_gram()
        self.factors = [self._factor(float(penalty)) for penalty in self.penalties]

    def _factor(self, penalty: float) -> Factor:
        diagonal = self.matrix.diagonal()
        diagonal += penalty
        try:
            lower, failed = torch.linalg.cholesky_ex(self.matrix)
        finally:
            diagonal.fill_(1.0)  # of a correlation matrix, exactly
        least = 0.0 if int(failed) else least_eigenvalue(lower)
        if not least > LEAST[self.dtype]:
            raise IllConditionedError(
                f"the masks hardly determine the weights with a penalty of {penalty:g}",
                expected=f"a least eigenvalue above {LEAST[self.dtype]:g}, in {self.notes['precision']}",
                got=f"about {least:.1e}",
                todo="use a larger penalty, more memory (memory=), or Ridge(algorithm='eigen')",
            )
        if not self.settings.errors and len(self.penalties) == 1:
            return Factor(penalty, lower, float("nan"), None)
        return Factor(penalty, lower, *self._of_inverse(lower, penalty))

    def _of_inverse(self, lower: torch.Tensor, penalty: float) -> tuple[float, np.ndarray]:
        inverse = torch.cholesky_inverse(lower)
        diagonal = inverse.diagonal().double().cpu().numpy()
        squares = [tile.double().square().sum(dim=1) for tile in inverse.split(_TILE)]
        spread = diagonal - penalty * torch.cat(squares).cpu().numpy()
        varying = ~self.counts.constant
        return float(varying.sum() - penalty * diagonal[varying].sum()), spread

    def fit(self, columns: slice) -> Block:
        """Fit some columns."""
        outputs = self.problem.outputs(columns)
        right = outputs.covariance(self.counts)
        solved = [self._solve(factor, right) for factor in self.factors]
        # |y - x w|^2 / rows = variance - w'c - penalty |w|^2, since (G + penalty) w = c
        residual = np.stack(
            [
                outputs.variance - np.einsum("ij,ij->j", w, right) - f.penalty * np.einsum("ij,ij->j", w, w)
                for f, w in zip(self.factors, solved, strict=True)
            ]
        ).clip(0.0)
        freedom = np.array([factor.freedom for factor in self.factors])
        scores = gcv(residual, freedom, self.counts.rows)
        choice = np.argmin(scores, axis=0)
        picked = np.arange(len(choice))
        weights = np.stack(solved)[choice, :, picked] if len(solved) > 1 else solved[0].T
        weights = self.counts.per_mask_unit(weights)
        chosen = residual[choice, picked]
        details = {"penalty": self.penalties[choice], "r2": explained(chosen, outputs.variance)}
        if np.isfinite(freedom).all():
            details["score"] = scores[choice, picked]
        intercept = outputs.mean - weights @ self.counts.mean
        return Block(columns.start, weights, intercept, self._errors(choice, chosen), details)

    def _solve(self, factor: Factor, right: np.ndarray) -> np.ndarray:
        """Standardised weights, float64 [components, columns]."""
        wanted = torch.from_numpy(right).to(self.problem.device)
        found = torch.cholesky_solve(wanted.to(self.dtype), factor.lower).double()
        if self.dtype == torch.float64:
            return found.cpu().numpy()
        scale = wanted.norm(dim=0).clamp_min(1e-30)
        for _ in range(REFINEMENTS):
            missing = self._missing(factor.penalty, found, wanted)
            left = float((missing.norm(dim=0) / scale).max())
            if left < REFINED:
                return found.cpu().numpy()
            found += torch.cholesky_solve(missing.float(), factor.lower).double()
        raise FitError(
            "the solution does not settle in float32",
            expected=f"a relative residual below {REFINED:g}",
            got=f"{left:.1e} after {REFINEMENTS} refinements",
            todo="use a larger penalty, more memory (memory=), or another algorithm",
        )

    def _missing(self, penalty: float, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """wanted - (G + penalty) found, products in float64, a few rows of G at a time."""
        missing = wanted - penalty * found
        for start in range(0, len(found), _TILE):
            missing[start : start + _TILE] -= self.matrix[start : start + _TILE].double() @ found
        return missing

    def _errors(self, choice: np.ndarray, residual: np.ndarray) -> np.ndarray | None:
        if not self.settings.errors:
            return None
        freedom = np.array([factor.freedom for factor in self.factors])
        spread = np.stack([factor.spread for factor in self.factors if factor.spread is not None])
        return standard_errors(residual, freedom[choice], spread[choice], self.counts)


def fits_double(settings: RidgeSettings, problem: Problem) -> bool:
    """Whether X'X, the matrix, a copy, its factors and an inverse in float64 fit into the budget."""
    inverse = settings.errors or len(settings.grid) > 1
    each = 4 + 8 * (2 + len(settings.grid) + inverse)
    return each * problem.num_components**2 <= problem.budget


def least_eigenvalue(lower: torch.Tensor) -> float:
    """About the least eigenvalue of a matrix, from its Cholesky factor, by inverse iteration."""
    start = 1.0 + np.modf(np.arange(1, len(lower) + 1) * 0.618033988749895)[0]
    vector = torch.from_numpy(start).to(lower)[:, None]
    found = 1.0
    for _ in range(INVERSE_STEPS):
        vector = vector / vector.norm()
        vector = torch.cholesky_solve(vector, lower)
        found = 1.0 / max(float(vector.norm()), 1e-30)
    return found


def rank_bound(counts: MaskStatistics) -> int:
    """Directions in which the masks can vary at most: fewer if rows are few, or all sets of one size."""
    varying = ~counts.constant
    determined = int(varying.sum())
    # Sets of one size: X'X 1 = size X'1, in whole numbers.
    sums = counts.gram.sum(axis=1, dtype=np.int64)
    kept = int(counts.counts.sum())
    one_size = bool(np.array_equal(sums * counts.rows, kept * counts.counts)) and determined > 0
    return min(determined - one_size, counts.rows - 1)
