"""What attributions by gate gradients say of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
