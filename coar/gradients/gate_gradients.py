"""gate_gradients: attributions from derivatives by gates, in memory or as a study."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.errors import SettingError
from coar.executors.base import Executor
from coar.experiments.ablation import ComponentAblation
from coar.experiments.private_model import DTYPES
from coar.gradients.draws import GateDraws
from coar.gradients.in_memory import InMemory
from coar.gradients.passes import GatePasses, require_gradients
from coar.gradients.planning import GatePlan, plan_passes
from coar.gradients.schedule import Passes, Schedule
from coar.gradients.study import GateGradientStudy
from coar.gradients.weights import chosen_examples, classes_of
from coar.regression.memory import memory_bytes
from coar.rows import require_output
from coar.settings import whole_number


def gate_gradients(
    experiment: ComponentAblation,
    ablation_fraction: float,
    *,
    passes: Passes = "auto",
    target_correlation: float | None = None,
    target_error: float | None = None,
    seed: int = 0,
    output: str | None = None,
    examples: Sequence[int] | None = None,
    pool: bool = False,
    directory: str | Path | None = None,
    executor: Executor | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    memory: int | str | None = None,
    progress: bool = True,
) -> Attributions:
    """Attributions from derivatives by gates: a fraction of the passes that a regression needs rows.

    Source: the gate law is that of uniform gradient sampling (Li and Janson, arXiv 2409.09951); see
    docs/gate-gradients.md for the estimator, its bias, and when it fails.

    Args:
        experiment: a component ablation whose output has gradients.
        ablation_fraction: of the ablations to predict, above 0 and below 1.
        passes: forward and backward passes over the examples, rounded up to whole rounds of 4 replicates
            (3 or 2 where fewer than 8 rounds are asked for and that saves some: errors are then coarser);
            "auto" doubles them until the target is met, or at 400.
        target_correlation: stop where predictions correlate so well with those of exact weights (over
            columns, from replicates); "auto" without a target means 0.95.
        target_error: stop where the median standard error is as small, in output units.
        seed: of the gates.
        output: which output; needed where there are several.
        examples: positions of the examples to attribute; default all.
        pool: draw weights towards their means over examples and classes (the task's `label`): less noise
            from few passes, but an example's weights then depend on the others. Not for edits.
        directory: keep the sums in a study there, resumable; None keeps nothing.
        executor: where the study runs; only with a directory.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes: "float32", "bfloat16", "float64".
        memory: for sums, in bytes or as text ("4 GiB"); default half of the machine's.
        progress: show a bar.

    Returns:
        Attributions with standard errors, in output units per component kept; details "signal" and
        "agreement" per column (see `coar.gradients.mixing.Mixed`). The provenance names passes, where gates
        act, and how good the weights are.

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
        SettingError: a fraction, target or number of passes out of range; sums that do not fit in memory.

    >>> from coar.testing import residual_experiment
    >>> found = gate_gradients(residual_experiment(), ablation_fraction=0.1, passes=20, progress=False)
    >>> found.weights.shape, found.provenance["passes"]
    ((6, 4), 20)
    """
    require_gradients(experiment)
    _require_execution(batch_size, precision)
    _require_kind("pool", pool, bool | np.bool_, "True or False")
    _require_kind("directory", directory, str | PathLike | None, "a path, as text or pathlib.Path, or None")
    name = require_output(output, list(experiment.columns))
    if pool:
        classes_of(experiment.task.metadata, experiment.columns[name])  # before passes, not after them
    if directory is None:
        if executor is not None:
            raise SettingError(
                "an executor needs a study to fill",
                expected="directory=",
                got="directory=None",
                todo="name a folder with directory=, or leave executor= away to stay in this process",
            )
        run = InMemory(experiment, ablation_fraction, seed, name, (device, batch_size, precision))
        chosen = chosen_examples(examples, len(experiment.task))
        schedule = Schedule(run.draws, passes, target_correlation, target_error)
        return run.attributions(chosen, schedule, pool, memory_bytes(memory), progress)
    study = GateGradientStudy.create(
        directory,
        experiment,
        ablation_fraction,
        passes=passes,
        target_correlation=target_correlation,
        target_error=target_error,
        seed=seed,
        outputs=[name],
        examples=examples,
        device=str(device),
        batch_size=batch_size,
        precision=precision,
    )
    where = None if str(device) == "auto" else device
    study.run(executor, device=where, batch_size=batch_size, pool=pool, progress=progress)
    return study.attributions(pool=pool)


def plan_gate_gradients(
    experiment: ComponentAblation,
    ablation_fraction: float,
    *,
    passes: Passes = "auto",
    target_correlation: float | None = None,
    target_error: float | None = None,
    outputs: Sequence[str] | None = None,
    examples: Sequence[int] | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> GatePlan:
    """What gate gradients would cost, from a few measured passes; arguments as of `gate_gradients`."""
    require_gradients(experiment)
    _require_execution(batch_size, precision)
    draws = GateDraws(ablation_fraction, 0, len(experiment.components))
    schedule = Schedule(draws, passes, target_correlation, target_error)
    names = [require_output(name, list(experiment.columns)) for name in outputs or experiment.columns]
    engine = GatePasses(experiment, names, experiment.device, batch_size, precision)
    chosen = np.array(chosen_examples(examples, len(experiment.task)))
    return plan_passes(engine, draws, chosen, schedule)


def _require_execution(batch_size: Any, precision: Any) -> None:
    if batch_size is not None:
        whole_number(batch_size, "batch_size")
    if precision not in tuple(DTYPES):
        raise SettingError(
            "unknown precision",
            expected=" or ".join(DTYPES),
            got=repr(precision),
            todo='precision="float32", unless memory or time are short',
        )


def _require_kind(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise SettingError(
            f"{name} is of the wrong kind",
            expected=expected,
            got=repr(value),
            todo=f"{name}= takes {expected}",
        )
