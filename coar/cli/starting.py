"""Verbs for a first look: demo, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coar.cli.application import app


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
