"""PlacedActivations: gates after a unit's own nonlinearity, with the same two ends.

A gate moves what is gated from its rest to what it is. Where functions that work entry by entry come
next, BatchNorm, a residual connection, the activation, both ends can go through them first:

    relu(bn(rest) + s) + g (relu(bn(z) + s) - relu(bn(rest) + s))

At g = 0 and g = 1 that is what a gate on z gives, in between it is a straight line where the other is
bent. The derivative along the gate so varies less, and its mean is found from fewer passes.

How: what a layer emits stays *pending*; functions that work entry by entry are called twice, for
either end (the lower one is a constant of each unit until something is added to it); the gate acts
when anything else reads the tensor, and at the latest behind a nonlinearity when other numbers come
in. Where no nonlinearity is met before, the gate stays at the layer (`settle` finds out).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coar.component_group import ComponentGroup
from coar.errors import ComponentError
from coar.gates.activations import GatedActivations, Gating
from coar.gates.placing import Findings, Placing
from coar.gates.sites import Site

AT_INPUT = "plain: on what the layer reads"
WHOLE = "plain: a whole branch"
SEVERAL = "plain: several gates on the same units"
UNREAD = "plain: nothing reads it"


class PlacedActivations(GatedActivations):
    """`GatedActivations` with gates after the unit's own nonlinearity, wherever the path exists.

    Arguments are those of `GatedActivations`. Before the first pass, `settle` (or
    `coar.gates.verify_ends`, which calls it) looks where the gates go.

    >>> from torch import nn
    >>> from coar.discovery import find_components
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).requires_grad_(False)
    >>> gated = PlacedActivations(model, find_components(model, kinds=["neuron"]))
    >>> x = torch.randn(4, 2)
    >>> gated.settle(lambda: model(x))
    >>> gated.placements()
    {'0': 'after relu'}
    >>> with gated.at(torch.rand(4, 3)):
    ...     outputs = model(x)
    """

    _labels: dict[int, str] | None = None  # id of a site -> where its gates are
    _deferred: frozenset[int] = frozenset()

    def settle(self, *runs: Callable[[], Any]) -> None:
        """Find where the gates go.

        Args:
            runs: run the model on some batch, in each of the ways in which it will be run; what they
                return is dropped.

        Raises:
            ComponentError: a pass fails under gates wherever they are.
        """
        labels = {id(site): fixed for site in self.sites if (fixed := _fixed(site))}
        for site in self.sites:
            if id(site) not in labels:  # units of their own, each: the order is free
                site.outputs.sort(key=lambda gate: gate.entries.start)
        found = self._found(runs, labels)
        for site in self.sites:
            labels.setdefault(id(site), found.label(site, UNREAD))
        self._labels = labels
        self._deferred = frozenset(key for key, label in labels.items() if label.startswith("after"))

    def _found(self, runs: tuple[Callable[[], Any], ...], labels: dict[int, str]) -> Findings:
        """Where gates act; a site where they fail to is labelled, and left out of the next look."""
        while True:
            found = Findings()
            try:
                self._look(runs, {id(site) for site in self.sites} - labels.keys(), found)
                return found
            except ComponentError as error:
                if found.failed is None:
                    raise
                labels[found.failed] = f"plain: {error.what}"

    def _look(self, runs: tuple[Callable[[], Any], ...], deferred: set[int], found: Findings) -> None:
        weight = self.sites[0].weight_now()
        gates = torch.ones(sum(self.counts), device=weight.device, requires_grad=True)
        # With gradients, so that a gate inside of something that takes none is found; and without, since
        # then a tensor that is alive after the pass is one that somebody may still read.
        for gradients in (True, False):
            with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                for run in runs:
                    with Placing(self, gates, frozenset(deferred), found):
                        run()

    def keep_plain(self, site: Site, reason: str) -> str:
        """Put a site's gates at its layer from now on; says where they were."""
        labels = self._require_settled()
        before, labels[id(site)] = labels[id(site)], f"plain: {reason}"
        self._deferred = self._deferred - {id(site)}
        return before

    def placements(self) -> dict[str, str]:
        """For each group of components where its gates are: "after relu", "plain: read by cat", ..."""
        labels = self._require_settled()
        return {
            gate.group.name: _of_group(gate.group, labels[id(site)])
            for site in self.sites
            for gate in site.gates
        }

    def deferred_sites(self) -> list[Site]:
        """Sites whose gates are anywhere but at the layer."""
        return [site for site in self.sites if id(site) in self._deferred]

    def at(self, gates: Tensor) -> Gating:
        """Context manager: run the model under gates [components] or [batch, components].

        Raises:
            ComponentError: also if nobody has looked yet where the gates go.
        """
        plain = super().at(gates)
        self._require_settled()
        return Placing(self, gates, self._deferred, None) if self._deferred else plain

    def _require_settled(self) -> dict[int, str]:
        if self._labels is None:
            raise ComponentError(
                "nobody has looked yet where the gates go",
                expected="settle(run) or verify_ends(...) before the first pass",
                got="neither",
            )
        return self._labels


def _of_group(group: ComponentGroup, label: str) -> str:
    if group.side == "input":
        return AT_INPUT
    return WHOLE if group.whole else label


def _fixed(site: Site) -> str | None:
    """Why the gates of a site cannot be anywhere else than at its layer; None if they may."""
    if not site.outputs:
        return AT_INPUT
    if any(gate.group.whole for gate in site.outputs):
        return SEVERAL
    ends = sorted((gate.entries.start, gate.entries.stop) for gate in site.outputs)
    return SEVERAL if any(stop > start for (_, stop), (start, _) in pairwise(ends)) else None
