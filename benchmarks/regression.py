"""Regression: ridge, LASSO and problems larger than memory, next to scikit-learn, adelie, celer and skglm.

CPU-seconds of one thread, on synthetic data with the shape of component datasets. The LASSO part and the
large problems are in `regression_lasso` and `regression_large`.

python -m benchmarks.regression [--small] [--json PATH]
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from threadpoolctl import threadpool_limits

import coar
from benchmarks import regression_large, regression_lasso
from benchmarks.regression_data import coar_like
from benchmarks.report import Report, main
from coar.experiments.memory import keep_freed_memory
from coar.regression.fast_l1 import FastL1
from coar.regression.fitting import fit_blocks
from coar.regression.problem import Problem

PENALTY = 0.05
SIZES = ((5_000, 688, 500), (20_000, 2_304, 1_000))  # rows, components, columns
SMALL_SIZES = ((3_000, 300, 100), (5_000, 688, 100))
GAP_COLUMNS = 20  # that the objective is computed for, in float64


def run(report: Report) -> None:
    """All measurements."""
    keep_freed_memory()
    torch.set_num_threads(1)
    # After all imports: each library brings its own pool of threads.
    with threadpool_limits(1):
        gaps = []
        for full, size in zip(SIZES, SMALL_SIZES if report.small else SIZES, strict=True):
            data = coar_like(*size, seed=0)
            gaps.append(measure_ridge(report, full[1], *data))
            regression_lasso.measure(report, full[1], *data)
        report.measure("objective_gap", max(gaps))
        measure_disk(report)
    regression_large.measure(report)
    measure_fast_l1(report)


def measure_ridge(report: Report, name: int, masks: np.ndarray, outputs: np.ndarray) -> float:
    """One penalty, and a path, next to scikit-learn and to the products alone."""
    design = ((masks - masks.mean(axis=0)) / masks.std(axis=0)).astype(np.float32)
    peer = SklearnRidge(alpha=PENALTY * len(masks), solver="cholesky")
    one = coar.Ridge(penalties=PENALTY, errors=False)
    actions: dict[str, Callable[[], object]] = {
        "ours: statistics and one penalty": lambda: fitted(masks, outputs, one),
        "ours, with standard errors": lambda: fitted(masks, outputs, coar.Ridge(penalties=PENALTY)),
        "ours: statistics, 20 penalties by GCV, errors": lambda: fitted(masks, outputs, coar.Ridge()),
        "scikit-learn Ridge(cholesky), one penalty, standardised float32 in memory": lambda: peer.fit(
            design, outputs
        ),
        "limit: the products X'X and X'Y alone, in float32": lambda: (design.T @ design, design.T @ outputs),
    }
    times = {what: cpu_seconds(action, 3 if report.small else 5) for what, action in actions.items()}
    ours, _, path, peers, _ = times.values()
    title = f"ridge, {len(masks)} rows x {masks.shape[1]} components x {outputs.shape[1]} columns"
    report.table(
        title, [{"what": what, "CPU-seconds": t, "of scikit-learn": t / peers} for what, t in times.items()]
    )
    report.measure(f"ridge_{name}", ours / peers)
    report.measure(f"path_{name}", path / ours)
    return objective_gap(masks, outputs, fitted(masks, outputs, one))


def fitted(masks: np.ndarray, outputs: np.ndarray, solver: coar.Ridge) -> np.ndarray:
    """Weights [columns, components]."""
    problem = Problem.from_arrays(masks, outputs)
    return np.concatenate([block.weights for block in fit_blocks(problem, solver.prepare(problem))])


def cpu_seconds(action: Callable[[], object], repeats: int) -> float:
    """Median CPU time of this process, after a warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return float(np.median(times[1:]))


def objective_gap(masks: np.ndarray, outputs: np.ndarray, weights: np.ndarray) -> float:
    """Largest relative excess of our objective over that of a float64 solution, over some columns."""
    deviation = masks.std(axis=0)
    design = (masks - masks.mean(axis=0)) / deviation
    chosen = np.linspace(0, outputs.shape[1] - 1, GAP_COLUMNS).astype(int)
    wanted = outputs[:, chosen].astype(np.float64)
    wanted -= wanted.mean(axis=0)
    matrix = design.T @ design / len(masks) + PENALTY * np.eye(masks.shape[1])
    best = np.linalg.solve(matrix, design.T @ wanted / len(masks))

    def objective(found: np.ndarray) -> np.ndarray:
        residual = wanted - design @ found
        return (residual**2).mean(axis=0) / 2 + PENALTY / 2 * (found**2).sum(axis=0)

    ours, exact = objective((weights[chosen] * deviation).T), objective(best)
    return float(np.max(ours / exact - 1))


def measure_disk(report: Report) -> None:
    """The same from a study on disk: reading, checking digests, and again from the sums that are kept."""
    from coar.testing import SubsetMean

    rows = 1_000 if report.small else 5_000
    with tempfile.TemporaryDirectory() as scratch:
        experiment = SubsetMean(num_points=688, num_features=500)
        design = coar.Bernoulli(ablation_fraction=0.1)
        study = coar.Study.create(Path(scratch) / "s", experiment, design, rows, rows_per_shard=250)
        study.run(progress=False)
        solver = coar.Ridge(penalties=PENALTY, errors=False)
        first = cpu_seconds(lambda: coar.fit(study, solver, keep_statistics=False), 3)
        coar.fit(study, solver)
        again = cpu_seconds(lambda: coar.fit(study, solver), 3)
    report.table(
        f"from disk, {rows} rows x 688 components x 500 columns, one penalty",
        [
            {"what": "every shard read, digests checked", "CPU-seconds": first},
            {"what": "again, from the sums that the first fit kept", "CPU-seconds": again},
        ],
    )


def measure_fast_l1(report: Report) -> None:
    """The original's solver, where it can run."""
    missing = [name for name in ("fast_l1", "cupy") if importlib.util.find_spec(name) is None]
    if not torch.cuda.is_available() or missing:
        reason = "needs a CUDA device" + (f" and {', '.join(missing)}" if missing else "")
        report.not_run("fast_l1", reason)
        return
    masks, outputs = coar_like(*SIZES[0], seed=0)
    solvers = {
        "ours": coar.Ridge(penalties=0.0, errors=False),
        "fast_l1": FastL1(num_penalties=0, learning_rate=1e-3, threshold=1e-10),
    }
    seconds, residuals = {}, {}
    for name, solver in solvers.items():
        problem = Problem.from_arrays(masks, outputs)
        start = time.perf_counter()
        blocks = list(fit_blocks(problem, solver.prepare(problem)))
        seconds[name] = time.perf_counter() - start
        residuals[name] = float(np.mean([1 - (block.details or {})["r2"].mean() for block in blocks]))
    rows = [{"what": n, "seconds": seconds[n], "mean of 1 - r2": residuals[n]} for n in solvers]
    report.table("least squares, 688 components: one of the four stages of the published procedure", rows)
    if residuals["ours"] <= residuals["fast_l1"]:
        report.measure("fast_l1", seconds["fast_l1"] / seconds["ours"])
    else:
        report.not_run("fast_l1", "its objective is lower than ours")


if __name__ == "__main__":
    main("regression", run)
