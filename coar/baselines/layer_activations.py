"""LayerActivations: what the components of a model emit, or are read as, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.errors import ComponentError
from coar.gates.interception import Interception
from coar.gates.sites import Gate, Site


@dataclass(frozen=True)
class Seen:
    """One side of one call of a layer.

    Attributes:
        gates: where the components lie.
        values: what the layer read or emitted, part of the graph of what comes after.
        channels: dimension of the units, from the end.
    """

    gates: Sequence[Gate]
    values: Tensor
    channels: int

    def by_example(self, of_values: Tensor, count: int) -> Tensor:
        """Numbers in the shape of the values, summed over positions: [examples, entries].

        Rows of an example (windows, flattened tokens) lie one after the other.
        """
        rows = of_values.movedim(self.channels, -1)
        if count > 1 and (rows.ndim < 2 or len(rows) % count):
            raise not_apart(self.gates[0], count, tuple(self.values.shape))
        return rows.reshape(count, -1, rows.shape[-1]).sum(dim=1)

    def add(self, of_values: Tensor, total: Tensor) -> None:
        """Add numbers in the shape of the values to `total` [examples, components]."""
        entries = self.by_example(of_values, len(total))
        for gate in self.gates:
            own = entries[:, gate.entries]
            if gate.group.width > 1:
                own = own.unflatten(-1, (gate.group.count, gate.group.width)).sum(dim=-1)
            total[:, gate.flat] += own


class LayerActivations(Interception):
    """Context manager that keeps what sites' layers read and emit, call by call, and changes no number.

    Attributes:
        seen: in the order of the calls.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self.seen: list[Seen] = []

    def on_input(self, site: Site, x: Tensor, channels: int) -> Tensor:
        """Keep the layer's own copy: what others read of the same tensor is not this component."""
        return self._kept(site, site.inputs, x.clone(), channels) if site.inputs else x

    def on_output(self, site: Site, y: Tensor, channels: int, bias: Tensor | None) -> Tensor:
        """Keep it, and pass on a copy: what follows may write in place."""
        del bias
        return self._kept(site, site.outputs, y, channels).clone() if site.outputs else y

    def on_parameter(self, site: Site, parameter: Tensor) -> Tensor:
        """Refuse a weight that no known layer reads: what its components emit is not seen."""
        if parameter is site.module._parameters[site.parameter]:
            raise _not_seen(site, f"{type(site.module).__name__}, which reads its weight in another way")
        return parameter

    def _kept(self, site: Site, gates: Sequence[Gate], values: Tensor, channels: int) -> Tensor:
        if not torch.is_grad_enabled():
            raise _not_seen(site, "torch.no_grad(), a reentrant checkpoint or a custom Function around it")
        if not values.requires_grad:  # the path does not pass here, derivatives do
            values = values.detach().requires_grad_()
        self.seen.append(Seen(gates, values, channels))
        return values


def not_apart(gate: Gate, count: int, shape: object) -> ComponentError:
    """A layer whose rows are not those of one example after the other."""
    return ComponentError(
        f"{gate.group.module}: examples do not lie apart along the first dimension",
        expected=f"rows of {count} examples, one after the other",
        got=shape,
        todo="batch_size=1, or a model that takes examples first (batch_first=True)",
    )


def _not_seen(site: Site, got: str) -> ComponentError:
    group = site.gates[0].group
    return ComponentError(
        f"derivatives by what {group.module}.{group.parameter} makes are not to be had",
        expected="a layer called as linear, convolution, batch norm or attention, with gradients on",
        got=got,
        todo=f"exclude=[{group.module!r}], or use leave_one_out",
    )
