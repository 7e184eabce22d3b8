"""Open or create a study of either kind: rows of ablations, or sums of gate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coar.creation import plan as plan_rows
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.creation import plan_spec as plan_gates
from coar.gradients.passes import require_gradients
from coar.gradients.planning import GatePlan
from coar.gradients.study import GateGradientStudy
from coar.plan import Plan
from coar.spec import RowsEstimator, StudySpec, build_experiment
from coar.study import Study
from coar.study_folder import require_study_folder

AnyStudy = Study | GateGradientStudy
_KINDS: dict[str, type[Study] | type[GateGradientStudy]] = {
    kind.estimator: kind for kind in (Study, GateGradientStudy)
}


def open_study(directory: str | Path, allow_import: Sequence[str] | None = None) -> AnyStudy:
    """Open a study of whatever kind it is; see `Study.open`."""
    require_study_folder(Path(directory))
    spec = StudySpec.load(Path(directory) / "spec.json")
    return _KINDS[spec.estimator.name].open(directory, allow_import=allow_import)


def study_from_spec(
    directory: str | Path, spec: StudySpec, allow_import: Sequence[str] | None = None
) -> AnyStudy:
    """Create the study that a spec describes; see `Study.from_spec`."""
    return _KINDS[spec.estimator.name].from_spec(directory, spec, allow_import)


def plan_spec(spec: StudySpec, allow_import: Sequence[str] | None = None) -> Plan | GatePlan:
    """What the study of a spec would cost, from a few measured rows or passes; writes nothing."""
    experiment = build_experiment(spec, allow_import=allow_import)
    if isinstance(spec.estimator, RowsEstimator):
        dtypes = {name: output.dtype for name, output in spec.outputs.items()}
        return plan_rows(experiment, spec.design, spec.estimator.num_rows, dtypes, spec.execution)
    require_gradients(experiment)
    assert isinstance(experiment, ComponentAblation)
    return plan_gates(spec, experiment)


def extend_study(study: AnyStudy, num_rows: int | None, passes: int | None, examples: str) -> None:
    """Ask for more of what a study has.

    Args:
        study: of either kind.
        num_rows: rows in all.
        passes: passes in all.
        examples: further examples as text, "START:STOP".
    """
    if isinstance(study, Study):
        if num_rows is None or passes is not None or examples:
            raise SettingError(
                "a study of rows grows by rows", expected="num_rows (--num-rows)", got="none, or others"
            )
        study.extend(num_rows)
    elif num_rows is not None:
        raise SettingError(
            "a study of gate gradients has no rows",
            expected="passes (--passes) or examples (--examples)",
            got=f"num_rows={num_rows}",
        )
    else:
        study.extend(passes, _range(examples) if examples else None)


def _range(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise SettingError("examples", expected='positions "START:STOP", STOP not included', got=repr(text))
    return range(int(first), int(last))
