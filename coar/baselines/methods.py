"""How each baseline of a study is made, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.baselines.deletion import leave_one_out
from coar.baselines.diagonal import attribution_patching, integrated_gradients
from coar.baselines.floors import random_attributions, weight_norm
from coar.baselines.parameters import gradient_x_parameter
from coar.baselines.paths import internal_influence, neuron_conductance
from coar.baselines.residual import hybrid
from coar.baselines.sampling import kept_mean, uniform_gradient_sampling
from coar.executors.base import Executor
from coar.gradients import gate_gradients
from coar.study import Study
from coar.study_folder import StudyFolder

SAMPLED_PASSES = 100  # of plain means, where nobody says how many


@dataclass(frozen=True)
class Wanted:
    """One baseline of one output of a study, not yet made; `coar.baselines.named` checks and makes it.

    Attributes:
        study: whose experiment.
        name: a key of `METHODS`.
        output: which output.
        passes: or steps, as asked for; None is the method's own number.
        path: of the attributions.
        executor: where rows or passes run.
        progress: show a bar.
        there: whether the attributions were there when this was asked for.
    """

    study: StudyFolder
    name: str
    output: str
    passes: int | None
    path: Path
    executor: Executor | None
    progress: bool
    there: bool

    @property
    def directory(self) -> Path:
        """For the rows or sums that it is made from; sums of other numbers of passes lie elsewhere."""
        passes = f"-{self.passes}" if self.passes else ""
        return self.study.directory / "baselines" / f"{self.name}-{self.output}{passes}"

    @property
    def fraction(self) -> float | None:
        """Of components that the study's rows ablate."""
        return getattr(self.study.spec.design, "ablation_fraction", None)

    @property
    def given(self) -> dict[str, Any]:
        """Arguments that all baselines with passes take."""
        return {"output": self.output, "progress": self.progress}


@dataclass(frozen=True)
class Method:
    """How a baseline is made, and what a number of passes means to it.

    Attributes:
        make: computes it.
        counted: "passes" or "steps", where they can be chosen; else empty.
        default: how many; None where there are passes: until the attributions are good enough.
        of_fraction: it is for the ablation fraction of the study.
        of_rows: it is fitted to the study's rows.
    """

    make: Callable[[Wanted], Attributions]
    counted: str = ""
    default: int | None = None
    of_fraction: bool = False
    of_rows: bool = False


def _leave_one_out(wanted: Wanted) -> Attributions:
    return leave_one_out(
        wanted.study.experiment, directory=wanted.directory, executor=wanted.executor, **wanted.given
    )


def _gate_gradients(wanted: Wanted) -> Attributions:
    return gate_gradients(
        wanted.study.experiment,  # type: ignore[arg-type]  # checked there
        wanted.fraction,  # type: ignore[arg-type]  # there is one
        passes="auto" if wanted.passes is None else wanted.passes,
        directory=wanted.directory,
        executor=wanted.executor,
        **wanted.given,
    )


def _hybrid(wanted: Wanted) -> Attributions:
    study, fraction = wanted.study, wanted.fraction
    assert isinstance(study, Study)  # checked when it was asked for, and so is the fraction
    assert fraction is not None
    # At the mean of the masks: the slope at their edge knows less of them.
    prior = attribution_patching(study.experiment, gates=1 - fraction, **wanted.given)  # type: ignore[arg-type]
    return hybrid(study, prior, save_as=wanted.path.name, progress=wanted.progress)


def _sampled(function: Callable[..., Attributions]) -> Callable[[Wanted], Attributions]:
    def make(wanted: Wanted) -> Attributions:
        passes = wanted.passes or SAMPLED_PASSES
        return function(wanted.study.experiment, wanted.fraction, passes, **wanted.given)

    return make


def _one_pass(function: Callable[..., Attributions]) -> Callable[[Wanted], Attributions]:
    return lambda wanted: function(wanted.study.experiment, **wanted.given)


def _floor(function: Callable[..., Attributions]) -> Callable[[Wanted], Attributions]:
    return lambda wanted: function(wanted.study.experiment, output=wanted.output)


def _of_steps(function: Callable[..., Attributions]) -> Method:
    def make(wanted: Wanted) -> Attributions:
        steps = {} if wanted.passes is None else {"steps": wanted.passes}
        return function(wanted.study.experiment, **steps, **wanted.given)

    return Method(make, "steps", inspect.signature(function).parameters["steps"].default)


METHODS = {
    "attribution-patching": Method(_one_pass(attribution_patching)),
    "gate-gradients": Method(_gate_gradients, "passes", of_fraction=True),
    "gradient-x-parameter": Method(_one_pass(gradient_x_parameter)),
    "hybrid": Method(_hybrid, of_fraction=True, of_rows=True),
    "integrated-gradients": _of_steps(integrated_gradients),
    "internal-influence": _of_steps(internal_influence),
    "kept-mean": Method(_sampled(kept_mean), "passes", SAMPLED_PASSES, of_fraction=True),
    "leave-one-out": Method(_leave_one_out),
    "neuron-conductance": _of_steps(neuron_conductance),
    "random-attributions": Method(_floor(random_attributions)),
    "uniform-gradient-sampling": Method(
        _sampled(uniform_gradient_sampling), "passes", SAMPLED_PASSES, of_fraction=True
    ),
    "weight-norm": Method(_floor(weight_norm)),
}
