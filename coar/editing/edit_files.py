"""Edits on disk: one JSON file each, written once and checked when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coar.components import ComponentSet
from coar.errors import StoreError
from coar.files import read_json, require_format, require_keys, write_json_once
from coar.gates import Means

FORMAT = 1
_KEYS: dict[str, type | tuple[type, ...]] = {
    "names": list,
    "components": list,
    "bias": str,
    "value": (str, int, float),
    "source": dict,
    "scores": list,
    "provenance": dict,
}


def plain_scores(scores: Sequence[float]) -> list[float | str]:
    """Scores as JSON knows them: it has no infinity.

    >>> plain_scores([1.5, -np.inf])
    [1.5, '-inf']
    """
    return [score if np.isfinite(score) else str(score) for score in scores]


def write_edit(path: Path, value: dict[str, Any], means: Means | None) -> None:
    """Write the plain parts of an edit, named as in `_KEYS`; an equal file may be there already."""
    added = {} if means is None else {"means": {name: entries.tolist() for name, entries in means.items()}}
    write_json_once(path, {"format": FORMAT} | value | added)


def read_edit(path: Path) -> dict[str, Any]:
    """Arguments of `Edit`, from a file.

    Raises:
        StoreError: missing, damaged, or of a newer version.
    """
    value = require_keys(read_json(path, "saved edit"), {"format": int}, path)
    require_format(value["format"], FORMAT, path)
    require_keys(value, _KEYS, path)
    components = ComponentSet.from_json(value["components"], str(path)) if value["components"] else None
    found = tuple(group.name for group in components) if components else tuple(value["names"])
    if found != tuple(value["names"]):
        raise StoreError(f"{path} is damaged: names and components differ", got=value["names"])
    try:
        scores = tuple(float(score) for score in value["scores"])
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: scores are not numbers", got=str(error)[:200]) from None
    means = {name: np.array(entries) for name, entries in value.get("means", {}).items()} or None
    same = {key: value[key] for key in ("bias", "value", "source", "provenance")}
    return {"names": found, "components": components, "scores": scores, "means": means} | same
