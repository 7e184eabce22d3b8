"""Verbs that say how good attributions are: check, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coar.cli.application import (
    AllowImport,
    Directory,
    app,
    chosen_output,
    require_fraction,
    require_writable,
)
from coar.errors import SettingError

if TYPE_CHECKING:
    from coar.attributions import Attributions
    from coar.study_folder import StudyFolder


@app.command()
def check(
    directory: Directory,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="attributions (repeatable); default all")
    ] = None,
    num_rows: Annotated[int, typer.Option(help="fresh ablations")] = 60,
    seed: Annotated[int, typer.Option(help="of the ablations and of what is audited")] = 0,
    fraction: Annotated[
        float | None, typer.Option(help="of the ablations; default what attributions were made for")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Can attributions be trusted? Fresh ablations, and an audit of derivatives.

    Example: coar check runs/digits
    """
    from coar.checking import check as check_attributions
    from coar.studies import open_study

    require_fraction(fraction)
    study = open_study(directory, allow_import)
    found, left = _checkable(study, names, fraction)
    options: dict[str, Any] = {"num_rows": num_rows, "seed": seed, "ablation_fraction": fraction}
    trusted = True
    for name, attributions in found.items():
        checked = check_attributions(study.experiment, attributions, **options)
        typer.echo(f"{name}\n{checked.summary()}")
        trusted &= checked.ok
    if left:
        know = "know" if len(left) > 1 else "knows"
        typer.echo(f"not checked: {', '.join(left)} {know} no ablation fraction: --name NAME --fraction 0.1")
    raise typer.Exit(int(not trusted))


def _checkable(
    study: StudyFolder, names: list[str] | None, fraction: float | None
) -> tuple[dict[str, Attributions], list[str]]:
    """Attributions that can be checked, and names of those that do not say for which ablations they are."""
    from coar.evaluation.held_out import own_fraction
    from coar.saved_attributions import saved_attributions

    there = saved_attributions(study, names)
    found = {name: one for name, one in there.items() if fraction or own_fraction(one)}
    left = [name for name in there if name not in found]
    if left and (names or not found):
        raise SettingError(
            f"{', '.join(left)}: made for no ablation fraction",
            expected="--fraction, of the components that are ablated",
            got="no --fraction",
            todo=f"coar check {study.directory} --name {left[0]} --fraction 0.1",
        )
    return found, left


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
    output: Annotated[str, typer.Option(help="attributions of this output; default of any")] = "",
    figure: Annotated[Path | None, typer.Option(help="PNG to draw: correlations", metavar="PATH")] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV to write: every column, and beside it the means", metavar="PATH")
    ] = None,
    allow_import: AllowImport = None,
) -> None:
    """Predict held-out ablations.

    Example: coar evaluate runs/digits --fraction 0.05 --fraction 0.10
    """
    from coar.evaluation import evaluate as evaluate_methods
    from coar.evaluation.ceiling import tells_ceiling
    from coar.report.evaluation_files import require_endings, save_evaluations
    from coar.saved_attributions import by_columns, saved_attributions
    from coar.studies import open_study

    require_endings(figure, table)
    for fraction in fractions or ():
        require_fraction(fraction)
    study = open_study(directory, allow_import)
    only = chosen_output(output, study.columns) if output else None
    groups = by_columns(saved_attributions(study, names, only))
    require_writable(figure, table)
    tested = fractions or [getattr(study.spec.design, "ablation_fraction", 0.1)]
    found = []
    for methods in groups:
        ceiling = [source for source in (study, *methods.values()) if tells_ceiling(source)]
        options: dict[str, Any] = {"ceiling": ceiling, "directory": directory / "held-out"}
        found.append(evaluate_methods(study.experiment, methods, tested, num_rows, seed, **options))
        typer.echo(f"output {next(iter(methods.values())).output!r}\n{found[-1].summary()}")
    for path in save_evaluations(found, figure, table):
        typer.echo(f"written to {path}")
