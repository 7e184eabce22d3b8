"""Attributions that a study has: their names, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coar.attributions import Attributions
from coar.errors import StoreError
from coar.study_folder import StudyFolder


def saved_names(study: StudyFolder) -> list[str]:
    """Names of the finished attributions in a study, sorted."""
    return sorted(path.parent.name for path in (study.directory / "attributions").glob("*/index.json"))


def saved_attributions(study: StudyFolder, names: Sequence[str] | None = None) -> dict[str, Attributions]:
    """Attributions of a study by name; default all.

    Raises:
        StoreError: one of these names is missing, and which ones are there; or there are none.
    """
    there = saved_names(study)
    missing = [name for name in names or () if name not in there]
    if missing or not there:
        raise StoreError(
            f"no attributions {', '.join(map(repr, missing))}".rstrip() + f" in {study.directory}",
            expected=f"one of: {', '.join(there)}" if there else "at least one fit",
            got="index.json is missing",
            todo=f"make them first: `coar fit {study.directory}`" + (" --name NAME" if there else ""),
        )
    return {name: Attributions.load(study.attributions_path(name)) for name in names or there}


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
