"""Extensions: what was asked for after a study was created, one small file each; nothing is rewritten."""

from __future__ import annotations

from pathlib import Path

from coar.creation import FORMAT
from coar.errors import SettingError, StoreError
from coar.files import read_json, require_format, require_keys, write_json_once
from coar.gradients.layout import Layout, Step, require_few_items
from coar.gradients.weights import chosen_examples


def read_layout(directory: Path, first: Step, sizes: tuple[int, int, int], count: int) -> Layout:
    """Layout of all steps.

    Args:
        directory: the study's folder.
        first: what it was created with.
        sizes: examples per block, rounds per item, replicates.
        count: examples of the task.
    """
    layout = Layout([first], *sizes)
    for path in sorted((directory / "extensions").glob("[0-9]*.json")):
        expected = _path(directory, layout)
        if path != expected:
            raise StoreError(f"{expected} is missing", got=path.name, todo="restore it from a copy")
        layout.add(_read(path, layout, count))
    return layout


def write_step(directory: Path, layout: Layout, step: Step) -> None:
    """Ask for one step more than a layout has; who asks for the same at the same time is right, too."""
    sizes = layout.block_examples, layout.item_rounds
    require_few_items(len(layout.examples) + len(step.new), step.rounds, *sizes)
    value = {"format": FORMAT, "rounds": step.rounds, "examples": list(step.new)}
    write_json_once(_path(directory, layout), value)


def _path(directory: Path, layout: Layout) -> Path:
    """File of the step after those of a layout."""
    return directory / "extensions" / f"{len(layout.steps):06d}.json"


def _read(path: Path, layout: Layout, count: int) -> Step:
    keys = {"format": int, "rounds": int, "examples": list}
    value = require_keys(read_json(path, "extension"), {"format": int}, path)
    require_format(value["format"], FORMAT, path)
    require_keys(value, keys, path)
    if value["rounds"] < layout.rounds:
        raise StoreError(
            f"{path} is damaged", expected=f"{layout.rounds} rounds or more", got=value["rounds"]
        )
    try:
        taken = layout.examples.tolist()
        new = chosen_examples(value["examples"], count, taken) if value["examples"] else ()
    except SettingError as error:
        raise StoreError(f"{path} is damaged", expected=error.expected, got=error.got) from None
    return Step(new, value["rounds"])
