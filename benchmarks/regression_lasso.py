"""LASSO paths next to scikit-learn, adelie, celer and skglm: part of `benchmarks.regression`.

All solve the same problem for the same penalties, to the same violation of the optimality conditions
(1e-5 of the column's largest penalty), measured here and printed. Peers solve one column at a time and are
measured on some columns; times are per column.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import lasso_path

from benchmarks.report import Report
from coar.regression import coordinate_descent
from coar.regression.collection import is_held_out
from coar.regression.lasso import Lasso
from coar.regression.lasso_path import Ahead
from coar.regression.problem import Problem

NUM_PENALTIES, SMALLEST, HELD_OUT = 50, 1e-3, 10
WANTED = 1e-5  # violation of the optimality conditions, of the largest penalty
SHARES = np.geomspace(1.0, SMALLEST, NUM_PENALTIES)
OURS = (0.8, 0.7, 0.6, 0.5, 0.4)  # of that: what float32 residuals drift by along a path comes on top
TOLERANCES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12)  # that a peer is tried with, until it gets there


@dataclass
class Shared:
    """What every solver is given: G and c of standardised masks, and the data for those that need it."""

    gram: np.ndarray  # float64 [components, components]
    covariance: np.ndarray  # float64 [columns, components]
    design: np.ndarray  # standardised, float64 [rows, components]
    outputs: np.ndarray  # centred, float64 [rows, columns]

    def penalties(self, column: int) -> np.ndarray:
        """From the largest on."""
        return np.abs(self.covariance[column]).max() * SHARES

    def violation(self, column: int, path: np.ndarray) -> float:
        """Largest violation of a path [components, penalties], of the largest penalty."""
        penalties = self.penalties(column)
        left = self.covariance[column][:, None] - self.gram @ path
        inside = np.maximum(np.abs(left) - penalties, 0)
        moved = np.abs(left - penalties * np.sign(path))
        return float(np.where(path == 0, inside, moved).max() / penalties[0])


def measure(report: Report, name: int, masks: np.ndarray, outputs: np.ndarray) -> None:
    """The path alone, with G given; and path, choice and refit from the rows."""
    problem = Problem.from_arrays(masks, outputs)
    counts = problem.masks()
    covariance = problem.outputs(slice(0, outputs.shape[1])).covariance(counts).T
    design = (masks - counts.mean) / counts.deviation
    shared = Shared(
        counts.correlation(), covariance.copy(), design, outputs - outputs.mean(axis=0, dtype=float)
    )
    measure_path(report, name, shared)
    measure_whole(report, name, masks, outputs)


def measure_path(report: Report, name: int, shared: Shared) -> None:
    """Seconds per column of a whole path, all to the same violation."""
    sample = (4 if report.small else 6) if name > 1000 else (10 if report.small else 30)
    few = np.linspace(0, len(shared.covariance) - 1, sample).astype(int)
    for share in OURS:
        seconds, worst = our_path(shared, share)
        if worst <= WANTED:
            break
    rows = [
        {"what": "ours: lazy coordinate descent, all columns", "ms per column": 1e3 * seconds, "kkt": worst}
    ]
    found: dict[str, float] = {}
    for peer, (solve, count) in peers(shared, sample).items():
        tolerance, each, kkt = fastest(shared, solve, few[:count])
        if kkt <= WANTED:
            found[peer] = each
        what = f"{peer}, tol={tolerance:g}, {count} columns"
        rows.append({"what": what, "ms per column": 1e3 * each, "kkt": kkt})
    for row in rows:
        row["of ours"] = float(row["ms per column"]) / float(rows[0]["ms per column"])  # type: ignore[arg-type]
    components = shared.gram.shape[0]
    report.table(f"LASSO path of {NUM_PENALTIES} penalties, {components} components, G given", rows)
    scikit_learn = [each for peer, each in found.items() if peer.startswith("scikit-learn")]
    adelie = [each for peer, each in found.items() if peer.startswith("adelie")]
    claims = {f"lasso_path_{name}": scikit_learn} | ({"lasso_adelie": adelie} if name > 1000 else {})
    for claim, times in claims.items():
        if worst > WANTED:
            report.not_run(claim, f"ours is at {worst:.2g} of penalty_max, not at {WANTED:g}")
        elif not times:
            report.not_run(claim, "the peer is not installed, or does not get there")
        else:
            report.measure(claim, min(times) / seconds)


def our_path(shared: Shared, tolerance: float) -> tuple[float, float]:
    """CPU-seconds per column, and the worst violation of some columns."""
    gram = coordinate_descent.Tiles(shared.gram.astype(np.float32))
    covariance = shared.covariance.astype(np.float32)
    largest = np.abs(covariance).max(axis=1)
    zero = np.zeros(len(covariance), np.float32)
    few = np.linspace(0, len(covariance) - 1, 8).astype(int)
    for warm_up in (True, False):
        weights, residual, kept = np.zeros_like(covariance), covariance.copy(), []
        ahead, everyone = Ahead(weights, residual), np.arange(len(weights))
        start = time.process_time()
        for share in SHARES[:2] if warm_up else SHARES:
            ahead.move(everyone, largest * share)
            arrays = (
                gram,
                weights,
                residual,
                largest * np.float32(share),
                zero,
                largest * np.float32(tolerance * WANTED),
            )
            coordinate_descent.descend(*arrays, 10_000)
            kept.append(weights[few])  # a copy
        seconds = time.process_time() - start
    path = np.stack(kept).astype(np.float64)
    worst = max(shared.violation(column, path[:, k].T) for k, column in enumerate(few))
    return seconds / len(covariance), worst


Solver = Callable[[int, float], np.ndarray]


def peers(shared: Shared, sample: int) -> dict[str, tuple[Solver, int]]:
    """Name -> (solver of one column and tolerance, number of columns)."""
    x = np.asfortranarray(shared.design)
    found: dict[str, tuple[Solver, int]] = {
        "scikit-learn lasso_path, float64": (_scikit_learn(shared, x, np.float64), sample),
        "scikit-learn lasso_path, float32": (_scikit_learn(shared, x, np.float32), sample),
    }
    if importlib.util.find_spec("adelie"):
        found["adelie gaussian_cov"] = (_adelie(shared), sample)
    if importlib.util.find_spec("celer"):
        found["celer celer_path"] = (_celer(shared, x), 2)
    if importlib.util.find_spec("skglm"):
        found["skglm AndersonCD"] = (_skglm(shared, x), 1)
    return found


def _scikit_learn(shared: Shared, x: np.ndarray, dtype: type) -> Solver:
    gram = np.ascontiguousarray(shared.gram * len(x), dtype=dtype)
    x = np.asfortranarray(x, dtype=dtype)

    def solve(column: int, tolerance: float) -> np.ndarray:
        y, right = shared.outputs[:, column].astype(dtype), (shared.covariance[column] * len(x)).astype(dtype)
        options = {"tol": tolerance, "max_iter": 100_000, "check_input": False}
        alphas = shared.penalties(column).astype(dtype)
        return lasso_path(x, y, alphas=alphas, precompute=gram, Xy=right, **options)[1].astype(np.float64)

    return solve


def _adelie(shared: Shared) -> Solver:
    import adelie

    gram = np.asfortranarray(shared.gram)

    def solve(column: int, tolerance: float) -> np.ndarray:
        options = {
            "lmda_path": shared.penalties(column),
            "tol": tolerance,
            "early_exit": False,
            "progress_bar": False,
        }
        state = adelie.gaussian_cov(
            gram, shared.covariance[column], rdev_tol=0, max_iters=1_000_000, **options
        )
        return np.asarray(state.betas.todense()).T

    return solve


def _celer(shared: Shared, x: np.ndarray) -> Solver:
    from celer import celer_path

    def solve(column: int, tolerance: float) -> np.ndarray:
        y, alphas = shared.outputs[:, column], shared.penalties(column)
        return np.asarray(celer_path(x, y, pb="lasso", alphas=alphas, tol=tolerance, max_iter=100)[1])

    return solve


def _skglm(shared: Shared, x: np.ndarray) -> Solver:
    from skglm.datafits import Quadratic
    from skglm.penalties import L1
    from skglm.solvers import AndersonCD

    def solve(column: int, tolerance: float) -> np.ndarray:
        y = shared.outputs[:, column]
        tol = tolerance * shared.penalties(column)[0]
        solver = AndersonCD(tol=tol, fit_intercept=False, warm_start=True)
        weights, path = np.zeros(x.shape[1]), []
        for penalty in shared.penalties(column):
            weights = solver.solve(x, y, Quadratic(), L1(penalty), weights, x @ weights)[0]
            path.append(weights.copy())
        return np.stack(path, axis=1)

    return solve


def fastest(shared: Shared, solve: Solver, columns: np.ndarray) -> tuple[float, float, float]:
    """The loosest tolerance that meets the conditions: itself, CPU-seconds per column, worst violation."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        solve(int(columns[0]), TOLERANCES[0])  # compiles, where something compiles
        for tolerance in TOLERANCES:
            kkt = shared.violation(int(columns[0]), solve(int(columns[0]), tolerance))
            if kkt <= WANTED:
                break
        start = time.process_time()
        paths = [solve(int(column), tolerance) for column in columns]
        seconds = (time.process_time() - start) / len(columns)
    worst = max(shared.violation(int(c), path) for c, path in zip(columns, paths, strict=True))
    return tolerance, seconds, worst


def measure_whole(report: Report, name: int, masks: np.ndarray, outputs: np.ndarray) -> None:
    """Path, choice on held-out rows and refit, from the rows on; peers on some columns."""
    solver = Lasso(patience=None, tolerance=OURS[-2] * WANTED, refit_tolerance=WANTED)
    runs = {}
    for label, chosen in (("patience=None", solver), ("defaults", Lasso())):
        fit_whole(masks[:500], outputs[:500, :16], chosen)
        start = time.process_time()
        kkt = fit_whole(masks, outputs, chosen)
        runs[label] = (time.process_time() - start) / outputs.shape[1], kkt
    sample = (3 if report.small else 10) if name > 1000 else (8 if report.small else 25)
    columns = np.linspace(0, outputs.shape[1] - 1, sample).astype(int)
    each, shared_seconds = whole_by_scikit_learn(masks, outputs, columns)
    peer = each + shared_seconds / outputs.shape[1]
    rows = [
        {"what": f"ours, {label}: sums, path, choice, refit", "ms per column": 1e3 * seconds, "kkt": kkt}
        for label, (seconds, kkt) in runs.items()
    ]
    rows.append(
        {
            "what": f"scikit-learn and NumPy, G shared, {sample} columns",
            "ms per column": 1e3 * peer,
            "kkt": WANTED,
        }
    )
    report.table(f"LASSO from rows to weights, {masks.shape[1]} components, {outputs.shape[1]} columns", rows)
    report.measure(f"lasso_whole_{name}", peer / runs["patience=None"][0])


def fit_whole(masks: np.ndarray, outputs: np.ndarray, solver: Lasso) -> float:
    """Worst violation."""
    problem = Problem.from_arrays(masks, outputs)
    fitter = solver.prepare(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return max(float(fitter.fit(columns).details["kkt"].max()) for columns in problem.column_slices)  # type: ignore[index]


def whole_by_scikit_learn(masks: np.ndarray, outputs: np.ndarray, columns: np.ndarray) -> tuple[float, float]:
    """CPU-seconds per column, and those that all columns share (standardising, both G)."""
    away = is_held_out(np.arange(len(masks)), HELD_OUT)
    start = time.process_time()
    mean, deviation = masks[~away].mean(axis=0), masks[~away].std(axis=0)
    train = np.asfortranarray((masks[~away] - mean) / deviation)
    rest = (masks[away] - mean) / deviation
    whole = np.asfortranarray((masks - masks.mean(axis=0)) / masks.std(axis=0))
    grams = np.ascontiguousarray(train.T @ train), np.ascontiguousarray(whole.T @ whole)
    shared = time.process_time() - start
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for column in columns:
            y = outputs[:, column].astype(np.float64)
            centre = y[~away].mean()
            right = train.T @ (y[~away] - centre)
            alphas = np.abs(right).max() / len(train) * SHARES
            options = {"tol": SKLEARN_TOLERANCE, "max_iter": 100_000, "check_input": False}
            path = lasso_path(
                train, y[~away] - centre, alphas=alphas, precompute=grams[0], Xy=right, **options
            )[1]
            errors = ((y[away][:, None] - centre - rest @ path) ** 2).mean(axis=0)
            best = int(np.argmin(errors))
            lasso_path(
                whole,
                y - y.mean(),
                alphas=alphas[[best]],
                precompute=grams[1],
                Xy=whole.T @ (y - y.mean()),
                coef_init=path[:, best],
                **options,
            )
    return (time.process_time() - start) / len(columns), shared


SKLEARN_TOLERANCE = 1e-5  # at which its paths meet `WANTED` here, see the first table
