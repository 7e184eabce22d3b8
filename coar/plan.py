"""Plan: what a study will cost, from a few measured rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coar.designs import Design
from coar.experiments.base import Runner

SHARD_SECONDS = 60.0  # work lost at most when a worker dies
SHARD_BYTES = 256 * 2**20
SHARDS_AT_LEAST = 40  # so that bars move and workers finish together


@dataclass(frozen=True)
class Plan:
    """Expected cost of a study with one worker.

    Attributes:
        num_rows: rows asked for.
        num_components: length of a mask.
        num_columns: columns over all outputs.
        seconds_per_row: measured.
        bytes_per_row: on disk.
        rows_per_shard: rows per work item.
    """

    num_rows: int
    num_components: int
    num_columns: int
    seconds_per_row: float
    bytes_per_row: int
    rows_per_shard: int

    def summary(self) -> str:
        """Time, disk and memory in a few lines."""
        shards = -(-self.num_rows // self.rows_per_shard)
        shard, gram = self.rows_per_shard * self.bytes_per_row, 8 * self.num_components**2 * 2
        lines = [
            f"{self.num_rows:,} rows x {self.num_columns:,} columns, {self.num_components:,} components",
            f"time    {duration(self.num_rows * self.seconds_per_row)} with one worker "
            f"({1e3 * self.seconds_per_row:.1f} ms a row, measured)",
            f"disk    {size(self.num_rows * self.bytes_per_row)} in {shards:,} shards of "
            f"{self.rows_per_shard:,} rows",
            f"memory  {size(shard)} per worker for a shard, besides model and "
            f"data; {size(gram)} for the regression's components x components statistics",
        ]
        if self.num_rows <= self.num_components:
            lines.append(
                f"warning: {self.num_rows:,} rows for {self.num_components:,} unknowns per column: the "
                "regression will lean on its penalty; 5 to 20 rows per component is usual"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        absent_rows: rows of an imported study that were not finished where they come from.
    """

    directory: str
    rows: int
    num_rows: int
    shards: int
    num_shards: int
    failed_rows: tuple[int, ...]
    seconds_left: float
    bytes: int
    absent_rows: int = 0

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return self.shards == self.num_shards

    def summary(self) -> str:
        """A few lines for people."""
        left = "complete" if self.complete else f"about {duration(self.seconds_left)} left with one worker"
        lines = [
            f"{self.directory}: {self.rows:,} of {self.num_rows:,} rows, "
            f"{self.shards} of {self.num_shards} shards, {size(self.bytes)}; {left}"
        ]
        if self.failed_rows:
            first = ", ".join(map(str, self.failed_rows[:5]))
            lines.append(f"{len(self.failed_rows)} rows failed: {first}; see failures/")
        if self.absent_rows:
            lines.append(f"{self.absent_rows:,} rows were not finished when they were imported")
        return "\n".join(lines)


def make_plan(
    runner: Runner, design: Design, num_rows: int, num_components: int, dtypes: Mapping[str, str]
) -> tuple[Plan, dict[str, np.ndarray]]:
    """Measure a few rows.

    Returns:
        The plan, and the untouched outputs, {output: [columns]}.
    """
    untouched = runner(np.ones((1, num_components), dtype=bool))  # also warms up
    masks = design.masks(range(min(3, num_rows)), num_components)
    times = []
    for mask in masks:
        start = time.perf_counter()
        runner(mask[None])
        times.append(time.perf_counter() - start)
    widths = {name: array.shape[1] for name, array in untouched.items()}
    row_bytes = (num_components + 7) // 8 + 8
    row_bytes += sum(np.dtype(dtypes[name]).itemsize * width for name, width in widths.items())
    seconds = float(np.median(times))
    plan = Plan(
        num_rows,
        num_components,
        sum(widths.values()),
        seconds,
        row_bytes,
        _rows_per_shard(num_rows, seconds, row_bytes),
    )
    return plan, {name: array[0] for name, array in untouched.items()}


def _rows_per_shard(num_rows: int, seconds: float, row_bytes: int) -> int:
    by_time = SHARD_SECONDS / max(seconds, 1e-9)
    return int(max(1, min(SHARD_BYTES // row_bytes, by_time, -(-num_rows // SHARDS_AT_LEAST))))


def duration(seconds: float) -> str:
    """A length of time for people.

    >>> duration(0.25), duration(95), duration(9000)
    ('0.2 s', '1 min 35 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """A number of bytes for people.

    >>> size(1_500), size(3 * 2**30)
    ('1.5 kB', '3.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"
