"""Ridge by conjugate gradients, for designs whose [components, components] matrix does not fit.

The same objective as `coar.regression.ridge`, per column on standardised masks x:

    (1 / 2 rows) |y - x w - b|^2 + (penalty / 2) |w|^2,   that is   (G + penalty) w = c

with the correlation matrix G = x'x / rows and c = x'y / rows. It takes products with G alone, which
`coar.regression.matrix_free` makes from packed masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from coar.attribution_blocks import Block
from coar.regression.collection import ALL, HELD_OUT, TRAIN
from coar.regression.conjugate_solve import Solution, joined, solve
from coar.regression.doubts import say
from coar.regression.matrix_free import Correlation
from coar.regression.problem import PackedMasks, Problem
from coar.regression.ridge_settings import RidgeSettings
from coar.regression.spectrum import explained, require_determined
from coar.regression.statistics import MaskCounts

PATIENCE = 2  # larger held-out errors in a row that end a column's path
AT_ONCE = 256  # columns: products of them stay in the processor's cache
ROUNDING = 1.1  # what a residual, computed anew, may be above the tolerance
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # in each byte
_BLOCK_ROWS = 2048


class ConjugateGradientFitter:
    """Fits blocks of columns by conjugate gradients.

    With several penalties each column follows them from the largest to the smallest on the training
    rows, each solution the start of the next; the penalty with the smallest mean squared error on the
    held-out rows is then used on all rows.

    Args:
        settings: penalties, tolerance, cap.
        problem: the rows; some held out where there are several penalties.

    Raises:
        FitError: a penalty of 0 where the masks do not determine every weight.
    """

    def __init__(self, settings: RidgeSettings, problem: Problem) -> None:
        self._settings, self._problem = settings, problem
        self.penalties = np.array(sorted(set(settings.grid), reverse=True))
        self.notes: dict[str, Any] = {
            "algorithm": "conjugate_gradient",
            "errors": "none: they need the inverse of the components x components matrix",
        }
        if len(self.penalties) > 1:
            problem.hold_out(settings.held_out)
            self.notes["penalty"] = f"smallest squared error on every {settings.held_out}th row, held out"
        self._correlations: dict[str, Correlation] = {}
        packed = problem.packed()
        self._correlations[ALL] = Correlation(packed, problem.counts(), problem.device)
        self.rank = rank_bound(packed, problem.counts())
        if self.penalties[-1] == 0:
            require_determined(problem.counts(), self.rank)

    def fit(self, columns: slice) -> Block:
        """Fit these columns to all rows.

        Warns:
            CoarWarning: columns that are not solved to the tolerance within the cap.
        """
        penalty, details, start = self._choose(columns)
        counts, outputs = self._problem.counts(), self._problem.outputs(columns)
        right = outputs.covariance(counts)
        found = self._solve(ALL, right, penalty, start)
        self._warn(found)
        weights = counts.per_mask_unit(found.weights.T)
        # |y - x w|^2 / rows with G w = c - penalty w - remainder put in
        gain = (found.weights * (right + found.remainder)).sum(axis=0)
        gain += penalty * (found.weights**2).sum(axis=0)
        details["r2"] = explained(np.maximum(outputs.variance - gain, 0.0), outputs.variance)
        details["iterations"], details["residual"] = found.iterations.astype(np.float64), found.residual
        return Block(columns.start, weights, outputs.mean - weights @ counts.mean, None, details)

    def _choose(self, columns: slice) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
        """Penalty of each column, its details, and weights to start from."""
        path = _Path(len(range(*columns.indices(self._problem.num_columns))), self._problem.num_components)
        if len(self.penalties) == 1:
            path.penalty[:] = self.penalties[0]
            return path.penalty, {"penalty": path.penalty}, None
        right = self._problem.outputs(columns, TRAIN).covariance(self._problem.counts(TRAIN))
        for penalty in self.penalties:
            found = self._solve(TRAIN, right[:, path.live], penalty, path.last)
            path.add(penalty, found.weights, self._held_out_error(columns, path.live, found.weights))
            if not len(path.live):
                break
        return path.penalty, {"penalty": path.penalty, "score": path.score}, path.best

    def _solve(
        self, part: str, right: np.ndarray, penalty: float | np.ndarray, start: np.ndarray | None
    ) -> Solution:
        correlation, strength = self._correlation(part), np.broadcast_to(penalty, right.shape[1])
        found = [
            solve(
                correlation,
                right[:, here],
                strength[here],
                tolerance=self._settings.tolerance,
                max_iterations=self._settings.max_iterations,
                start=None if start is None else start[:, here],
                device=correlation.device,
            )
            for here in _slices(right.shape[1])
        ]
        return joined(found)

    def _correlation(self, part: str) -> Correlation:
        if part not in self._correlations:
            packed, counts = self._problem.packed(part), self._problem.counts(part)
            self._correlations[part] = Correlation(packed, counts, self._problem.device)
        return self._correlations[part]

    def _held_out_error(self, columns: slice, live: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Mean squared error on the held-out rows of a fit to the others, [live columns]."""
        correlation, total, rows = self._correlation(TRAIN), np.zeros(len(live)), 0
        prediction = correlation.prediction(torch.from_numpy(weights).to(correlation.device))
        mean = self._problem.outputs(columns, TRAIN).mean[live]
        for block in self._problem.blocks(columns, HELD_OUT):
            masks = torch.from_numpy(np.ascontiguousarray(block.masks)).view(torch.int8)
            predicted = prediction(masks.to(correlation.device)).cpu().numpy()
            total += ((block.outputs[:, live] - mean - predicted) ** 2).sum(axis=0)
            rows += len(masks)
        return total / rows

    def _warn(self, found: Solution) -> None:
        settings = self._settings
        unsolved = found.residual > ROUNDING * settings.tolerance
        if unsolved.any():
            worst = int(np.argmax(found.residual))
            say(
                f"{int(unsolved.sum())} of {len(unsolved)} columns are not solved to a relative residual of "
                f"{settings.tolerance:g}; the worst is at {found.residual[worst]:.2g} after "
                f"{found.iterations[worst]} iterations: raise max_iterations, the penalty or the tolerance "
                "(1e-5 is about the smallest that rounding allows)"
            )


def _slices(num_columns: int) -> Iterator[slice]:
    for first in range(0, num_columns, AT_ONCE):
        yield slice(first, first + AT_ONCE)


class _Path:
    """The best penalty so far of each column, and the columns that still follow the path."""

    def __init__(self, num_columns: int, num_components: int) -> None:
        self.live = np.arange(num_columns)
        self.penalty, self.score = np.zeros(num_columns), np.full(num_columns, np.inf)
        self.best = np.zeros((num_components, num_columns))
        self.last: np.ndarray | None = None  # weights of the live columns at the last penalty
        self._worse = np.zeros(num_columns, dtype=int)

    def add(self, penalty: float, weights: np.ndarray, error: np.ndarray) -> None:
        """Take in the next penalty; columns that got worse twice in a row leave."""
        better = error < self.score[self.live]
        here = self.live[better]
        self.penalty[here], self.score[here], self.best[:, here] = penalty, error[better], weights[:, better]
        self._worse[self.live] += 1
        self._worse[here] = 0
        stays = self._worse[self.live] < PATIENCE
        self.live, self.last = self.live[stays], weights[:, stays]


def rank_bound(packed: PackedMasks, counts: MaskCounts) -> int:
    """Directions in which the masks can vary at most: fewer if rows are few, or all sets of one size."""
    blocks = range(0, packed.rows, _BLOCK_ROWS)
    sizes = np.concatenate([_ONES[packed.bits[k : k + _BLOCK_ROWS]].sum(axis=1) for k in blocks])
    determined = int((~counts.constant).sum())
    return min(determined - int(np.ptp(sizes) == 0 and determined > 0), counts.rows - 1)
