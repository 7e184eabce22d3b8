"""Verbs from a spec to finished rows: components, plan, init, run, status, extend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.application import AllowImport, Directory, SpecFile, Workers, app, echo_lines


@app.command()
def components(spec: SpecFile, allow_import: AllowImport = None) -> None:
    """Print a spec's components.

    Example: coar components specs/digits.json
    """
    experiment = _experiment(spec, allow_import)
    typer.echo(getattr(experiment, "component_set", experiment.components))
    if hasattr(experiment, "component_set"):
        typer.echo(experiment.component_set.summary())


@app.command()
def plan(spec: SpecFile, allow_import: AllowImport = None) -> None:
    """Time, disk and memory of a study, from a few measured rows or passes.

    Example: coar plan specs/digits.json
    """
    from coar.spec import StudySpec
    from coar.studies import plan_spec

    typer.echo(plan_spec(StudySpec.load(spec), allow_import).summary())


@app.command()
def init(spec: SpecFile, directory: Directory, allow_import: AllowImport = None) -> None:
    """Create a study from a spec; imports what it names.

    Example: coar init specs/digits.json runs/digits
    """
    from coar.spec import StudySpec
    from coar.studies import rounding, study_from_spec

    loaded = StudySpec.load(spec)
    study = study_from_spec(directory, loaded, allow_import)
    echo_lines([study.status().summary(), *rounding(study, getattr(loaded.estimator, "passes", None))])


@app.command()
def run(
    directory: Directory,
    workers: Workers = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "",
    batch_size: Annotated[int, typer.Option(help="examples at a time; 0 = the study's")] = 0,
    allow_import: AllowImport = None,
) -> None:
    """Do what is missing; stop and go on at any time.

    Example: coar run runs/digits --workers 2
    """
    from coar.executors.processes import Processes
    from coar.studies import open_study, run_summary

    study = open_study(directory, allow_import)
    executor = Processes(workers) if workers else None
    status = study.run(executor, device=device or None, batch_size=batch_size or None)
    typer.echo(run_summary(study, status))


@app.command()
def status(directory: Directory) -> None:
    """How far a study is, and which attributions it has.

    Example: coar status runs/digits
    """
    from coar.saved_attributions import saved_names
    from coar.studies import open_study

    study = open_study(directory)
    names = saved_names(study)
    echo_lines([study.status().summary(), *([f"attributions: {', '.join(names)}"] if names else [])])


@app.command()
def extend(
    directory: Directory,
    num_rows: Annotated[int | None, typer.Option(help="rows in all, more than now")] = None,
    passes: Annotated[int | None, typer.Option(help="of gate gradients: passes in all")] = None,
    examples: Annotated[
        str, typer.Option(help="of gate gradients: further examples, by position", metavar="START:STOP")
    ] = "",
) -> None:
    """Ask for more rows, or for more passes or examples of gate gradients.

    Example: coar extend runs/digits --num-rows 8000
    """
    from coar.studies import extend_study, open_study, rounding

    study = open_study(directory)
    extend_study(study, num_rows, passes, examples)
    echo_lines([study.status().summary(), *rounding(study, passes)])


def _experiment(spec: Path, allow_import: list[str] | None) -> Any:
    from coar.spec import StudySpec, build_experiment

    return build_experiment(StudySpec.load(spec), allow_import=allow_import)
