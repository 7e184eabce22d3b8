"""Verbs that make attributions: fit, baseline."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.application import AllowImport, Directory, Workers, app, chosen_output, echo_lines


class SolverName(enum.StrEnum):
    """What fits the linear models."""

    AUTO = "auto"
    RIDGE = "ridge"
    LASSO = "lasso"
    FAST_L1 = "fast_l1"


@app.command()
def fit(
    directory: Directory,
    solver: Annotated[SolverName | None, typer.Option(help="default auto: ridge")] = None,
    settings: Annotated[Path | None, typer.Option(help="YAML or JSON file, see specs/fit/")] = None,
    output: Annotated[str, typer.Option(help="which output, where there are several")] = "",
    columns: Annotated[
        str,
        typer.Option(
            help="positions START:STOP (STOP not included), not names; default all", metavar="START:STOP"
        ),
    ] = "",
    name: Annotated[str, typer.Option(help="name of the attributions in the study")] = "",
    memory: Annotated[str, typer.Option(help='to plan with, such as "8 GiB"; default half')] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    partial: Annotated[bool, typer.Option("--partial", help="fit although rows are missing")] = False,
    pool: Annotated[bool, typer.Option("--pool", help="of gate gradients: share between examples")] = False,
    calibrate: Annotated[int, typer.Option(help="of gate gradients: real rows that set the scale")] = 0,
) -> None:
    """Fit attributions to a study's rows, or make them of its gate gradients.

    Example: coar fit runs/digits --solver lasso
    """
    from coar.regression.fit_file import FitSettings, load
    from coar.regression.fit_file_run import fit_with
    from coar.regression.fit_file_summary import fit_summary
    from coar.studies import open_study
    from coar.study import Study

    opened = open_study(directory)
    if not isinstance(opened, Study):
        given: dict[str, object] = {"--solver": solver, "--settings": settings, "--columns": columns}
        given |= {"--memory": memory, "--partial": partial, "--device": device != "auto"}
        _fit_gates(opened, given, output, name, pool, calibrate)
        return
    if pool or calibrate:
        raise typer.BadParameter("--pool and --calibrate are for studies of gate gradients")
    asked: dict[str, Any] = {"solver": solver and solver.value, "output": output, "save_as": name}
    asked |= {"memory": memory, "columns": columns}
    base = load(settings, solver is SolverName.FAST_L1) if settings else FitSettings()
    chosen = base.changed(asked, str(settings))
    study = opened
    chosen_output(chosen.output or "", study.columns)
    where = str(settings or "coar fit") + (f" --columns {columns}" if columns else "")
    found = fit_with(study, chosen, partial=partial, device=device, progress=True, where=where)
    typer.echo(fit_summary(found, study.num_rows))
    typer.echo(f"written to {study.attributions_path(chosen.name)}")
    typer.echo(f"held out: see `coar evaluate {directory} --name {chosen.name}`")


@app.command()
def baseline(
    directory: Directory,
    names: Annotated[
        list[str], typer.Argument(help="such as leave-one-out; an unknown one lists all", metavar="NAME...")
    ],
    passes: Annotated[
        int | None,
        typer.Option(help="of gate gradients and plain means, or steps of methods along a path"),
    ] = None,
    output: Annotated[str, typer.Option(help="which output, where there are several")] = "",
    name: Annotated[str, typer.Option(help="of the attributions; default the baseline's")] = "",
    workers: Workers = 0,
    allow_import: AllowImport = None,
) -> None:
    """Make attributions in other ways, to compare with; those that are there are left alone.

    Example: coar baseline runs/digits leave-one-out gradient-x-parameter
    """
    from coar.baselines.named import make, report, wanted_baselines
    from coar.executors.processes import Processes
    from coar.studies import open_study

    if name and len(names) > 1:
        raise typer.BadParameter("--name is for one baseline; make them one by one")
    study = open_study(directory, allow_import)
    options: dict[str, Any] = {"passes": passes, "output": chosen_output(output, study.columns)}
    options |= {"save_as": name or None, "executor": Processes(workers) if workers else None}
    for wanted in wanted_baselines(study, names, **options):
        echo_lines(report(wanted, make(wanted)))


def _fit_gates(
    study: Any, given: dict[str, object], asked_output: str, name: str, pool: bool, calibrate: int
) -> None:
    from coar.checking import calibrate as calibrated
    from coar.gradients.provenance import require_unused
    from coar.gradients.study import NAME

    unfit = [option for option, value in given.items() if value]
    if unfit:
        raise typer.BadParameter(
            f"{', '.join(unfit)}: gate gradients are not fitted to rows. Leave "
            f"{'it' if len(unfit) == 1 else 'them'} out: `coar fit {study.directory}`, or fit a study of rows"
        )
    path, output = study.attributions_path(name or NAME), chosen_output(asked_output, study.columns)
    if calibrate:
        found = calibrated(study.experiment, study.attributions(output, pool=pool), num_rows=calibrate)
        require_unused(path, found.provenance, found.output, found.columns)
        found.save(path)
    else:
        found = study.attributions(output, pool=pool, save_as=name or NAME)
    asked, passes = study.status().num_passes, found.provenance["passes"]
    rest = "" if passes >= asked else "; `coar run` does the rest"
    lines = [str(found), f"{passes:,} of {asked:,} passes asked for{rest}"]
    if calibrate:
        scale = found.provenance["calibration"]
        low, high = scale["interval"]
        lines.append(
            f"calibrated on {scale['rows']} real ablations: "
            f"slope {scale['slope']:.3f} [{low:.3f}, {high:.3f}]"
        )
    trust = f"`coar check {study.directory} --name {path.name}`"
    echo_lines([*lines, f"written to {path}", f"trust: see {trust}"])
