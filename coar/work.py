"""Worker: does work items. A pure function of (study, item): any process may do any item.

A worker knows a study by its folder alone: it rebuilds the experiment from the spec (unless it was
handed one in memory), checks that model and data are those of the study, and only then computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coar.designs import Design
from coar.errors import RowError, StudyError
from coar.experiments.base import Experiment, Runner, full_fingerprint
from coar.store import Item, Shard, Store, first_unstorable


@dataclass(frozen=True)
class Job:
    """All that a worker needs besides the experiment.

    Attributes:
        store: where shards go.
        design: how masks are drawn.
        num_components: length of a mask.
        untouched: per output, float32 [columns]: what float16 outputs are stored relative to.
        names: per output, names of the columns, for errors.
        fingerprint: of the experiment that the study was created with.
        batch_size: None = the experiment's choice.
        precision: of the computation.
        compiled: whether the experiment is asked to compile its model.
    """

    store: Store
    design: Design
    num_components: int
    untouched: Mapping[str, np.ndarray]
    names: Mapping[str, Sequence[str]]
    fingerprint: Mapping[str, str]
    batch_size: int | None
    precision: str
    compiled: bool = False


class Worker:
    """An experiment on one device, ready to do items of one study."""

    def __init__(self, job: Job, experiment: Experiment, device: torch.device) -> None:
        require_same_experiment(job.fingerprint, full_fingerprint(experiment))
        self.job = job
        options = {"compiled": True} if job.compiled else {}  # few experiments have a model to compile
        self.runner: Runner = experiment.prepare(device, job.batch_size, job.precision, **options)

    def do(self, item: Item) -> int:
        """Compute an item and store it; return how many of its rows failed.

        A row whose outputs cannot be stored is recorded under failures/, the others stand.
        """
        rows = np.arange(item.start, item.stop)
        masks = self.job.design.masks(rows, self.job.num_components)
        record = self.runner.record()
        outputs, failed = self._rows(rows, masks)
        if self.runner.record() != record:  # memory ran out on the way: one record, one batch size
            outputs, failed = self._rows(rows, masks)
        for row, error in failed.items():
            self.job.store.fail(row, error)
        kept = np.array([row not in failed for row in rows], dtype=bool)
        self.job.store.write(item, self._shard(rows[kept], masks[kept], outputs))
        return len(failed)

    def _rows(
        self, rows: np.ndarray, masks: np.ndarray
    ) -> tuple[list[dict[str, np.ndarray]], dict[int, RowError]]:
        """Outputs of the rows that can be stored, and errors of the others by row."""
        outputs, failed = [], {}
        for row, mask in zip(rows, masks, strict=True):
            try:
                outputs.append(self._row(int(row), mask))
            except RowError as error:
                failed[int(row)] = error
        return outputs, failed

    def _row(self, row: int, mask: np.ndarray) -> dict[str, np.ndarray]:
        values = {name: array[0] for name, array in self.runner(mask[None]).items()}
        for name, dtype in self.job.store.dtypes.items():
            if dtype == np.float16:
                values[name] = values[name] - self.job.untouched[name]
            require_storable(values[name], row, name, self.job.names[name], str(dtype))
        return values

    def _shard(self, rows: np.ndarray, masks: np.ndarray, outputs: list[dict[str, np.ndarray]]) -> Shard:
        store = self.job.store
        empty = {name: np.empty((0, columns)) for name, columns in store.num_columns.items()}
        stacked = {name: np.stack([row[name] for row in outputs]) for name in empty} if outputs else empty
        return Shard(rows, masks, stacked, self.runner.record())


def require_storable(
    values: np.ndarray, row: int, output: str, names: Sequence[str], dtype: str = "float32"
) -> None:
    """Raise `RowError` naming row, output and example if a value cannot be stored."""
    column = first_unstorable(values, dtype)
    if column is None:
        return
    raise RowError(
        f"row {row}: output {output!r} of column {names[column]!r} cannot be stored as {dtype}",
        expected=f"finite, at most {np.finfo(dtype).max:g} in size",
        got=float(values[column]),
        todo="look at the model under this mask; store float32 rather than float16; raise the precision",
    )


def require_same_experiment(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise `StudyError` naming what differs between a study's experiment and this one."""
    differing = [key for key in expected if expected[key] != found.get(key)]
    if differing:
        key = differing[0]
        raise StudyError(
            f"this experiment is not the one of the study: {', '.join(differing)} differ",
            expected=f"{key} {expected[key][:60]}",
            got=f"{key} {str(found.get(key))[:60]}",
            todo="use the same model, data and components (seed what the script initialises or draws, or "
            "load saved weights), or create a new study in another folder",
        )


def run_rows(
    runner: Runner,
    design: Design,
    rows: Sequence[int],
    num_components: int,
    names: Mapping[str, Sequence[str]],
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Run rows without a store, one at a time: yields (mask [components], {output: [columns]})."""
    for row in rows:
        mask = design.masks([row], num_components)
        values = {name: array[0] for name, array in runner(mask).items()}
        for name, array in values.items():
            require_storable(array, row, name, names[name])
        yield mask[0], values
