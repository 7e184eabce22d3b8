"""Command line: verbs of a few lines each; the work is done by the library."""

from __future__ import annotations

import enum
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.errors import CoarError, CoarWarning, SettingError

app = typer.Typer(
    help="Which parts of a trained network make this prediction, and what happens if they change?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Directory = Annotated[Path, typer.Argument(help="folder of the study", metavar="DIRECTORY")]
SpecFile = Annotated[Path, typer.Argument(help="spec file, see specs/", metavar="SPEC")]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import", metavar="PREFIX", help="import only modules under PREFIX (repeatable); default any"
    ),
]
Workers = Annotated[int, typer.Option(help="worker processes; 0 runs in this process")]
Name = Annotated[str, typer.Option(help="attributions of the study; default those that there are, if one")]


INTERRUPTED = 130


class Direction(enum.StrEnum):
    """Which way the targets' outputs are to go."""

    RAISE = "raise"
    LOWER = "lower"


class Layout(enum.StrEnum):
    """Forms that rows can be written in for other programs."""

    ORIGINAL = "original"
    BETON = "beton"


class SolverName(enum.StrEnum):
    """What fits the linear models."""

    AUTO = "auto"
    RIDGE = "ridge"
    LASSO = "lasso"
    FAST_L1 = "fast_l1"


def main() -> None:
    """Entry point: errors of this package are printed without a traceback, exit status 1."""
    sys.path.insert(0, str(Path.cwd()))  # as `python -m`: a spec may name a module in this folder
    warnings.showwarning = _show_warning
    try:
        app()
    except CoarError as error:
        typer.echo(f"coar: {type(error).__name__}: {error}", err=True)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            text = "\ninterrupted; what is finished is kept, the same command goes on from there"
            typer.echo(text, err=True)
        raise


@app.command()
def demo(directory: Annotated[Path, typer.Argument(help="where results go")] = Path("runs/demo")) -> None:
    """The whole line on handwritten digits, in a few minutes.

    Example: coar demo
    """
    from coar.demo import run_demo

    run_demo(directory, typer.echo)


@app.command()
def doctor(directory: Annotated[Path | None, typer.Argument(help="folder to try writing in")] = None) -> None:
    """Check this installation.

    Example: coar doctor
    """
    from coar.doctor import examine

    findings = examine(directory)
    typer.echo("\n".join(map(str, findings)))
    raise typer.Exit(int(any(finding.state == "problem" for finding in findings)))


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
    _echo([study.status().summary(), *rounding(study, getattr(loaded.estimator, "passes", None))])


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
    """How far a study is.

    Example: coar status runs/digits
    """
    from coar.studies import open_study

    typer.echo(open_study(directory).status().summary())


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
    _echo([study.status().summary(), *rounding(study, passes)])


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
        _fit_gates(opened, given, output or None, name, pool, calibrate)
        return
    if pool or calibrate:
        raise typer.BadParameter("--pool and --calibrate are for studies of gate gradients")
    asked: dict[str, Any] = {"solver": solver and solver.value, "output": output, "save_as": name}
    asked |= {"memory": memory, "columns": columns}
    base = load(settings, solver is SolverName.FAST_L1) if settings else FitSettings()
    chosen = base.changed(asked, str(settings))
    study = opened
    where = str(settings or "coar fit") + (f" --columns {columns}" if columns else "")
    found = fit_with(study, chosen, partial=partial, device=device, progress=True, where=where)
    typer.echo(fit_summary(found, study.num_rows))
    typer.echo(f"written to {study.attributions_path(chosen.name)}")
    typer.echo(f"held out: see `coar evaluate {directory} --name {chosen.name}`")


def _fit_gates(
    study: Any, given: dict[str, object], output: str | None, name: str, pool: bool, calibrate: int
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
    path = study.attributions_path(name or NAME)
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
    _echo([*lines, f"written to {path}", f"trust: see {trust}"])


@app.command()
def check(
    directory: Directory,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="attributions (repeatable); default all")
    ] = None,
    num_rows: Annotated[int, typer.Option(help="fresh ablations")] = 60,
    seed: Annotated[int, typer.Option(help="of the ablations and of what is audited")] = 0,
    allow_import: AllowImport = None,
) -> None:
    """Can attributions be trusted? Fresh ablations, and an audit of derivatives.

    Example: coar check runs/digits
    """
    from coar.checking import check as check_attributions
    from coar.saved_attributions import saved_attributions
    from coar.studies import open_study

    study = open_study(directory, allow_import)
    trusted = True
    for name, attributions in saved_attributions(study, names).items():
        found = check_attributions(study.experiment, attributions, num_rows=num_rows, seed=seed)
        typer.echo(f"{name}\n{found.summary()}")
        trusted &= found.ok
    raise typer.Exit(int(not trusted))


@app.command("import")
def import_rows(
    source: Annotated[Path, typer.Argument(help="folder of an original store", metavar="SOURCE")],
    directory: Directory,
    spec: Annotated[Path | None, typer.Option(help="the original's spec, to check the store against")] = None,
    components: Annotated[Path | None, typer.Option(help="text file, a name per line")] = None,
    columns: Annotated[Path | None, typer.Option(help="text file, a name per line")] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="array to take as an output (repeatable); default all")
    ] = None,
) -> None:
    """Make a study of the finished rows of a store by the original code.

    Example: coar import ../coar_store runs/imported --spec ../spec.json
    """
    from coar.interop.importing import import_store, imported_summary

    study = import_store(
        source, directory, outputs=output or None, spec=spec, components=components, columns=columns
    )
    typer.echo(imported_summary(study))
    typer.echo(study.status().summary())


@app.command("export")
def export_rows(
    directory: Directory,
    target: Annotated[Path, typer.Argument(help="folder, or .beton file", metavar="TARGET")],
    layout: Annotated[Layout, typer.Option(help="memory maps of the original code, or FFCV's file")],
    output: Annotated[str, typer.Option(help="which output, where there are several")] = "",
) -> None:
    """Write a study's rows for the original code.

    Example: coar export runs/digits digits_store --layout original
    """
    from coar.interop import export_beton, export_store
    from coar.study import Study

    study = Study.open(directory)
    if layout is Layout.BETON:
        export_beton(study, target, output or None)
    else:
        export_store(study, target, [output] if output else None)
    typer.echo(f"written to {target}")


@app.command()
def evaluate(
    directory: Directory,
    fractions: Annotated[
        list[float] | None,
        typer.Option("--fraction", help="ablation fraction (repeatable); default the study's"),
    ] = None,
    num_rows: Annotated[int, typer.Option(help="held-out masks per fraction")] = 100,
    seed: Annotated[int, typer.Option(help="of the held-out masks")] = 1,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="attributions (repeatable); default all")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Predict held-out ablations.

    Example: coar evaluate runs/digits --fraction 0.05 --fraction 0.10
    """
    from coar.evaluation import evaluate as evaluate_methods
    from coar.saved_attributions import by_columns, saved_attributions
    from coar.studies import open_study

    for fraction in fractions or ():
        if not 0 < fraction < 1:
            raise SettingError(
                "ablation_fraction (--fraction) out of range",
                expected="a number above 0 and below 1",
                got=fraction,
                todo="0.05 to 0.1 is usual: the share of components that are ablated at random",
            )
    study = open_study(directory, allow_import)
    tested = fractions or [getattr(study.spec.design, "ablation_fraction", 0.1)]
    for methods in by_columns(saved_attributions(study, names)):
        found = evaluate_methods(
            study.experiment, methods, tested, num_rows, seed, directory=directory / "held-out"
        )
        typer.echo(found.summary())


@app.command()
def edit(
    directory: Directory,
    save_to: Annotated[Path, typer.Option(help="JSON file to write")],
    target: Annotated[list[str] | None, typer.Option(help="column to change, by name (repeatable)")] = None,
    misread: Annotated[bool, typer.Option("--misread", help="the closest mistake that can be fixed")] = False,
    direction: Annotated[Direction, typer.Option(help="of the targets' outputs")] = Direction.RAISE,
    max_accuracy_drop: Annotated[float, typer.Option(help="on held-out examples")] = 0.01,
    name: Name = "",
    allow_import: AllowImport = None,
) -> None:
    """Ablate the components that hold targets back.

    Example: coar edit runs/digits --misread --save-to fix.json
    """
    from coar.quick_edit import edit_examples, first_fixed
    from coar.saved_attributions import saved_attributions
    from coar.studies import open_study

    study = open_study(directory, allow_import)
    there = saved_attributions(study, [name] if name else None)
    if len(there) > 1:
        raise SettingError(
            f"{directory} has several attributions",
            expected="--name with one of: " + ", ".join(there),
            got="no --name",
            todo=f"coar check {directory} says which can be trusted",
        )
    attributions = next(iter(there.values()))
    if misread == bool(target):
        raise typer.BadParameter("name a --target, or ask for --misread")
    if target:
        options: dict[str, Any] = {"max_accuracy_drop": max_accuracy_drop, "progress": True}
        found = edit_examples(study.experiment, attributions, target, direction.value, **options)
    else:
        found = first_fixed(study.experiment, attributions, max_accuracy_drop=max_accuracy_drop)
        typer.echo(f"column {found.edit.provenance['targets'][0]} is misread; ", nl=False)
    found.edit.save(save_to)
    typer.echo(f"{found.summary()}\nwritten to {save_to}")


def _echo(lines: list[str]) -> None:
    typer.echo("\n".join(lines))


def _experiment(spec: Path, allow_import: list[str] | None) -> Any:
    from coar.spec import StudySpec, build_experiment

    return build_experiment(StudySpec.load(spec), allow_import=allow_import)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "warning" if issubclass(category, CoarWarning) else category.__name__
    typer.echo(f"coar: {kind}: {message}", err=True)
