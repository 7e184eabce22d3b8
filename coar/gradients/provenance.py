"""What attributions by gate gradients say of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coar.attributions import Attributions
from coar.errors import StudyError
from coar.gradients.draws import GateDraws
from coar.gradients.layout import REPLICATES
from coar.gradients.weights import Progress

METHOD = "gate gradients"
FORWARDS_PER_PASS = 3  # a forward and a backward pass cost about 2.7 to 3.1 forward passes


def attributions_provenance(
    draws: GateDraws,
    passes: int,
    backwards: float,
    pooled: bool,
    found: Progress,
    placed: Mapping[str, Any],
) -> dict[str, Any]:
    """Plain JSON.

    Args:
        draws: of the gates.
        passes: how many.
        backwards: columns per example, each of which costs a backward pass.
        pooled: whether examples share.
        found: how good the weights are.
        placed: where gates act.
    """
    return {
        "method": METHOD,
        "ablation_fraction": draws.ablation_fraction,
        "seed": draws.seed,
        "passes": passes,
        "forwards": round(passes * (1 + (FORWARDS_PER_PASS - 1) * backwards)),
        "replicates": REPLICATES,
        "pooled": pooled,
        "correlation": found.correlation,
        "error": found.error,
        **placed,
    }


def require_unused(path: Path, provenance: Mapping[str, Any], output: str) -> None:
    """Refuse a name that attributions of other passes have."""
    if not (path / "index.json").exists():
        return
    there = Attributions.load(path)
    keys = ("method", "passes", "pooled", "correlation")
    own, new = ([found.get(key) for key in keys] for found in (there.provenance, provenance))
    if own != new or there.output != output:
        raise StudyError(
            f"attributions {path.name!r} exist: {own[0]}, {own[1]} passes, output {there.output!r}",
            got=f"asked: {new[0]}, {new[1]} passes, output {output!r}{', pooled' if new[2] else ''}",
            todo=f"another name: --name NAME (save_as=), or remove {path}",
        )
