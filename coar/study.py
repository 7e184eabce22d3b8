"""Study: a spec, a store and the way to fill it. Create, open, run, extend, status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from coar.creation import (
    FORMAT,
    make_spec,
    require_few_shards,
    require_same_spec,
    rows_asked,
    write_study,
)
from coar.designs import Design
from coar.errors import OutputError, SettingError, StoreError, StudyError
from coar.executors.base import Executor
from coar.executors.serial import Serial
from coar.experiments.base import Experiment
from coar.files import read_json, remove_abandoned, require_format, require_keys, write_json_once
from coar.plan import Status
from coar.progress import progress_bar
from coar.rows import StoredArray
from coar.settings import whole_number
from coar.spec import ExecutionSpec, StudySpec, build_experiment
from coar.store import Item, Store
from coar.study_folder import StudyFolder, require_executor
from coar.work import Job, Worker


class ComponentDataset(NamedTuple):
    """What one column's linear model is fitted to: masks bool [rows, components], outputs [rows]."""

    masks: StoredArray
    outputs: np.ndarray


class Study(StudyFolder):
    """A folder of rows that any number of workers fill, one shard at a time.

    Use `Study.create`, `Study.from_spec` or `Study.open`.
    """

    estimator = "rows"
    contents = "rows of random ablations"

    def __repr__(self) -> str:
        return f"Study({str(self.directory)!r}, {self.num_rows} rows, {len(self.components)} components)"

    @classmethod
    def create(
        cls,
        directory: str | Path,
        experiment: Experiment,
        design: Design,
        num_rows: int | None = None,
        *,
        dtypes: Mapping[str, str] | None = None,
        execution: ExecutionSpec | None = None,
        rows_per_shard: int | None = None,
    ) -> Study:
        """Create a study, or open the equal one that is there.

        Args:
            directory: its folder; made if needed.
            experiment: what to run.
            design: how masks are drawn.
            num_rows: how many, 5 to 20 per component as a rule; default one per component for
                `LeaveOneOut`.
            dtypes: per output, "float32" or "float16"; the default depends on the size.
            execution: device, batch size and precision; default automatic.
            rows_per_shard: rows per work item; default by `plan`.

        Raises:
            StudyError: the folder holds a study with another spec; the difference is named.
        """
        spec = make_spec(experiment, design, num_rows, dtypes, execution)
        return cls._create(Path(directory), spec, experiment, rows_per_shard)

    @classmethod
    def from_spec(
        cls, directory: str | Path, spec: StudySpec, allow_import: Sequence[str] | None = None
    ) -> Study:
        """Create a study from a spec, or open the equal one that is there; imports what the spec names."""
        cls._require_kind(spec, "the spec is for another kind of study", "create it with {}.from_spec")
        if (Path(directory) / "spec.json").exists():
            study = cls.open(directory, allow_import=allow_import)
            study._require_spec(spec)
            return study
        experiment = build_experiment(spec, allow_import=allow_import)
        unknown = sorted(set(spec.outputs) ^ set(experiment.columns))
        if unknown:
            raise SettingError(
                "the spec's outputs are not the task's",
                expected=sorted(experiment.columns),
                got=sorted(spec.outputs),
            )
        return cls._create(Path(directory), spec, experiment, None, allow_import)

    @classmethod
    def _create(
        cls,
        directory: Path,
        spec: StudySpec,
        experiment: Experiment,
        rows_per_shard: int | None,
        allow_import: Sequence[str] | None = None,
    ) -> Study:
        if not (directory / "spec.json").exists():
            write_study(directory, spec, experiment, rows_per_shard)
        study = cls(directory, allow_import=allow_import)
        study._require_spec(spec)
        study._use(experiment)
        return study

    @cached_property
    def store(self) -> Store:
        """The shards."""
        return Store(
            self.directory,
            self.digest,
            len(self.components),
            {name: len(axis) for name, axis in self.columns.items()},
            {name: output.dtype for name, output in self.spec.outputs.items()},
        )

    @property
    def num_rows(self) -> int:
        """Rows asked for, extensions included."""
        return self._segments()[-1][1]

    def _segments(self) -> list[tuple[int, int]]:
        """Ranges of rows, one for the creation and one per extension: shards never cross them."""
        stops = [rows_asked(self.spec)]
        for path in sorted((self.directory / "extensions").glob("[0-9]*.json")):
            if path.suffix == ".json":
                stops.append(_read_extension(path, more_than=stops[-1]))
        return list(zip([0, *stops], stops, strict=False))

    def items(self) -> list[Item]:
        """All work items."""
        size = self.provenance["rows_per_shard"]
        ranges = [
            (a, min(a + size, stop)) for start, stop in self._segments() for a in range(start, stop, size)
        ]
        return [Item(index, *bounds) for index, bounds in enumerate(ranges)]

    def finished(self) -> list[Item]:
        """Items whose shards are there, in row order."""
        present = self.store.present()
        return [item for item in self.items() if item.index in present]

    def run(
        self,
        executor: Executor | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        description: str = "rows",
    ) -> Status:
        """Do what is missing.

        Args:
            executor: where; default `Serial()`.
            device: instead of the spec's.
            batch_size: instead of the spec's; recorded in the shards.
            progress: show a bar.
            description: the bar's name.

        Raises:
            OutputError: outputs of some rows were NaN, infinite or too large; all others are kept.
        """
        require_executor(executor)
        remove_abandoned(self.directory / "shards")
        present = self.store.present()
        missing = [item for item in self.items() if item.index not in present]
        failed_before = set(self._failed_rows())
        done = self.num_rows - sum(map(len, missing))
        with progress_bar(self.num_rows, description, progress and bool(missing), done) as bar:
            if missing:
                for item, _ in (executor or Serial()).run(self.session(device, batch_size), missing):
                    bar.update(len(item))
        self._report_failures(failed_before)
        return self.status()

    def extend(self, num_rows: int) -> None:
        """Ask for more rows, `num_rows` in all; `run` then does what is missing."""
        num_rows = whole_number(num_rows, "num_rows")
        if num_rows <= self.num_rows:
            raise StudyError(
                "a study can only grow", expected=f"more than {self.num_rows} rows", got=num_rows
            )
        self.spec.design.check(len(self.components), num_rows)
        require_few_shards(num_rows - self.num_rows, self.provenance["rows_per_shard"])
        number = len(self._segments())
        path = self.directory / "extensions" / f"{number:06d}.json"
        write_json_once(path, {"format": FORMAT, "num_rows": num_rows})

    def status(self) -> Status:
        """Count what is there; reads no shard."""
        items, present = self.items(), self.store.present()
        done = [item for item in items if item.index in present]
        absent = int(self.provenance.get("absent_rows", 0))
        rows = max(0, sum(map(len, done)) - absent)
        paths = [self.store.path(item.index) for item in done]
        return Status(
            directory=str(self.directory),
            rows=rows,
            num_rows=self.num_rows,
            shards=len(done),
            num_shards=len(items),
            failed_rows=tuple(self._failed_rows()),
            seconds_left=(self.num_rows - rows) * self.provenance.get("seconds_per_row", 0.0),
            bytes=sum(path.stat().st_size for path in paths),
            absent_rows=absent,
        )

    @property
    def masks(self) -> StoredArray:
        """Masks of the finished rows, bool [rows, components]."""
        return StoredArray(self.store, self.finished(), None, {})

    @property
    def outputs(self) -> dict[str, StoredArray]:
        """Outputs of the finished rows, {output: float32 [rows, columns]}, in output units."""
        finished = self.finished()
        return {name: StoredArray(self.store, finished, name, self.untouched) for name in self.columns}

    def example(self, column: int, output: str | None = None) -> ComponentDataset:
        """The component dataset of one column: all masks, and the outputs under them."""
        name = output or next(iter(self.columns))
        return ComponentDataset(self.masks, self.outputs[name][:, column])

    def worker(self, device: torch.device, batch_size: int | None = None) -> Worker:
        """Prepare to do items in this process."""
        return Worker(self._job(batch_size), self.experiment, device)

    def _job(self, batch_size: int | None = None) -> Job:
        asked = self.spec.execution.batch_size
        return Job(
            store=self.store,
            design=self.spec.design,
            num_components=len(self.components),
            untouched=self.untouched,
            names={name: axis.names for name, axis in self.columns.items()},
            fingerprint=self.provenance["fingerprint"],
            batch_size=batch_size if batch_size is not None else (None if asked == "auto" else asked),
            precision=self.provenance["precision"],
            compiled=bool(self.spec.execution.compiled),
        )

    def _require_spec(self, asked: StudySpec) -> None:
        require_same_spec(self.directory, asked, self.spec, self.num_rows, self.provenance["precision"])

    def _failed_rows(self) -> list[int]:
        return [record["row"] for record in self.store.failures()]

    def _report_failures(self, before: set[int]) -> None:
        new = [record for record in self.store.failures() if record["row"] not in before]
        if new:
            raise OutputError(
                f"{len(new)} of {self.num_rows} rows have outputs that cannot be stored; "
                f"first: {new[0]['what']}",
                got=new[0].get("got"),
                todo="the other rows are kept and can be fitted; see failures/ in the study",
            )


def _read_extension(path: Path, more_than: int) -> int:
    value = require_keys(read_json(path, "extension"), {"format": int, "num_rows": int}, path)
    require_format(value["format"], FORMAT, path)
    if isinstance(value["num_rows"], bool) or value["num_rows"] <= more_than:
        raise StoreError(f"{path} is damaged", expected=f"more than {more_than} rows", got=value["num_rows"])
    return int(value["num_rows"])
