"""ScaledWeights: gates on the weights of a private copy, and models edited for good.

No hooks, nothing in the forward pass: a mask costs one small product per parameter that changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import ComponentError
from coar.gates.convention import Bias, Means, Value
from coar.gates.sites import Site, make_sites


class ScaledWeights:
    """A model whose gated parameters are rewritten for each mask.

    Args:
        model: a private copy: its parameters are overwritten.
        components: where the gates are.
        bias: whether a unit's bias stays or is gated with its weight.
        value: what an ablated unit emits: "zero" (beside its bias, where that stays), "mean" or a number.
        means: of every group, for `value="mean"`.
        sites: made before with the same arguments (and perhaps folded); made here by default.
    """

    def __init__(
        self,
        model: nn.Module,
        components: ComponentSet,
        bias: Bias = "keep",
        value: Value = "zero",
        means: Means | None = None,
        sites: Sequence[Site] | None = None,
    ):
        if sites is None:
            sites = make_sites(model, components, bias, value, means)
        self.model = model  # flags stay: torch chooses kernels by them
        self._sites = [_ScaledSite(site) for site in sites]
        self._current = np.ones(len(components), dtype=np.float64)

    def set(self, gates: np.ndarray) -> None:
        """Apply one gate vector [components] (booleans are 0/1 gates) to the parameters that change."""
        if np.shape(gates) != self._current.shape:
            raise ComponentError(
                "a gate vector has one gate per component", expected=self._current.shape, got=np.shape(gates)
            )
        wanted = np.asarray(gates, dtype=np.float64).copy()
        vector = torch.from_numpy(wanted)
        for site in self._sites:
            if any(not np.array_equal(wanted[flat], self._current[flat]) for flat in site.flats):
                site.write(vector)
        self._current = wanted


class _ScaledSite:
    """One site, the untouched values of its parameters, and where to write the scaled ones."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.flats = [gate.flat for gate in site.gates]
        self._weight = site.weight_now()
        self._weight_kept = self._weight.clone()
        self._bias = site.bias_now() if site.moves_bias() else None
        self._bias_kept = None if self._bias is None else self._bias.clone()

    def write(self, gates: Tensor) -> None:
        with torch.no_grad():
            # On the device once and in the weight's dtype: 0 and 1 are exact in every precision.
            gates = gates.to(self._weight.device, self._weight.dtype)
            self._site.write_weight(self._weight_kept, gates, self._weight)
            if self._bias is not None and self._bias_kept is not None:
                self._bias.copy_(self._site.bias_at(self._weight_kept, self._bias_kept, gates))


def scaled_outputs(
    model: nn.Module,
    sites: Sequence[Site],
    components: ComponentSet,
    outputs: Callable[[], Tensor],
    rows: np.ndarray,
) -> Tensor:
    """Outputs of a private copy with its weights scaled, then restored.

    Args:
        model: the copy.
        sites: of the copy.
        components: what `rows` indexes.
        outputs: runs the copy on a batch: [examples].
        rows: gates [rows, components].

    Returns:
        [rows, examples].
    """
    scaled = ScaledWeights(model, components, sites=sites)
    try:
        found = []
        for row in rows:
            scaled.set(row)
            found.append(outputs())
        return torch.stack(found)
    finally:
        scaled.set(np.ones(len(components)))


def ablated_copy(
    model: nn.Module,
    components: ComponentSet,
    keep: np.ndarray,
    bias: Bias = "keep",
    value: Value = "zero",
    means: Means | None = None,
) -> nn.Module:
    """Copy a model with the components of `keep == False` ablated for good.

    Args:
        model: left untouched.
        components: what `keep` indexes.
        keep: bool [components], True = kept.
        bias: see `coar.gates.convention`.
        value: likewise.
        means: likewise.
    """
    edited = copy.deepcopy(model)
    ScaledWeights(edited, components, bias, value, means).set(keep)
    return edited
