"""Creation of gate-gradient studies: the spec, and all that is written before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coar.creation import FORMAT, WEIGHTS, make_whole, save_weights, weights_digest, write_head
from coar.designs import Bernoulli
from coar.errors import SettingError, SpecError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.private_model import DTYPES
from coar.gradients.draws import GateDraws
from coar.gradients.layout import require_few_items
from coar.gradients.passes import GatePasses
from coar.gradients.planning import GatePlan, plan_passes
from coar.gradients.schedule import Schedule
from coar.gradients.weights import chosen_examples
from coar.spec import ExecutionSpec, GateGradientsEstimator, StudySpec
from coar.task import resolve_device
from coar.work import require_storable


def gate_spec(
    experiment: ComponentAblation,
    estimator: GateGradientsEstimator,
    ablation_fraction: float,
    seed: int,
    outputs: Sequence[str] | None,
    execution: Mapping[str, Any],
) -> StudySpec:
    """Spec of gate gradients of an experiment; see `GateGradientStudy.create` for the arguments."""
    value = {
        "format": FORMAT,
        "experiment": experiment.to_spec(),
        "estimator": estimator.model_dump(mode="json", exclude_none=True),
        "design": Bernoulli(ablation_fraction=ablation_fraction, seed=seed).model_dump(mode="json"),
        "outputs": {name: {"dtype": "float32"} for name in outputs or experiment.columns},
        "execution": dict(execution),
    }
    return StudySpec.from_json(value, "the spec of this study")


def write_gate_study(directory: Path, spec: StudySpec, experiment: ComponentAblation) -> None:
    """Make the study's folder under another name and move it into place whole."""
    make_whole(directory, lambda draft: _write_draft(draft, spec, experiment))


def plan_spec(spec: StudySpec, experiment: ComponentAblation) -> GatePlan:
    """What a study of gate gradients would cost, from a few measured passes; writes nothing."""
    return _measured(spec, experiment)[0]


def _measured(spec: StudySpec, experiment: ComponentAblation) -> tuple[GatePlan, GatePasses]:
    draws, schedule, examples = parts_of(spec, experiment)
    precision = _precision(spec.execution)
    device = experiment.device if spec.execution.device == "auto" else resolve_device(spec.execution.device)
    batch_size = None if spec.execution.batch_size == "auto" else spec.execution.batch_size
    passes = GatePasses(experiment, list(spec.outputs), device, batch_size, precision)
    return plan_passes(passes, draws, np.array(examples), schedule), passes


def parts_of(spec: StudySpec, experiment: ComponentAblation) -> tuple[GateDraws, Schedule, tuple[int, ...]]:
    """Draws, schedule and examples of a spec, each checked."""
    estimator, design = spec.estimator, spec.design
    assert isinstance(estimator, GateGradientsEstimator)
    if not isinstance(design, Bernoulli):
        raise SpecError(
            "gate gradients stand in for independent ablations",
            expected='"design": {"name": "bernoulli", ...}',
            got=repr(design.name),
        )
    unknown = sorted(set(spec.outputs) - set(experiment.columns))
    if unknown or any(output.dtype != "float32" for output in spec.outputs.values()):
        raise SettingError(
            "outputs of gate gradients",
            expected=f"some of {sorted(experiment.columns)}, as float32",
            got={name: output.dtype for name, output in spec.outputs.items()},
        )
    draws = GateDraws(design.ablation_fraction, design.seed, len(experiment.components))
    targets = estimator.passes, estimator.target_correlation, estimator.target_error
    examples = chosen_examples(estimator.examples, len(experiment.task))
    return draws, Schedule(draws, *targets), examples


def _precision(execution: ExecutionSpec) -> str:
    if execution.compiled:
        raise SettingError("gate gradients are not compiled", expected="no compiled", got="compiled")
    asked = "float32" if execution.precision == "auto" else execution.precision
    assert asked in DTYPES
    return asked


def _write_draft(draft: Path, spec: StudySpec, experiment: ComponentAblation) -> None:
    plan, passes = _measured(spec, experiment)
    _, schedule, examples = parts_of(spec, experiment)
    require_few_items(len(examples), schedule.most, plan.block_examples, plan.item_rounds)
    runner = experiment.prepare(passes.device, passes.batch_size, passes.record()["precision"])
    found = runner(np.ones((1, len(experiment.components)), dtype=bool))
    untouched = {name: found[name][0] for name in spec.outputs}
    for name, values in untouched.items():
        require_storable(values, -1, name, experiment.columns[name].names)
    save_weights(experiment, draft / WEIGHTS)
    facts = {
        "precision": passes.record()["precision"],
        "record": passes.record(),
        "weights": weights_digest(draft / WEIGHTS),
        "num_examples": len(experiment.task),
        "rounds": schedule.first,
        "replicates": schedule.replicates,
        "block_examples": plan.block_examples,
        "item_rounds": plan.item_rounds,
        "seconds_per_pass": plan.seconds_per_pass,
        "timed_examples": len(examples),
        "placed": passes.placed_record(),
    }
    write_head(draft, spec, experiment, untouched, facts)
