"""Attributions that a study has: their names, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coar.attributions import Attributions
from coar.errors import StoreError
from coar.settings import nearest
from coar.study_folder import StudyFolder


def saved_names(study: StudyFolder) -> list[str]:
    """Names of the finished attributions in a study, sorted."""
    return sorted(path.parent.name for path in (study.directory / "attributions").glob("*/index.json"))


def saved_attributions(
    study: StudyFolder, names: Sequence[str] | None = None, output: str | None = None
) -> dict[str, Attributions]:
    """Attributions of a study by name; default all.

    Args:
        study: any.
        names: which; default all.
        output: only those of this output; None takes those of any.

    Raises:
        StoreError: one of these names is missing, and which ones are there; or there are none.
    """
    there = saved_names(study)
    missing = [name for name in names or () if name not in there]
    if missing or not there:
        hint = nearest(missing[0], there) if missing else ""
        raise StoreError(
            f"no attributions {', '.join(map(repr, missing))}".rstrip() + f" in {study.directory}{hint}",
            expected=f"one of: {', '.join(there)}" if there else "at least one fit",
            got=None if there else "a study that has none",
            todo=f"make them first: `coar fit {study.directory}`" + (" --name NAME" if there else ""),
        )
    found = {name: Attributions.load(study.attributions_path(name)) for name in names or there}
    chosen = {name: one for name, one in found.items() if output in (None, one.output)}
    if not chosen:
        raise StoreError(
            f"no attributions of output {output!r}" + (f" among {', '.join(found)}" if names else ""),
            expected="output " + " or ".join(sorted({one.output for one in found.values()})),
            got=repr(output),
            todo=f"make some: `coar fit {study.directory} --output {output} --name NAME`",
        )
    return chosen


def by_columns(found: Mapping[str, Attributions]) -> list[dict[str, Attributions]]:
    """Groups of attributions of the same output and columns: only these can be compared."""
    groups: list[dict[str, Attributions]] = []
    for name, one in found.items():
        for group in groups:
            first = next(iter(group.values()))
            if (first.output, first.columns) == (one.output, one.columns):
                group[name] = one
                break
        else:
            groups.append({name: one})
    return groups
