"""What attributions by gate gradients say of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import StudyError
from coar.gradients.draws import GateDraws
from coar.gradients.schedule import Schedule
from coar.gradients.weights import Progress

METHOD = "gate gradients"
FORWARDS_PER_PASS = 3  # by count: one forward, and a backward pass of two; measured 2.8 to 3.8


def attributions_provenance(
    draws: GateDraws,
    schedule: Schedule,
    rounds: int,
    backwards: float,
    pooled: bool,
    found: Progress,
    placed: Mapping[str, Any],
) -> dict[str, Any]:
    """Plain JSON.

    Args:
        draws: of the gates.
        schedule: of the passes.
        rounds: how many of it were done.
        backwards: columns per example, each of which costs a backward pass.
        pooled: whether examples share.
        found: how good the weights are.
        placed: where gates act.
    """
    passes = schedule.passes(rounds)
    return {
        "method": METHOD,
        "ablation_fraction": draws.ablation_fraction,
        "seed": draws.seed,
        "passes": passes,
        "forwards": round(passes * (1 + (FORWARDS_PER_PASS - 1) * backwards)),
        "replicates": schedule.replicates,
        "pooled": pooled,
        "correlation": found.correlation,
        "error": found.error,
        **placed,
    }


def require_unused(path: Path, provenance: Mapping[str, Any], output: str, columns: Axis) -> None:
    """Refuse a name that attributions of other passes or columns have."""
    if not (path / "index.json").exists():
        return
    there = Attributions.load(path)
    keys = ("method", "passes", "pooled", "correlation", "calibration")
    own, new = ([found.get(key) for key in keys] for found in (there.provenance, provenance))
    if own != new or there.output != output or there.columns != columns:
        raise StudyError(
            f"attributions {path.name!r} exist: {_said(there.provenance, there.output, there.columns)}",
            got=f"asked: {_said(provenance, output, columns)}",
            todo=f"another name: --name NAME (save_as=), or remove {path}",
        )


def _said(provenance: Mapping[str, Any], output: str, columns: Axis) -> str:
    found = f"{provenance.get('method')}, {provenance.get('passes')} passes, "
    found += f"output {output!r}, {len(columns):,} columns"
    found += ", pooled" if provenance.get("pooled") else ""
    return found + (", calibrated" if "calibration" in provenance else "")
