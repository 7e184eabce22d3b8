"""Verbs that say how good attributions are: check, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.application import AllowImport, Directory, app
from coar.errors import SettingError


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
    figure: Annotated[Path | None, typer.Option(help="PNG to draw: correlations", metavar="PATH")] = None,
    table: Annotated[Path | None, typer.Option(help="CSV to write: every column", metavar="PATH")] = None,
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
        if not 0 < fraction < 1:
            raise SettingError(
                "ablation_fraction (--fraction) out of range",
                expected="a number above 0 and below 1",
                got=fraction,
                todo="0.05 to 0.1 is usual: the share of components that are ablated at random",
            )
    study = open_study(directory, allow_import)
    tested = fractions or [getattr(study.spec.design, "ablation_fraction", 0.1)]
    found = []
    for methods in by_columns(saved_attributions(study, names)):
        ceiling = [source for source in (study, *methods.values()) if tells_ceiling(source)]
        options: dict[str, Any] = {"ceiling": ceiling, "directory": directory / "held-out"}
        found.append(evaluate_methods(study.experiment, methods, tested, num_rows, seed, **options))
        typer.echo(found[-1].summary())
    for path in save_evaluations(found, figure, table):
        typer.echo(f"written to {path}")
