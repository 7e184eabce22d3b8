"""Baselines of a study by name, saved beside its other attributions: what `coar baseline` makes.

runs/digits/
attributions/leave-one-out/                as of every study
baselines/leave-one-out-margin/            its rows: a study of its own, resumable
baselines/gate-gradients-margin/           sums of passes, likewise
"""

from __future__ import annotations

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
from coar.errors import SettingError, StudyError
from coar.executors.base import Executor
from coar.gradients import gate_gradients
from coar.rows import require_output
from coar.study_folder import StudyFolder


@dataclass(frozen=True)
class _Asked:
    """One baseline of one output of a study."""

    study: StudyFolder
    name: str
    output: str
    passes: int | None
    executor: Executor | None
    progress: bool

    @property
    def directory(self) -> Path:
        """For the rows or sums that it is made from."""
        return self.study.directory / "baselines" / f"{self.name}-{self.output}"

    @property
    def given(self) -> dict[str, Any]:
        """Arguments that all baselines with passes take."""
        return {"output": self.output, "progress": self.progress}


def _leave_one_out(asked: _Asked) -> Attributions:
    return leave_one_out(
        asked.study.experiment, directory=asked.directory, executor=asked.executor, **asked.given
    )


def _gate_gradients(asked: _Asked) -> Attributions:
    fraction = getattr(asked.study.spec.design, "ablation_fraction", None)
    if fraction is None:
        raise SettingError(
            "gate gradients are made for an ablation fraction, and this study has none",
            expected="rows of coar.Bernoulli or coar.FixedSize",
            got=asked.study.spec.design.name,
        )
    return gate_gradients(
        asked.study.experiment,  # type: ignore[arg-type]  # checked there
        fraction,
        passes="auto" if asked.passes is None else asked.passes,
        directory=asked.directory,
        executor=asked.executor,
        **asked.given,
    )


def _one_pass(function: Callable[..., Attributions]) -> Callable[[_Asked], Attributions]:
    return lambda asked: function(asked.study.experiment, **asked.given)


def _of_steps(function: Callable[..., Attributions]) -> Callable[[_Asked], Attributions]:
    def make(asked: _Asked) -> Attributions:
        steps = {} if asked.passes is None else {"steps": asked.passes}
        return function(asked.study.experiment, **steps, **asked.given)

    return make


def _floor(function: Callable[..., Attributions]) -> Callable[[_Asked], Attributions]:
    return lambda asked: function(asked.study.experiment, output=asked.output)


_FIXED: dict[str, Callable[[_Asked], Attributions]] = {  # their cost is what it is
    "leave-one-out": _leave_one_out,
    "gradient-x-parameter": _one_pass(gradient_x_parameter),
    "attribution-patching": _one_pass(attribution_patching),
    "random-attributions": _floor(random_attributions),
    "weight-norm": _floor(weight_norm),
}
_WITH_PASSES: dict[str, Callable[[_Asked], Attributions]] = {
    "gate-gradients": _gate_gradients,
    "integrated-gradients": _of_steps(integrated_gradients),
    "internal-influence": _of_steps(internal_influence),
    "neuron-conductance": _of_steps(neuron_conductance),
}
BASELINES = tuple(sorted(_FIXED | _WITH_PASSES))


def make_baseline(
    study: StudyFolder,
    name: str,
    *,
    passes: int | None = None,
    output: str | None = None,
    save_as: str | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Attributions:
    """Make a baseline for a study's experiment and save it there, or load it if it is there.

    Args:
        study: whose experiment, and for gate gradients whose ablation fraction.
        name: one of `BASELINES`: the functions of `coar.baselines`, and gate gradients, with dashes.
        passes: of gate gradients, or steps of methods along a path; default the method's own.
        output: which output; needed where there are several.
        save_as: name of the attributions in the study; default that of the baseline.
        executor: where rows or passes run, for leave-one-out and gate gradients.
        progress: show a bar.

    Returns:
        The attributions, as saved.

    Raises:
        SettingError: no such baseline, or passes for one that has none.
        StudyError: other attributions have that name, or the same from fewer passes.

    >>> import tempfile
    >>> from coar.designs import Bernoulli
    >>> from coar.study import Study
    >>> from coar.testing import linear_experiment
    >>> study = Study.create(tempfile.mkdtemp(), linear_experiment()[0], Bernoulli(ablation_fraction=0.1), 20)
    >>> make_baseline(study, "gradient-x-parameter", progress=False).provenance["forwards"]
    3
    """
    if name not in BASELINES:
        raise SettingError("no such baseline", expected=", ".join(BASELINES), got=repr(name))
    if passes is not None and name not in _WITH_PASSES:
        raise SettingError(
            f"{name} has no passes to choose", expected=" or ".join(sorted(_WITH_PASSES)), got=passes
        )
    asked = _Asked(study, name, require_output(output, list(study.columns)), passes, executor, progress)
    path = study.attributions_path(save_as or name)
    if not (path / "index.json").exists():
        (_FIXED | _WITH_PASSES)[name](asked).save(path)
    found = Attributions.load(path)
    _require_same(found, asked, path)
    return found


def _require_same(found: Attributions, asked: _Asked, path: Path) -> None:
    """Raise if saved attributions are others than asked for."""
    said = found.provenance
    what = str(said.get("method", "")).replace("_", "-").replace(" ", "-")
    spent = said.get("passes", said.get("steps", 0))
    if not what.startswith(asked.name) or found.output != asked.output:
        got = f"{said.get('method', 'attributions of unknown origin')} of output {found.output!r}"
    elif asked.passes is not None and spent < asked.passes:
        got = f"the same from {spent} passes"
    else:
        return
    raise StudyError(
        f"attributions {path.name!r} are there, and are others",
        expected=f"{asked.name} of output {asked.output!r}"
        + (f" from {asked.passes} passes" if asked.passes else ""),
        got=got,
        todo="save these under another name (--name NAME, save_as=NAME)",
    )
