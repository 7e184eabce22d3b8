"""The verbs that edit: by a study's attributions, or from a spec in one go."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from coar.cli.application import AllowImport, Directory, Name, SpecFile, app, require_writable
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
    protect: Annotated[
        list[str] | None,
        typer.Option(help="metadata column whose groups must not lose more either (repeatable)"),
    ] = None,
    protect_components: Annotated[
        list[str] | None, typer.Option(help="components never ablated: name or pattern (repeatable)")
    ] = None,
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
    options: dict[str, Any] = {"max_accuracy_drop": max_accuracy_drop, "protect": protect}
    options["protect_components"] = protect_components or ()
    if target:
        options["direction"] = direction.value
        found = edit_examples(study.experiment, attributions, target, progress=True, **options)
    else:
        found = first_fixed(study.experiment, attributions, **options)
        typer.echo(f"column {found.edit.provenance['targets'][0]} is misread; ", nl=False)
    found.edit.save(save_to)
    typer.echo(f"{found.summary()}\nwritten to {save_to}")


@app.command("make-edit")
def make_edit(
    spec: SpecFile,
    save_to: Annotated[Path, typer.Option(help="JSON file to write")],
    compare: Annotated[bool, typer.Option("--compare", help="also by the alternatives, as a table")] = False,
    figure: Annotated[
        Path | None, typer.Option(help="PNG to draw: the choice of the size", metavar="PATH")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the draw of examples; default the spec's")] = None,
    allow_import: AllowImport = None,
) -> None:
    """Make the edit that a spec describes, from a few examples, by gate gradients.

    Example: coar make-edit specs/edit_forget_class_small.json --save-to forget.json
    """
    from coar.editing import compare_edits
    from coar.editing import make_edit as made_edit
    from coar.editing.edit_spec import EditSpec
    from coar.report import figures

    read = EditSpec.load(spec)
    if seed is not None:
        read = read.model_copy(update={"parts": read.parts.model_copy(update={"seed": seed})})
    require_writable(save_to, figure)
    experiment, parts = read.build(allow_import)
    options = read.edit.arguments()
    found = made_edit(experiment, parts, progress=True, **options)
    typer.echo(f"{found.summary()}\nin {found.seconds:.1f} seconds")
    typer.echo(f"written to {found.edit.save(save_to)}")
    if figure:
        drawn, axes = figures.new_figure()
        figures.edit_curve(found.curve, len(found.edit.names), axes[0])
        figures.save_figure(drawn, figure)
        typer.echo(f"written to {figure}")
    if compare:
        options = {key: value for key, value in options.items() if key != "method"}
        typer.echo(compare_edits(experiment, parts, **options).summary())
