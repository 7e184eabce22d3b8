"""The application that all verbs belong to, how it ends, and arguments that verbs share."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.errors import CoarError, CoarWarning

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


def echo_lines(lines: list[str]) -> None:
    """Print lines."""
    typer.echo("\n".join(lines))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "warning" if issubclass(category, CoarWarning) else category.__name__
    typer.echo(f"coar: {kind}: {message}", err=True)
