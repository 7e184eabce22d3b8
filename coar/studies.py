"""Open or create a study of either kind: rows of ablations, or sums of gate gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coar.creation import plan as plan_rows
from coar.errors import SettingError, StudyError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.creation import plan_spec as plan_gates
from coar.gradients.passes import require_gradients
from coar.gradients.planning import GatePlan
from coar.gradients.status import GateStatus
from coar.gradients.study import GateGradientStudy
from coar.plan import Plan, Status
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
    """Create the study that a spec describes; see `Study.from_spec`.

    Raises:
        StudyError: the folder has a study of the other kind, or with another spec.
    """
    if (Path(directory) / "spec.json").exists():
        there = StudySpec.load(Path(directory) / "spec.json").estimator.name
        if there != spec.estimator.name:
            raise StudyError(
                f"{directory} holds another kind of study",
                expected=f'a folder without a study, or a spec whose estimator is "{there}"',
                got=f'a spec whose estimator is "{spec.estimator.name}"',
                todo="choose another folder: `coar init SPEC DIRECTORY`",
            )
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


def run_summary(study: AnyStudy, status: Status | GateStatus) -> str:
    """What `run` has done, and of gate gradients how good they are; reads their sums."""
    if isinstance(study, GateGradientStudy) and isinstance(status, GateStatus) and status.complete:
        return status.after_run(study.progress(), study.schedule)
    return status.summary()


def rounding(study: AnyStudy, passes: object) -> list[str]:
    """A line that says so where a number of passes was rounded up to whole rounds."""
    if isinstance(study, Study) or not isinstance(passes, int):
        return []
    per_round = study.schedule.per_round
    rounded = -(-passes // per_round) * per_round
    whole = f"a round of its {study.schedule.replicates} replicates has {per_round}"
    return [f"{passes:,} passes are rounded up to {rounded:,}: {whole}"] if rounded > passes else []


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
            asked = {"--num-rows": num_rows, "--passes": passes, "--examples": examples or None}
            raise SettingError(
                f"{study.directory} is a study of rows, which grows by rows",
                expected="--num-rows",
                got=" ".join(option for option, value in asked.items() if value is not None) or "no option",
                todo=f"coar extend {study.directory} --num-rows {2 * study.num_rows}",
            )
        study.extend(num_rows)
    elif num_rows is not None:
        raise SettingError(
            f"{study.directory} is a study of gate gradients, which has no rows",
            expected="--passes or --examples",
            got=f"--num-rows {num_rows}",
            todo=f"coar extend {study.directory} --passes {2 * study.status().num_passes}",
        )
    else:
        study.extend(passes, _range(examples) if examples else None)


def _range(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise SettingError("examples", expected='positions "START:STOP", STOP not included', got=repr(text))
    return range(int(first), int(last))
