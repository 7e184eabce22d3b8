"""Verbs for files of the original code: import, export."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from coar.cli.application import Directory, app, chosen_output


class Layout(enum.StrEnum):
    """Forms that rows can be written in for other programs."""

    ORIGINAL = "original"
    BETON = "beton"


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
        export_beton(study, target, chosen_output(output, study.columns))
    else:
        export_store(study, target, [chosen_output(output, study.columns)] if output else None)
    typer.echo(f"written to {target}")
