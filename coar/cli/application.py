"""The application that all verbs belong to, how it ends, and arguments that verbs share."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.errors import CoarError, CoarWarning, SettingError, StoreError, StudyError
from coar.settings import nearest

app = typer.Typer(
    help="Which parts of a trained network make this prediction, and what happens if they change?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _folder(context: typer.Context, directory: Path) -> Path:
    """Refuse a file, such as a spec, where the folder of a study is expected."""
    if directory.is_file():
        stem = directory.with_suffix("") if directory.suffix else "DIRECTORY"
        made = context.info_name in ("init", "import")
        raise StudyError(
            f"{directory} is a file, and no folder of a study",
            expected="a new folder" if made else "a folder as `coar init SPEC DIRECTORY` makes it",
            got="a file" if made or directory.suffix != ".json" else "a file, of a spec perhaps",
            todo="name another"
            if made
            else f"if it is a spec: `coar init {directory} {stem}`, then `coar run {stem}`",
        )
    return directory


Directory = Annotated[Path, typer.Argument(help="folder of the study", metavar="DIRECTORY", callback=_folder)]
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


def chosen_output(output: str, known: Iterable[str]) -> str:
    """The output asked for, or the only one there is.

    Raises:
        SettingError: which ones there are, and the option that names one.
    """
    names = list(known)
    if output in names or (not output and len(names) == 1):
        return output or names[0]
    raise SettingError(
        "no such output" if output else "which output?",
        expected=f"--output with one of: {', '.join(names)}",
        got=repr(output) + nearest(output, names) if output else "no --output",
    )


def require_fraction(fraction: float | None) -> None:
    """Raise unless an ablation fraction is one, or was not given."""
    if fraction is not None and not 0 < fraction < 1:
        raise SettingError(
            "ablation_fraction (--fraction) out of range",
            expected="a number above 0 and below 1",
            got=fraction,
            todo="0.05 to 0.1 is usual: the share of components that are ablated at random",
        )


def require_writable(*paths: Path | None) -> None:
    """Make the folders that files are to lie in, and raise where a file could not be written there."""
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.open("ab").close()
            else:
                tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise StoreError(
                f"cannot write {path}",
                expected="a file in a folder that can be written to",
                got=str(error),
                todo="choose another place",
            ) from None


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "warning" if issubclass(category, CoarWarning) else category.__name__
    typer.echo(f"coar: {kind}: {message}", err=True)
