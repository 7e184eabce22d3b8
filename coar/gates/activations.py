"""GatedActivations: differentiable gates on what layers read and emit.

While the gates are on, every call of a function that reads a gated parameter is intercepted: its
input and its output are gated as the definition in `coar.gates.convention` says. No module is
hooked or replaced, so fast paths that skip hooks, modules called twice and functions called with a
module's weight behave alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import ComponentError
from coar.gates.convention import Bias, Means, Value
from coar.gates.gate_function import gate, gate_over_bias
from coar.gates.interception import Interception
from coar.gates.layers import NO_BIAS_ALONE, Layer, broadcastable, by_example, by_row, call
from coar.gates.sites import Gate, Site, make_sites
from coar.task import require_not_compiled


class GatedActivations:
    """A model with gates that gradients can be taken for.

    Args:
        model: a private copy, or any model that is not run elsewhere meanwhile; its parameters stay.
        components: where the gates are.
        bias: whether a unit's bias stays or is gated with its weight.
        value: what an ablated unit emits: "zero" (beside its bias, where that stays), "mean" or a number.
        means: of every group, for `value="mean"`.
        sites: made before with the same arguments (and perhaps folded); made here by default.
        fused: add kept biases after gating: faster, but gates of 1 give the untouched outputs only up
            to rounding.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).requires_grad_(False)
    >>> from coar.discovery import find_components
    >>> gated = GatedActivations(model, find_components(model, kinds=["neuron"]))
    >>> gates = torch.ones(4, 3, requires_grad=True)            # a gate vector for each of 4 examples
    >>> with gated.at(gates):
    ...     outputs = model(torch.randn(4, 2))[:, 0]
    >>> torch.autograd.grad(outputs.sum(), gates)[0].shape      # of each example's own output
    torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        components: ComponentSet,
        bias: Bias = "keep",
        value: Value = "zero",
        means: Means | None = None,
        sites: Sequence[Site] | None = None,
        fused: bool = False,
    ) -> None:
        self.model = require_not_compiled(model)
        if sites is None:
            sites = make_sites(model, components, bias, value, means, biases=False)
        self.sites = list(sites)
        self.fused = fused
        self.counts = [group.count for group in components]
        self.starts = [flat.start for _, flat in components.slices()]

    def at(self, gates: Tensor) -> Gating:
        """Context manager: run the model under gates [components] or [batch, components].

        With a gate vector per example the model must run that batch, examples along the first
        dimension of what layers read and emit.
        """
        if not isinstance(gates, Tensor):
            raise ComponentError("gates are a tensor", expected="torch.Tensor", got=type(gates).__name__)
        if gates.ndim not in (1, 2) or gates.shape[-1] != sum(self.counts):
            raise ComponentError(
                "a gate vector has one gate per component",
                expected=f"[{sum(self.counts)}] or [batch, {sum(self.counts)}]",
                got=tuple(gates.shape),
            )
        return Gating(self, gates)


class Gating(Interception):
    """The gates of one forward pass."""

    def __init__(self, gated: GatedActivations, gates: Tensor) -> None:
        super().__init__(gated.sites)
        self._gates, self._fused = gates, gated.fused
        # One split, so that going back the gradients of all groups are joined once.
        parts = gates.split(gated.counts, dim=-1)
        self._own = dict(zip(gated.starts, parts, strict=True))
        self._with_gradients = gates.requires_grad and torch.is_grad_enabled()
        self._left: set[int] = set()  # ids of sites whose bias was read alone and left as it is

    def on_input(self, site: Site, x: Tensor, channels: int) -> Tensor:
        """Gates on the input side."""
        for entry in site.inputs:
            x = self._gated(x, entry, channels, site, entry.rest)
        return x

    def on_output(self, site: Site, y: Tensor, channels: int, bias: Tensor | None) -> Tensor:
        """Gates on the output side."""
        for entry in site.outputs:
            # The bias that stays is the one just added: some layers change it on the way.
            y = self._gated(y, entry, channels, site, self._rest(entry, y.shape[channels], bias))
        return y

    def _rest(self, entry: Gate, size: int, bias: Tensor | None) -> Tensor:
        if not entry.keeps_bias:
            return entry.rest
        if bias is None:  # whoever called without one adds it later, if at all
            return torch.zeros_like(entry.rest)
        return bias.reshape(-1)[entry.entries] if bias.numel() == size else entry.rest

    def run_layer(self, func: Callable[..., Any], layer: Layer, site: Site, arguments: Any) -> Tensor:
        """Run one call of a site's layer; where a bias stays, add it together with the gates."""
        bias = arguments.get(layer.bias)
        if not self._fused or bias is None or func in NO_BIAS_ALONE or not _keeps_one_bias(site):
            return super().run_layer(func, layer, site, arguments)
        channels = layer.channels(arguments[layer.input])
        arguments[layer.input] = self.on_input(site, arguments[layer.input], channels)
        z = call(func, arguments | {layer.bias: None})
        gates = self._broadcastable(site.outputs[0], z, channels, site)
        return by_row(gate_over_bias(by_example(z, gates), gates, _like(bias, gates, channels)), z)

    def on_parameter(self, site: Site, parameter: Tensor) -> Tensor:
        """The parameter under one gate vector for all examples, where no layer reads it."""
        is_weight = parameter is site.module._parameters[site.parameter]
        if not is_weight and not site.moves_bias():
            return parameter
        if not is_weight and id(site) not in self._plain:
            # On its way to a layer whose whole output is gated: Swin V2 changes it before.
            self._left.add(id(site))
            return parameter
        if is_weight and id(site) in self._left:
            raise _not_reached("gates", site, "its weight read by a layer, or before its bias")
        if self._gates.ndim != 1:
            expected = "a layer called as linear, convolution, batch norm or attention"
            raise _not_reached("gates for each example", site, expected)
        if is_weight and site.moves_bias() and site.bias_now() is None:
            raise _not_reached("constants", site, "a layer with a bias, or one called as such")
        weight, bias = site.weight_now(), site.bias_now()
        if is_weight:
            return site.weight_at(weight, self._gates)
        assert bias is not None  # or it would not have been found
        return site.bias_at(weight, bias, self._gates)

    def _gated(self, y: Tensor, entry: Gate, channels: int, site: Site, rest: Tensor) -> Tensor:
        group, size = entry.group, y.shape[channels]
        if group.stop - group.offset < size:
            around = [group.offset, group.stop - group.offset, size - group.stop]
            ahead, own, behind = y.split(around, dim=channels)
            return torch.cat([ahead, self._all_gated(own, entry, channels, site, rest), behind], dim=channels)
        return self._all_gated(y, entry, channels, site, rest)

    def _all_gated(self, y: Tensor, entry: Gate, channels: int, site: Site, rest: Tensor) -> Tensor:
        gates = self._broadcastable(entry, y, channels, site)
        return by_row(gate(by_example(y, gates), gates, _like(rest, gates, channels)), y)

    def _broadcastable(self, entry: Gate, y: Tensor, channels: int, site: Site) -> Tensor:
        if self._with_gradients and not torch.is_grad_enabled():
            expected = "gradients on where the gates are"
            what = f"{expected}: no torch.no_grad(), no reentrant checkpoint, no custom Function"
            raise _not_reached("gradients", site, what, "exclude this layer, or fit a regression on rows")
        own = self._own[entry.flat.start]
        own = own if entry.group.width == 1 else own.repeat_interleave(entry.group.width, dim=-1)
        if own.ndim == 2 and len(y) % len(own):
            name = entry.group.module or type(site.module).__name__
            raise ComponentError(
                f"{name}: examples do not lie along the first dimension",
                expected=f"a multiple of {len(own)} rows",
                got=tuple(y.shape),
                todo="run all examples of the gates at once, examples first (batch_first=True)",
            )
        return broadcastable(own, y, channels)


def _not_reached(
    what: str,
    site: Site,
    expected: str,
    todo: str = "use one gate vector [components] for the batch, or masks",
) -> ComponentError:
    group = site.gates[0].group
    return ComponentError(
        f"{what} do not reach {group.module}.{group.parameter}",
        expected=expected,
        got=f"{type(site.module).__name__}, which reads it in another way",
        todo=todo,
    )


def _keeps_one_bias(site: Site) -> bool:
    if len(site.outputs) != 1 or not site.outputs[0].keeps_bias:
        return False
    group = site.outputs[0].group
    return group.offset == 0 and group.stop == site.weight_now().shape[group.dimension] * group.blocks


def _like(values: Tensor, gates: Tensor, channels: int) -> Tensor:
    """A vector over units in the shape of gates."""
    shape = [1] * gates.ndim
    shape[channels] = len(values)
    return values.view(shape)
