"""Held-out rows: ablations in a stream that no fit uses, in memory or as resumable studies on disk."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.designs import Bernoulli
from coar.errors import OutputError, SettingError, StudyError
from coar.evaluation.predicted import MASK_ROWS, PackedMasks
from coar.executors.base import Executor
from coar.experiments.base import Experiment
from coar.metrics import Table
from coar.progress import progress_bar
from coar.study import Study
from coar.work import run_rows

MEMORY_BYTES = 2**30  # outputs that take more go to a temporary folder


class ScratchFolder:
    """A temporary folder that goes with this object, or when Python ends; nobody has to close it.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="coar-held-out-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class HeldOutRows:
    """Masks and what really ablated models put out.

    Attributes:
        masks: [rows, components], as bits.
        outputs: float32 [rows, columns], all columns of the output.
        scratch: a temporary folder that goes when nobody needs the outputs any more, or None.
    """

    masks: PackedMasks
    outputs: Table
    scratch: ScratchFolder | None = None


@dataclass(frozen=True)
class RowsWanted:
    """Which rows: so many of a design, of one output.

    Attributes:
        experiment: what is ablated.
        design: how masks are drawn.
        num_rows: how many.
        output: which output.
    """

    experiment: Experiment
    design: Bernoulli
    num_rows: int
    output: str

    @property
    def description(self) -> str:
        """For a bar."""
        return f"held-out, {self.design.ablation_fraction:g} ablated"

    def run(
        self, directory: str | Path | None, executor: Executor | None = None, progress: bool = True
    ) -> HeldOutRows:
        """Compute them, or what is missing of them in a folder."""
        if directory is not None:
            return self._of_study(Path(directory), executor, progress)
        if 4 * self.num_rows * len(self.experiment.columns[self.output]) <= MEMORY_BYTES:
            return self._in_memory(progress)
        scratch = ScratchFolder()
        found = self._of_study(scratch.path, None, progress)
        return HeldOutRows(found.masks, found.outputs, scratch)

    def _in_memory(self, progress: bool) -> HeldOutRows:
        experiment, count = self.experiment, len(self.experiment.components)
        runner = experiment.prepare(experiment.device)
        names = {name: axis.names for name, axis in experiment.columns.items()}
        masks = np.empty((self.num_rows, count), dtype=bool)
        outputs = np.empty((self.num_rows, len(experiment.columns[self.output])), np.float32)
        with progress_bar(self.num_rows, self.description, progress) as bar:
            rows = run_rows(runner, self.design, range(self.num_rows), count, names)
            for row, (mask, values) in enumerate(rows):
                masks[row], outputs[row] = mask, values[self.output]
                bar.update(1)
        return HeldOutRows(PackedMasks.of([masks]), outputs)

    def _of_study(self, directory: Path, executor: Executor | None, progress: bool) -> HeldOutRows:
        folder = directory / f"fraction-{self.design.ablation_fraction!r}-seed-{self.design.seed}"
        if (folder / "spec.json").exists():
            study = Study.open(folder, self.experiment)
            self._require_own(study)
            if study.num_rows < self.num_rows:
                study.extend(self.num_rows)
        else:
            study = Study.create(folder, self.experiment, self.design, self.num_rows)
        study.run(executor, progress=progress, description=self.description)
        self._require_all(study)
        masks = study.masks
        packed = PackedMasks.of(masks[a : a + MASK_ROWS] for a in range(0, self.num_rows, MASK_ROWS))
        return HeldOutRows(packed.first(self.num_rows), study.outputs[self.output])

    def _require_all(self, study: Study) -> None:
        """Rows that failed would be left out: an evaluation on rows chosen by their outputs."""
        failed = [record for record in study.store.failures() if record["row"] < self.num_rows]
        if failed:
            raise OutputError(
                f"{len(failed)} of {self.num_rows} held-out rows have outputs that cannot be stored; "
                f"first: row {failed[0]['row']}: {failed[0]['what']}",
                expected="finite outputs in every row",
                got=failed[0].get("got"),
                todo="an output that stays finite under ablation, or another seed; see failures/ in "
                f"{study.directory}",
            )

    def _require_own(self, study: Study) -> None:
        if study.spec.design != self.design or self.output not in study.columns:
            raise StudyError(
                f"{study.directory} holds other rows than this evaluation's",
                expected=f"{self.design!r}, output {self.output!r}",
                got=f"{study.spec.design!r}, outputs {sorted(study.columns)}",
                todo="choose another directory",
            )


def require_unseen(provenance: Mapping[str, Any], design: Bernoulli, name: str = "") -> None:
    """Raise if attributions were fitted to, or calibrated on, the very rows of a design.

    Args:
        provenance: of the attributions.
        design: of the rows that they are to be held to.
        name: of the attributions, for the message.
    """
    prior = provenance.get("prior")
    if isinstance(prior, Mapping):  # of a hybrid
        require_unseen(prior, design, name)
    for key, verb in (("design", "fitted"), ("calibration", "calibrated")):
        seen = provenance.get(key)
        if not isinstance(seen, Mapping):
            continue
        if (seen.get("seed"), seen.get("stream")) == (design.seed, design.stream):
            raise SettingError(
                f"attributions{f' {name!r}' if name else ''} were {verb} on the very rows that they would "
                "be evaluated on",
                expected=f"rows of another seed or stream than {design.seed}, {design.stream!r}",
                got=f"seed {seen['seed']}, stream {seen['stream']!r}",
                todo="evaluate with another seed",
            )


def own_fraction(attributions: Attributions) -> float | None:
    """The ablation fraction that attributions were made for, if they say so."""
    design = attributions.provenance.get("design")
    for place in (attributions.provenance, design if isinstance(design, Mapping) else {}):
        if place.get("ablation_fraction") is not None:
            return float(place["ablation_fraction"])
    return None
