"""leave_one_out: what each component does when it alone is removed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coar.attributions import Attributions
from coar.designs import LeaveOneOut
from coar.executors.base import Executor
from coar.experiments.base import Experiment
from coar.progress import progress_bar
from coar.rows import require_output
from coar.study import Study
from coar.work import run_rows


def leave_one_out(
    experiment: Experiment,
    *,
    output: str | None = None,
    directory: str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Attributions:
    """Effect of removing each component alone (COAR paper, section 4, baseline LOO).

    Args:
        experiment: any; one row per component is run.
        output: which output; needed where there are several.
        directory: keep the rows in a study there, resumable; None keeps nothing.
        executor: where the study runs; only with a directory.
        progress: show a bar.

    Returns:
        Attributions with weights [columns, components] = output untouched - output without it.
    """
    name = require_output(output, list(experiment.columns))
    count = len(experiment.components)
    if directory is not None:
        study = Study.create(directory, experiment, LeaveOneOut(), dtypes={name: "float32"})
        study.run(executor, progress=progress, description="leave-one-out")
        untouched, removed = study.untouched[name], np.asarray(study.outputs[name])
    else:
        untouched, removed = _one_out_in_memory(experiment, name, count, progress)
    weights = (untouched[None] - removed).T
    intercept = untouched.astype(np.float64) - weights.sum(axis=1, dtype=np.float64)
    axes = experiment.components, experiment.columns[name]
    provenance = {"method": "leave_one_out", "rows": count + 1, "forwards": count + 1}
    return Attributions(weights, intercept, *axes, name, provenance=provenance)


def _one_out_in_memory(
    experiment: Experiment, output: str, count: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    runner = experiment.prepare(experiment.device)
    untouched = runner(np.ones((1, count), dtype=bool))[output][0]
    names = {name: axis.names for name, axis in experiment.columns.items()}
    removed = np.empty((count, len(untouched)), dtype=np.float32)
    with progress_bar(count, "leave-one-out", progress) as bar:
        for row, (_, values) in enumerate(run_rows(runner, LeaveOneOut(), range(count), count, names)):
            removed[row] = values[output]
            bar.update(1)
    return untouched, removed
