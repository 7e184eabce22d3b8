"""The verb that uses attributions: edit."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.application import AllowImport, Directory, Name, app
from coar.errors import SettingError


class Direction(enum.StrEnum):
    """Which way the targets' outputs are to go."""

    RAISE = "raise"
    LOWER = "lower"


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
    from coar.editing import edit_examples, first_fixed
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
