"""Problems larger than memory, and what a fit costs: part of `benchmarks.regression`.

Every measurement is a process of its own: `python -m benchmarks.regression_large CASE ARGUMENTS` prints
its result as JSON. Masks are held as bits and outputs as float16, so that the data are not what takes the
memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coar
from benchmarks.report import ROOT, Report
from coar.regression.collection import BLOCK_ROWS
from coar.regression.fitting import fit_blocks
from coar.regression.matrix_free import Correlation
from coar.regression.problem import Problem
from coar.rows import RowBlock

GB = 1e9
FIGURE = ROOT / "docs/images/regression_cost.png"
PENALTY, TOLERANCE = 0.05, 1e-4
CHECKED = 8  # columns whose solution is held against the design once more
BASE = {"rows": 8_000, "components": 1_024, "columns": 256}
GRID = {
    "rows": (2_000, 4_000, 8_000, 16_000, 32_000),
    "components": (256, 512, 1_024, 2_048),
    "columns": (16, 64, 256, 1_024, 4_096),
}
SMALL_BASE = {"rows": 2_000, "components": 256, "columns": 32}
SMALL_GRID = {"rows": (1_000, 2_000, 4_000), "components": (128, 256, 512), "columns": (16, 32, 64)}
SOLVERS = {
    "Cholesky, one penalty": {"penalties": PENALTY, "algorithm": "cholesky", "errors": False},
    "eigendecomposition, 20 penalties, errors": {"algorithm": "eigen"},
    "conjugate gradients, one penalty": {
        "penalties": PENALTY,
        "algorithm": "conjugate_gradient",
        "tolerance": TOLERANCE,
    },
}


def measure(report: Report) -> None:
    """All measurements."""
    measure_memory(report)
    measure_flat(report)
    measure_cost(report)


def measure_memory(report: Report) -> None:
    """Many components: by conjugate gradients, and directly."""
    cases = {"conjugate gradients, one penalty": (30_000, 22_720, 64)}
    cases["Cholesky, one penalty"] = (50_000, 22_720, 1_000)
    if report.small:
        cases = {name: (rows // 10, 2_272, columns // 10) for name, (rows, _, columns) in cases.items()}
    rows = []
    for name, size in cases.items():
        found = child("large", size=size, solver=SOLVERS[name])
        rows.append({"what": name} | dict(zip(BASE, size, strict=True)) | found)
    report.table("many components, two threads", rows)
    report.measure("cg_memory_gb", rows[0]["peak GB"])
    report.measure("direct_memory_gb", rows[1]["peak GB"])


def measure_flat(report: Report) -> None:
    """Peak memory of a fit from disk with four times the rows.

    What is freed goes back to the system at once: how the allocator happens to cut up its heap differs by
    a tenth from run to run, which would hide whether rows are held.
    """
    rows, components, columns = (4_000, 200, 500) if report.small else (20_000, 300, 1_000)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in (rows, 4 * rows):
            path = str(Path(scratch) / str(count))
            create(path, count, components, columns)
            found.append(
                {"rows": count, "MB on disk": folder_bytes(path) / 1e6} | child("stored", 1, path=path)
            )
    report.table(f"memory of a fit from disk, {components} components x {columns} columns", found)
    report.measure("memory_flat", found[1]["peak GB"] / found[0]["peak GB"])


def create(path: str, rows: int, components: int, columns: int) -> None:
    """A study on disk; its numbers do not matter."""
    from coar.testing import SubsetMean

    experiment = SubsetMean(num_points=components, num_features=columns)
    design = coar.Bernoulli(ablation_fraction=0.1)
    study = coar.Study.create(path, experiment, design, rows, rows_per_shard=100)
    study.run(progress=False)


def measure_cost(report: Report) -> None:
    """CPU-seconds against the numbers of rows, components and columns."""
    base, grid = (SMALL_BASE, SMALL_GRID) if report.small else (BASE, GRID)
    cases = [(axis, base | {axis: value}) for axis, values in grid.items() for value in values]
    sizes = [list(size.values()) for _, size in cases]
    times = {name: child("cost", 1, sizes=sizes, solver=solver) for name, solver in SOLVERS.items()}
    rows = [
        {"along": axis, **size} | {name: found[number] for name, found in times.items()}
        for number, (axis, size) in enumerate(cases)
    ]
    report.table("CPU-seconds of a fit, statistics included, one thread", rows)
    if not report.small:
        draw(rows, FIGURE)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for panel, axis in zip(panels, BASE, strict=True):
        here = [row for row in rows if row["along"] == axis]
        for name in SOLVERS:
            panel.loglog([row[axis] for row in here], [row[name] for row in here], "o-", label=name)
        fixed = ", ".join(f"{value:,} {other}" for other, value in BASE.items() if other != axis)
        panel.set(xlabel=axis, title=fixed)
        panel.set_xticks(GRID[axis], [f"{value:,}" for value in GRID[axis]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("CPU-seconds")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def child(case: str, threads: int = 2, **arguments: Any) -> Any:
    """Run a case in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.regression_large", case, json.dumps(arguments)]
    # Passive: threads that wait do not keep a core busy that others could use.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if case == "stored":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------- in the fresh process


@dataclass(frozen=True)
class PackedRows:
    """Rows in little memory: masks as bits, outputs float16 [rows, columns]."""

    bits: np.ndarray
    outputs: np.ndarray
    num_components: int
    complete: int = 0
    kept: None = None
    key: str = ""

    @property
    def num_columns(self) -> int:
        """Number of outputs."""
        return self.outputs.shape[1]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.bits)

    @property
    def shift(self) -> np.ndarray:
        """The first row."""
        return self.outputs[0].astype(np.float64)

    def blocks(self, columns: slice, start: int = 0) -> Iterator[RowBlock]:
        """Decoded, block by block."""
        for first in range(start, self.num_rows, BLOCK_ROWS):
            here = slice(first, min(first + BLOCK_ROWS, self.num_rows))
            masks = np.unpackbits(self.bits[here], axis=1, count=self.num_components, bitorder="little")
            outputs = self.outputs[here, columns].astype(np.float32)
            yield RowBlock(np.arange(here.start, here.stop), masks.view(bool), outputs)


def drawn(rows: int, components: int, columns: int, seed: int = 0) -> PackedRows:
    """About a tenth of the components ablated; outputs share 16 directions; as much noise as signal."""
    rng = np.random.default_rng(seed)
    shared = torch.from_numpy(rng.normal(size=(components, 16)).astype(np.float32))
    loads = rng.normal(size=(16, columns)).astype(np.float32) / np.sqrt(0.09 * 16 * components)
    bits = np.empty((rows, (components + 7) // 8), np.uint8)
    outputs = np.empty((rows, columns), np.float16)
    for first in range(0, rows, 1_000):
        here = slice(first, min(first + 1_000, rows))
        masks = rng.integers(0, 256, (here.stop - first, components), dtype=np.uint8) < 230
        bits[here] = np.packbits(masks, axis=1, bitorder="little")
        signal = (torch.from_numpy(masks).float() - 0.9) @ shared
        outputs[here] = signal.numpy() @ loads + rng.normal(size=(len(masks), columns))
    return PackedRows(bits, outputs, components)


def large(size: list[int], solver: dict[str, Any]) -> dict[str, float]:
    """Time and peak memory of one fit, and how well the equations are solved."""
    problem = Problem(drawn(*size), budget=int(16 * GB))
    start = time.perf_counter(), time.process_time()
    blocks = list(fit_blocks(problem, coar.Ridge(**solver).prepare(problem)))
    wall, busy = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = peak_bytes()
    iterations = [block.details.get("iterations", np.zeros(1)).max() for block in blocks if block.details]
    weights = np.concatenate([block.weights[:CHECKED] for block in blocks])[:CHECKED]
    return {
        "seconds": wall,
        "CPU-seconds": busy,
        "peak GB": peak / GB,
        "iterations": int(max(iterations)),
        "relative residual": residual(problem, weights),
    }


def residual(problem: Problem, weights: np.ndarray) -> float:
    """Largest |c - (G + penalty) w| / |c| of the first columns."""
    counts = problem.counts()
    right = problem.outputs(slice(0, len(weights))).covariance(counts)
    standard = (weights * counts.deviation).T.astype(np.float64)
    image = Correlation(problem.packed(), counts)(torch.from_numpy(standard)).numpy()
    missing = right - image - PENALTY * standard
    return float((np.linalg.norm(missing, axis=0) / np.linalg.norm(right, axis=0)).max())


def cost(sizes: list[list[int]], solver: dict[str, Any]) -> list[float]:
    """CPU-seconds of fits, the faster of two each."""
    found = []
    for size in sizes:
        source, times = drawn(*size), []
        for _ in range(2):
            problem, start = Problem(source), time.process_time()
            for _ in fit_blocks(problem, coar.Ridge(**solver).prepare(problem)):
                pass
            times.append(time.process_time() - start)
        found.append(min(times))
    return found


def stored(path: str) -> dict[str, float]:
    """Peak memory of a fit of a study."""
    coar.fit(coar.Study.open(path))
    return {"peak GB": peak_bytes() / GB}


def peak_bytes() -> int:
    """Of this process. Not getrusage: its maximum survives exec and would be that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def folder_bytes(path: str) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


if __name__ == "__main__":
    cases = {"large": large, "cost": cost, "stored": stored}
    print(json.dumps(cases[sys.argv[1]](**json.loads(sys.argv[2]))))
