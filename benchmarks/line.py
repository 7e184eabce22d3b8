"""The line end to end on handwritten digits: quality, speed, memory.

python -m benchmarks.line [--small] [--json PATH]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge as SklearnRidge

import coar
from benchmarks.report import Report, main, median_seconds, ratio
from coar import demo
from coar.attributions import Attributions
from coar.plan import size

IMPORT = "import time, torch; t = time.perf_counter(); import coar; print(time.perf_counter() - t)"
MEMORY = """
import sys, coar
from coar.testing import SubsetMean
experiment = SubsetMean(num_points=312, num_features=4_000)
design = coar.Bernoulli(ablation_fraction=0.1)
study = coar.Study.create(sys.argv[1], experiment, design, int(sys.argv[2]), rows_per_shard=100)
study.run(progress=False)
coar.fit(study)
# Not getrusage: its maximum survives exec and would be that of the benchmark itself.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run(report: Report) -> None:
    """All measurements."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        measure_demo(report, folder)
        study = coar.Study.open(folder / "demo/study")
        measure_quality(report, study, folder)
        measure_fit(report, folder, study)
        measure_overhead(report, study, folder)
        measure_memory(report, folder)
    seconds = min(float(output_of(["-c", IMPORT])) for _ in range(3))
    report.measure("import_seconds", seconds)


def measure_demo(report: Report, folder: Path) -> None:
    """`coar demo`, as a person runs it, twice; --small takes 1,500 rows."""
    rows = 1_500 if report.small else demo.NUM_ROWS
    command = f"import coar.demo as d; d.NUM_ROWS = {rows}; d.run_demo({str(folder / 'demo')!r})"
    times = []
    for _ in range(2):
        start = time.perf_counter()
        print(output_of(["-c", command]), flush=True)
        times.append(time.perf_counter() - start)
    report.table("coar demo", [{"run": "first", "seconds": times[0]}, {"run": "second", "seconds": times[1]}])
    report.measure("demo_seconds", times[0])
    report.measure("demo_again_seconds", times[1])


def measure_quality(report: Report, study: coar.Study, folder: Path) -> None:
    """The demo's held-out correlations again, from its own files."""
    names = {
        "regression": "ridge",
        "leave-one-out": "leave-one-out",
        "gradient x parameter": "gradient-x-parameter",
    }
    methods = {method: Attributions.load(study.attributions_path(name)) for method, name in names.items()}
    fractions, rows = demo.TEST_FRACTIONS, demo.TEST_ROWS
    found = coar.evaluate(study.experiment, methods, fractions, rows, directory=folder / "demo/held-out")
    report.table("held-out correlation", found.means().to_dict("records"))
    difference = found.compare("regression", "leave-one-out")
    report.table("regression minus leave-one-out, paired", difference.to_dict("records"))
    at_training = difference.set_index("ablation_fraction").loc[demo.FRACTION]
    report.measure("regression_above_leave_one_out", float(at_training.low))
    report.measure("accuracy", float((study.untouched["margin"] > 0).mean()))


def measure_fit(report: Report, folder: Path, demo_study: coar.Study) -> None:
    """4,000 rows x 312 components x 500 columns from disk; scikit-learn on arrays in memory; X'Y alone."""
    study = random_study(folder / "fit", demo_study)
    masks, outputs = np.asarray(study.masks), np.asarray(study.outputs["mean"])
    design = ((masks - masks.mean(axis=0)) / masks.std(axis=0)).astype(np.float32)
    times = median_seconds(
        {
            "ours: read, check digests, 20 penalties by GCV, errors": lambda: coar.fit(study),
            "scikit-learn Ridge(cholesky), one penalty, in memory": lambda: SklearnRidge(
                alpha=1.0, solver="cholesky"
            ).fit(design, outputs),
            "limit: the product X'Y": lambda: design.T @ outputs,
        },
        repeats=5,
    )
    report.table("fit", [{"what": name, "seconds": float(np.median(t))} for name, t in times.items()])
    report.measure("fit_seconds", float(np.median(next(iter(times.values())))))


def random_study(folder: Path, like: coar.Study) -> coar.Study:
    """A study of the size named in the claim; the numbers do not matter for the time."""
    from coar.testing import SubsetMean

    experiment = SubsetMean(num_points=len(like.components), num_features=500)
    design = coar.Bernoulli(ablation_fraction=demo.FRACTION)
    study = coar.Study.create(folder, experiment, design, 4_000, rows_per_shard=100)
    study.run(progress=False)
    return study


def measure_overhead(report: Report, study: coar.Study, folder: Path) -> None:
    """Rows with masks and store against the same forward passes of the bare model, in turn."""
    experiment = study.experiment
    assert isinstance(experiment, coar.ComponentAblation)
    rows, repeats = (20, 5) if report.small else (60, 9)
    design = coar.Bernoulli(ablation_fraction=demo.FRACTION, seed=5)
    timed = coar.Study.create(
        folder / "overhead", experiment, design, rows * (repeats + 1), rows_per_shard=rows
    )
    worker, items = timed.worker(experiment.device), iter(timed.items())
    bare = bare_forwards(experiment, worker.runner.record()["batch_size"], rows)
    times = median_seconds({"ours": lambda: worker.do(next(items)), "limit": bare}, repeats)
    each = {name: 1e3 * float(np.median(t)) / rows for name, t in times.items()}
    found = ratio(times["ours"], times["limit"])
    report.table(
        f"one row, {len(experiment.task)} images, {torch.get_num_threads()} threads",
        [
            {"what": "ours: mask, forwards, margins, store", "ms": each["ours"]},
            {"what": "limit: forwards and margins", "ms": each["limit"]},
            {"what": "ratio, median of pairs", "ms": found},
        ],
    )
    report.measure("overhead", found)


def bare_forwards(experiment: coar.ComponentAblation, batch_size: int, rows: int) -> object:
    """The untouched model over the same batches, as often."""
    task = experiment.task
    batches = [batch for _, batch in task.batches(batch_size)]

    def forward() -> None:
        with torch.inference_mode():
            for _ in range(rows):
                for batch in batches:
                    task.outputs["margin"](task.model, batch)

    return forward


def measure_memory(report: Report, folder: Path) -> None:
    """Peak memory of a process that runs and fits, with few and with ten times the rows.

    With 4,000 columns the rows outweigh the rest: 20,000 of them are 320 MB.
    """
    peaks = {}
    for rows in (200, 2_000) if report.small else (2_000, 20_000):
        peaks[rows] = 1024 * int(output_of(["-c", MEMORY, str(folder / f"memory-{rows}"), str(rows)]))
    report.table(
        "memory", [{"rows": n, "on disk": size(n * 16_000), "peak": size(p)} for n, p in peaks.items()]
    )
    few, many = peaks.values()
    report.measure("memory", many / few)


def output_of(arguments: list[str]) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main("line", run)
