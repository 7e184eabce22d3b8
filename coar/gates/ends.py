"""verify_ends: whether gates that act later than at their layer still have the ends of the ablation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from coar.components import ComponentSet
from coar.errors import ComponentError
from coar.gates.activations import GatedActivations
from coar.gates.derivatives import require_derivatives
from coar.gates.placement import PlacedActivations
from coar.gates.reach import allowed_difference, require_agreement
from coar.gates.scaled_weights import scaled_outputs
from coar.gates.sites import Site
from coar.randomness import uniform

ALL_AT_ONCE = (0.5, 0.9)  # shares of components kept in the rows for all groups


def verify_ends(
    gated: PlacedActivations,
    components: ComponentSet,
    outputs: Callable[[], Tensor],
    examples: int,
    derivatives: bool = False,
) -> dict[str, str]:
    """Place gates, and compare gates of 0 and 1 with scaled weights, group by group.

    Args:
        gated: of a private copy, with sites that were made for scaled weights as well; its weights are
            scaled for a moment and restored.
        components: the same.
        outputs: runs `gated.model` on a batch: [examples]. A few examples do; each group that is placed
            after a nonlinearity costs two passes.
        examples: how many there are, at least 2.
        derivatives: also look whether there are any, see `coar.gates.derivatives`; gates that have none
            where they were placed fall back, too.

    Returns:
        Reasons by the names of groups whose gates stay at their layer because the ends disagree; empty
        where all is well. `gated.placements()` names them, too.

    Raises:
        ComponentError: gates at the layers do not do what ablation does, either; or have no derivatives.

    Warns of groups that fall back.
    """
    plain = GatedActivations(gated.model, components, sites=gated.sites, fused=gated.fused)
    require_agreement(plain, components, outputs, examples)
    gated.settle(outputs)
    fallen: dict[str, str] = {}
    for site in gated.deferred_sites():
        reason = _disagreement(gated, components, outputs, examples, _rows_of(site, len(components)))
        if reason is not None:
            fallen |= _fall_back(gated, [site], reason)
    fallen |= _all_together(gated, components, outputs, examples)
    if not derivatives:
        return fallen
    try:
        require_derivatives(gated, components, outputs, examples)
    except ComponentError as error:
        require_derivatives(plain, components, outputs, examples)
        fallen |= _fall_back(gated, gated.deferred_sites(), error.what)
    return fallen


def _all_together(
    gated: PlacedActivations, components: ComponentSet, outputs: Callable[[], Tensor], examples: int
) -> dict[str, str]:
    """Whether gates that agree one group at a time agree together; else all fall back."""
    rows = uniform(0, "verify ends", 0, len(ALL_AT_ONCE) * len(components)).reshape(len(ALL_AT_ONCE), -1)
    for share, row in zip(ALL_AT_ONCE, rows, strict=True):
        reason = _disagreement(gated, components, outputs, examples, row < share)
        if reason is not None:
            return _fall_back(gated, gated.deferred_sites(), f"{reason} (all groups together)")
    return {}


def _rows_of(site: Site, size: int) -> np.ndarray:
    """Keep mask [components]: about half of a site's components, at least one of each sort, are ablated."""
    keep = np.ones(size, dtype=bool)
    for gate in site.outputs:
        count = gate.group.count
        keep[gate.flat] = uniform(0, "verify ends", 1 + gate.flat.start, count) < 0.5
        keep[gate.flat.start] = False
    return keep


def _disagreement(
    gated: PlacedActivations,
    components: ComponentSet,
    outputs: Callable[[], Tensor],
    examples: int,
    keep: np.ndarray,
) -> str | None:
    """Why outputs with some components ablated in every second example are not what they should be."""
    ones = np.ones(len(components))
    with torch.no_grad():
        rows = np.stack([keep.astype(float), ones])
        expected, untouched = scaled_outputs(gated.model, gated.sites, components, outputs, rows)
        turn = torch.arange(examples, device=expected.device) % 2 == 1
        expected = torch.where(turn, untouched, expected)
        dtype = torch.promote_types(gated.sites[0].weight_now().dtype, torch.float32)
        gates = torch.tensor(np.where(turn.cpu().numpy()[:, None], ones, keep), dtype=dtype)
        try:
            with gated.at(gates.to(expected.device)):
                found = outputs()
        except (ComponentError, RuntimeError) as error:
            return f"a pass fails: {error}".splitlines()[0]
    allowed = allowed_difference(expected, gated.sites[0].weight_now().dtype)
    difference = float((found - expected).abs().max())
    if difference <= allowed:
        return None
    return f"outputs with components ablated differ by {difference:.2g}, allowed are {allowed:.2g}"


def _fall_back(gated: PlacedActivations, sites: Iterable[Site], reason: str) -> dict[str, str]:
    fallen: dict[str, str] = {}
    for site in sites:
        where = gated.keep_plain(site, reason)
        for gate in site.outputs:
            fallen[gate.group.name] = reason
            warnings.warn(
                f"gates of {gate.group.name} stay at the layer rather than {where}: {reason}", stacklevel=4
            )
    return fallen
