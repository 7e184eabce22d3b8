"""Whether a fit may take a name: attributions that a study has are never replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coar.attribution_blocks import read_index
from coar.axes import Axis
from coar.errors import StudyError
from coar.study import Study


def require_unused(study: Study, name: str, output: str, columns: Axis, asked: Mapping[str, Any]) -> None:
    """Refuse, before anything is fitted, a name that other attributions have; the same ones are no others.

    Args:
        study: which has the attributions.
        name: of the attributions.
        output: which is to be fitted.
        columns: axis of the columns to be fitted.
        asked: solver (plain JSON) and remarks, as they go into the provenance.

    Raises:
        StudyError: it says what is there and what was asked for.
        StoreError: what is there is damaged.
    """
    path = study.attributions_path(name) / "index.json"
    if not path.exists():
        return
    index = read_index(path)
    there = {"solver": {}, "rows": 0, "remarks": []} | index["provenance"]
    own = {"output": index["output"], "columns": index["columns"], **_parts(there)}
    new = {"output": output, "columns": columns.to_json(), **_parts({"rows": len(study.masks), **asked})}
    if own == new:
        return
    differs = [key for key in own if own[key] != new[key]]
    raise StudyError(
        f"attributions {name!r} exist: {_text(own, new)}",
        got=f"asked: {_text(new, own)}" + (", other remarks" if differs == ["remarks"] else ""),
        todo=f"another name: --name NAME (save_as=), or remove {path.parent}",
    )


def _parts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: provenance[key] for key in ("solver", "rows", "remarks")}


def _text(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Output, columns, solver and rows, with the settings in which the solver differs from the other."""
    solver, names = own["solver"], own["columns"]["names"]
    columns = f"{len(names):,} column{'s' * (len(names) != 1)}"
    if names != other["columns"]["names"] and len(names) == len(other["columns"]["names"]):
        columns += f" from {names[0]!r}"
    method = str(solver.get("name", "another solver"))
    if method == other["solver"].get("name"):
        differing = [f"{k}={v!r:.60}" for k, v in solver.items() if v != other["solver"].get(k)]
        method += f" ({', '.join(differing)})" if differing else ""
    return f"{own['output']}, {columns}, {method}, {own['rows']:,} rows"
