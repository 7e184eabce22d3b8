"""Evaluating attributions: its cost over bare forward passes, its figures against scipy and scikit-learn.

python -m benchmarks.evaluation [--small] [--json PATH]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

import coar
from benchmarks.report import Report, main, median_seconds, ratio
from coar.metrics import per_column
from coar.plan import size
from coar.tasks import digits

MEMORY = """
import sys, coar
from coar.testing import SubsetMean
experiment = SubsetMean(num_points=312, num_features=4_000)
methods = {str(seed): coar.random_attributions(experiment, seed) for seed in range(2)}
found = coar.evaluate(experiment, methods, [0.1], int(sys.argv[2]), directory=sys.argv[1], progress=False)
found.means(), found.compare("0", "1")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
FRACTION = 0.10


def run(report: Report) -> None:
    """All measurements."""
    measure_overhead(report)
    measure_figures(report)
    with tempfile.TemporaryDirectory() as scratch:
        measure_memory(report, Path(scratch))


def measure_overhead(report: Report) -> None:
    """`coar.evaluate` of three methods, all included, against as many forwards of the bare model, in turn."""
    rows, repeats = (20, 3) if report.small else (100, 7)
    task = digits.make_task()
    experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
    methods = {str(seed): coar.random_attributions(experiment, seed=seed) for seed in range(3)}
    batch_size = experiment.prepare(experiment.device).record()["batch_size"]
    batches = [batch for _, batch in task.batches(batch_size)]

    def ours() -> None:
        coar.evaluate(experiment, methods, FRACTION, rows, progress=False).means()

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(rows):
                for batch in batches:
                    task.outputs["margin"](task.model, batch)

    times = median_seconds({"ours": ours, "limit": bare}, repeats)
    found = ratio(times["ours"], times["limit"])
    each: dict[str, float] = {name: float(np.median(t)) for name, t in times.items()}
    report.table(
        f"{rows} rows, {len(task)} images, {torch.get_num_threads()} threads",
        [
            {"what": "ours: masks, forwards, three methods, figures, intervals", "seconds": each["ours"]},
            {"what": "limit: forwards and margins of the bare model", "seconds": each["limit"]},
            {"what": "ratio, median of pairs", "seconds": found},
        ],
    )
    report.measure("overhead", found)


def measure_figures(report: Report) -> None:
    """All figures of random columns against scipy and scikit-learn, and the time of both."""
    rows, columns = (100, 200) if report.small else (200, 2_000)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(rows, columns)).round(1).astype(np.float32) + 30  # with ties, far from 0
    predicted = truth.astype(np.float64) + rng.normal(size=(rows, columns)) * np.linspace(0.01, 5, columns)
    found = per_column(truth, predicted)
    theirs = of_libraries(truth, predicted)
    differences = {name: float(np.abs(found[name] - theirs[name]).max()) for name in found}
    times = median_seconds(
        {"ours": lambda: per_column(truth, predicted), "theirs": lambda: of_libraries(truth, predicted)}, 3
    )
    report.table("largest difference to scipy and scikit-learn", [differences])
    report.table(
        f"all figures of {columns:,} columns, {rows} rows",
        [{"what": name, "seconds": float(np.median(t))} for name, t in times.items()],
    )
    report.measure("figures", max(differences.values()))


def of_libraries(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """The same figures, column by column."""
    found: dict[str, list[Any]] = {"pearson": [], "spearman": [], "r2": [], "slope": []}
    for y, p in zip(truth.T.astype(np.float64), predicted.T, strict=True):
        found["pearson"].append(stats.pearsonr(y, p).statistic)
        found["spearman"].append(stats.spearmanr(y, p).statistic)
        found["r2"].append(r2_score(y, p))
        found["slope"].append(LinearRegression().fit(p[:, None], y).coef_[0])
    return {name: np.array(values) for name, values in found.items()}


def measure_memory(report: Report, folder: Path) -> None:
    """Peak memory of a process that evaluates from disk, with few and with ten times the rows."""
    counts = (100, 500) if report.small else (500, 5_000)
    peaks = {}
    for count in counts:
        command = [sys.executable, "-c", MEMORY, str(folder / str(count)), str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[count] = 1024 * int(done.stdout.split()[-1])
    report.table(
        "memory, 4,000 columns, two methods",
        [{"rows": n, "outputs on disk": size(16_000 * n), "peak": size(peak)} for n, peak in peaks.items()],
    )
    few, many = peaks.values()
    report.measure("memory", many / few)


if __name__ == "__main__":
    main("evaluation", run)
