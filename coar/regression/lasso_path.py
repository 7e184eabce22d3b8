"""The path of penalties: warm starts, choice on held-out rows, a fit to all rows; what for: `lasso`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coar.attribution_blocks import Block
from coar.errors import FitError
from coar.plan import size
from coar.regression import coordinate_descent, fista
from coar.regression.collection import ALL, HELD_OUT, TRAIN
from coar.regression.doubts import say
from coar.regression.lasso_settings import LassoSettings
from coar.regression.problem import Problem
from coar.regression.spectrum import explained
from coar.regression.statistics import MaskCounts, OutputStatistics

FISTA_ITERATIONS = 10  # for each sweep that is allowed
NEGLIGIBLE = 2e-3  # of the largest penalty
POLISH = 5  # times that a solution is continued from a residual computed anew
_BYTES = 32  # per entry of a matrix of all components: three int32 sums, four float32 matrices, one spare


@dataclass(frozen=True)
class Solve:
    """Runs one of the two algorithms."""

    algorithm: str
    device: torch.device

    def __call__(self, max_sweeps: int, *arrays: Any, **options: Any) -> np.ndarray:
        """Sweeps (or iterations) of each column; more than allowed where they did not suffice."""
        descend: Callable[..., np.ndarray] = coordinate_descent.descend
        minimise: Callable[..., np.ndarray] = fista.minimise
        if self.algorithm == "coordinate_descent":
            return descend(*arrays, max_sweeps, **options)
        allowed = FISTA_ITERATIONS * max_sweeps
        iterations = minimise(*arrays, allowed, device=self.device, **options)
        return np.where(iterations > allowed, max_sweeps + 1, iterations)


class Part:
    """What a fit needs of one part of the rows: the matrix of all columns, and their means."""

    def __init__(self, problem: Problem, part: str, deviation: np.ndarray | None = None) -> None:
        masks = problem.masks(part)
        self.part, self.problem = part, problem
        self.counts = MaskCounts(masks.rows, masks.counts)
        self.deviation = masks.deviation if deviation is None else deviation
        own = deviation is None
        self.gram = masks.correlation(np.float32) if own else masks.covariance(self.deviation, np.float32)
        self.prepared: Any = self.gram  # as the algorithm wants it

    def prepare(self, algorithm: str, dense: bool) -> None:
        """Cut the matrix into tiles where coordinate descent runs; let go of the dense one if asked."""
        if algorithm == "coordinate_descent":
            self.prepared = coordinate_descent.Tiles(self.gram)
            if not dense:
                self.gram = np.empty((0, 0), np.float32)

    def outputs(self, columns: slice) -> tuple[OutputStatistics, np.ndarray]:
        """Statistics of some columns, and their covariance with the masks, float32 [columns, components]."""
        outputs = self.problem.outputs(columns, self.part)
        covariance = outputs.covariance(self.counts, self.deviation)
        return outputs, np.ascontiguousarray(covariance.T.astype(np.float32))


class LassoFitter:
    """The matrices of one design, ready to fit any block of columns."""

    def __init__(self, settings: LassoSettings, problem: Problem, solve: Solve, why: str) -> None:
        self.settings, self.problem, self.solve = settings, problem, solve
        self.notes: dict[str, Any] = {"algorithm": solve.algorithm, "why": why}
        self.chooses = settings.penalties is None or len(settings.penalties) > 1
        problem.hold_out(settings.held_out if self.chooses else 0)
        _require_memory(problem)
        if self.chooses:
            self.train = Part(problem, TRAIN)
            self.train.prepare(solve.algorithm, dense=False)
            self.held = Part(problem, HELD_OUT, self.train.deviation)
            self.held.prepare(solve.algorithm, dense=False)
        self.whole = Part(problem, ALL)
        problem.forget_gram()
        self.whole.prepare(solve.algorithm, dense=True)

    def fit(self, columns: slice) -> Block:
        """Fit some columns."""
        outputs, covariance = self.whole.outputs(columns)
        largest = np.abs(covariance).max(axis=1).astype(np.float64) / self.settings.l1_ratio
        details: dict[str, np.ndarray] = {}
        if self.chooses:
            penalty, weights, details["held_out_error"] = self._choose(columns)
            rescale = self.whole.deviation / np.where(self.train.deviation > 0, self.train.deviation, np.inf)
            weights = (weights * rescale).astype(np.float32)
        else:
            assert self.settings.penalties is not None
            penalty = np.full(len(covariance), self.settings.penalties[0])
            weights = np.zeros_like(covariance)
        residual, sweeps = self._refit(covariance, weights, penalty, largest)
        kkt = self._violation(residual, weights, penalty) / np.where(largest > 0, largest, 1.0)
        self._warn(kkt, sweeps)
        own = weights.astype(np.float64)
        # |y - x w|^2 / rows = variance - w'(c + r) for r = c - G w
        left = np.maximum(outputs.variance - np.einsum("ij,ij->i", own, covariance + residual), 0.0)
        details |= {"penalty": penalty, "r2": explained(left, outputs.variance), "kkt": kkt}
        details |= {"sweeps": sweeps.astype(float), "nonzeros": (weights != 0).sum(axis=1).astype(float)}
        own = self.whole.counts.per_mask_unit(own)
        return Block(columns.start, own, outputs.mean - own @ self.whole.counts.mean, None, details)

    def _split(self, penalty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """l1 and l2 of penalties."""
        ratio = self.settings.l1_ratio
        return (penalty * ratio).astype(np.float32), (penalty * (1 - ratio)).astype(np.float32)

    def _refit(
        self, covariance: np.ndarray, weights: np.ndarray, penalty: np.ndarray, largest: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Solve on all rows; the residual is computed anew until the conditions hold."""
        l1, l2 = self._split(penalty)
        tolerance = np.maximum(self.settings.refit_tolerance * largest, 1e-30).astype(np.float32)
        sweeps: np.ndarray = np.zeros(len(weights), np.int64)
        wrong: np.ndarray = np.arange(len(weights))
        residual = covariance - weights @ self.whole.gram
        for _ in range(POLISH):
            arrays = (self.whole.prepared, weights, residual, l1, l2, tolerance / 2)
            sweeps[wrong] += self.solve(self.settings.max_sweeps, *arrays, chosen=wrong)
            residual[wrong] = covariance[wrong] - weights[wrong] @ self.whole.gram
            _require_finite(residual)
            late = sweeps > self.settings.max_sweeps
            wrong = np.flatnonzero((self._violation(residual, weights, penalty) > tolerance) & ~late)
            if not len(wrong):
                break
        return residual, sweeps

    def _violation(self, residual: np.ndarray, weights: np.ndarray, penalty: np.ndarray) -> np.ndarray:
        l1, l2 = (torch.from_numpy(part)[:, None] for part in self._split(penalty))
        found = fista.violation(torch.from_numpy(residual), torch.from_numpy(weights), l1, l2)
        return found[:, 0].numpy().astype(np.float64)

    def _choose(self, columns: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Penalty, weights (of training rows) and held-out error of each column's best penalty."""
        train, covariance = self.train.outputs(columns)
        held, held_covariance = self.held.outputs(columns)
        shifts = _Shifts(self.train, self.held, train, held)
        largest = np.abs(covariance).max(axis=1).astype(np.float64) / self.settings.l1_ratio
        tolerance = np.maximum(self.settings.tolerance * largest, 1e-30).astype(np.float32)
        weights = np.zeros_like(covariance)
        residual, held_residual = covariance.copy(), held_covariance.copy()
        best, ahead = _Best(weights), Ahead(weights, residual, held_residual)
        capped: np.ndarray = np.zeros(len(weights), bool)
        for penalty in self._path(largest):
            live = best.live(self.settings.patience)
            if not len(live):
                break
            ahead.move(live, penalty[live])
            arrays = (self.train.prepared, weights, residual, *self._split(penalty), tolerance)
            second = (self.held.prepared, held_residual)
            sweeps = self.solve(self.settings.max_sweeps, *arrays, second=second, chosen=live)
            capped[live] |= sweeps > self.settings.max_sweeps
            _require_finite(residual)
            error = shifts.error(weights[live], held_covariance[live] + held_residual[live], live)
            best.look(live, penalty, error, weights)
        if capped.any():
            say(
                f"{int(capped.sum())} of {len(capped)} columns were not solved on all of their path within "
                f"{self.settings.max_sweeps} sweeps: the penalty chosen may not be the best; raise max_sweeps"
            )
        self._warn_end(best.penalty, largest)
        return best.penalty, best.weights, best.error

    def _warn_end(self, penalty: np.ndarray, largest: np.ndarray) -> None:
        """Warn where many columns would have gone on."""
        least = self.settings.smallest * largest
        if self.settings.penalties is not None:
            least = np.full(len(largest), self.settings.penalties[-1])
        # A penalty of a thousandth of the largest shrinks nothing worth mentioning.
        ended = float(np.mean((penalty <= least * (1 + 1e-9)) & (penalty > NEGLIGIBLE * largest)))
        if ended > 0.2:
            say(f"{ended:.0%} of the columns chose the smallest penalty of their path: let it go on")

    def _path(self, largest: np.ndarray) -> Iterator[np.ndarray]:
        """Penalties of all columns, from the largest on, [columns] each."""
        if self.settings.penalties is not None:
            for penalty in self.settings.penalties:
                yield np.full(len(largest), penalty)
            return
        for share in np.geomspace(1.0, self.settings.smallest, self.settings.num_penalties):
            yield largest * share

    def _warn(self, kkt: np.ndarray, sweeps: np.ndarray) -> None:
        late = (kkt > self.settings.refit_tolerance) & (sweeps > 0)
        if late.any():
            say(
                f"{int(late.sum())} of {len(late)} columns do not meet the optimality conditions to "
                f"{self.settings.refit_tolerance:g} of penalty_max; the worst is at {kkt.max():.2g}: "
                "raise max_sweeps"
            )


class Ahead:
    """Warm starts that look ahead along the path.

    Between two penalties at which a weight appears or leaves, weights are linear in the penalty, and
    residuals with them: the next solution is on the line through the last two.

    Args:
        arrays: weights and residuals [columns, components]; moved in place.
    """

    def __init__(self, *arrays: np.ndarray) -> None:
        self._arrays = arrays
        self._before = [array.copy() for array in arrays]
        self._penalties: list[np.ndarray] = []  # the last two of every column

    def move(self, live: np.ndarray, penalty: np.ndarray) -> None:
        """Move some columns to where the line through their last two solutions is at a new penalty."""
        full = np.zeros(len(self._arrays[0]))
        full[live] = penalty
        if len(self._penalties) == 2:
            last, before = (kept[live] for kept in self._penalties)
            gap = last - before
            factor = np.divide(penalty - last, gap, out=np.zeros_like(gap), where=gap != 0)[:, None]
            for array, older in zip(self._arrays, self._before, strict=True):
                now = array[live]
                array[live] = now + factor.astype(np.float32) * (now - older[live])
                older[live] = now
        elif self._penalties:  # one solution: a point, no line
            for array, older in zip(self._arrays, self._before, strict=True):
                older[live] = array[live]
        self._penalties = [full, *self._penalties[:1]]


class _Best:
    """The best penalty of each column so far."""

    def __init__(self, weights: np.ndarray) -> None:
        count = len(weights)
        self.weights = weights.copy()
        self.penalty, self.error = np.zeros(count), np.full(count, np.inf)
        self._worse = np.zeros(count, np.int64)

    def live(self, patience: int | None) -> np.ndarray:
        """Columns that are still on their path."""
        return np.flatnonzero(self._worse < (patience or np.iinfo(np.int64).max))

    def look(self, live: np.ndarray, penalty: np.ndarray, error: np.ndarray, weights: np.ndarray) -> None:
        """Take what is better."""
        better = error < self.error[live]
        self._worse[live] = np.where(better, 0, self._worse[live] + 1)
        improved = live[better]
        self.error[improved], self.penalty[improved] = error[better], penalty[improved]
        self.weights[improved] = weights[improved]


class _Shifts:
    """Held-out errors from sums: both parts have means of their own."""

    def __init__(
        self, train: Part, held: Part, outputs: OutputStatistics, held_outputs: OutputStatistics
    ) -> None:
        inverse = 1.0 / np.where(train.deviation > 0, train.deviation, np.inf)
        self._masks = ((held.counts.mean - train.counts.mean) * inverse).astype(np.float32)
        self._outputs = held_outputs.mean - outputs.mean
        self._variance = held_outputs.variance

    def error(self, weights: np.ndarray, both: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Mean squared error on the held-out rows, from w and c + r of these rows."""
        spread = self._variance[columns] - np.einsum("ij,ij->i", weights, both)
        return np.maximum(spread, 0.0) + (self._outputs[columns] - weights @ self._masks) ** 2


def _require_finite(residual: np.ndarray) -> None:
    bad = ~np.isfinite(residual.sum(axis=1))
    if bad.any():
        raise FitError(
            f"the weights of column {int(np.argmax(bad))} of this block are not finite",
            expected="finite numbers",
            todo="look at the outputs of this column; use larger penalties",
        )


def _require_memory(problem: Problem) -> None:
    needed = _BYTES * problem.num_components**2
    if needed > problem.budget:
        raise FitError(
            "the matrices of this design do not fit into the memory to plan with",
            expected=size(needed),
            got=size(problem.budget),
            todo="allow more (memory=), use fewer components, or coar.Ridge, which can do without them",
        )
