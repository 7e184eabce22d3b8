"""Site: one parameter of a model and all the gates that act on it.

Both ways of gating work from sites: scaled weights rewrite the parameter, gated activations act on
what the operation that reads the parameter reads and emits. Gates on the input side come first,
then those on the output side, single units before whole branches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError
from coar.gates.convention import Bias, Means, Value, check_convention, rest


@dataclass
class Gate:
    """The gates of one group at its site.

    Attributes:
        flat: where the group's gates lie in a gate vector.
        group: the components.
        rest: what fully ablated entries are, [count * width] on the device and in the dtype of the site.
        keeps_bias: rest is the layer's own bias, so that the bias never changes.
    """

    flat: slice
    group: ComponentGroup
    rest: Tensor
    keeps_bias: bool

    def per_entry(self, gates: Tensor) -> Tensor:
        """Gates of the group's entries: [..., components] -> [..., count * width]."""
        own = gates[..., self.flat]
        return own if self.group.width == 1 else own.repeat_interleave(self.group.width, dim=-1)

    @property
    def entries(self) -> slice:
        """Where the group's entries lie along the gated dimension."""
        return slice(self.group.offset, self.group.stop)


class Site:
    """A parameter, its layer's bias, and the gates on both sides; see the module's text."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        self.module, self.parameter = module, parameter
        self.bias: str | None = None
        self.inputs: list[Gate] = []
        self.outputs: list[Gate] = []

    @property
    def gates(self) -> list[Gate]:
        """All gates in the order in which they act."""
        return [*self.inputs, *self.outputs]

    def weight_now(self) -> Tensor:
        """The gated parameter as it is."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None  # require_fits has looked
        return weight.detach()

    def bias_now(self) -> Tensor | None:
        """The layer's bias as it is, or None."""
        found = self.module._parameters.get(self.bias) if self.bias else None
        return None if found is None else found.detach()

    def moves_bias(self) -> bool:
        """Whether any gate of less than 1 changes the layer's bias."""
        return any(not gate.keeps_bias for gate in self.outputs) or any(
            bool(gate.rest.any()) for gate in self.inputs
        )

    def weight_at(self, weight: Tensor, gates: Tensor) -> Tensor:
        """The parameter under gates [components]; differentiable in them."""
        for gate in self.gates:
            weight = weight * _spread(gate, gates.to(weight.dtype), weight)
        return weight

    def write_weight(self, kept: Tensor, gates: Tensor, out: Tensor) -> None:
        """Write the parameter under gates [components] into `out`, from the untouched one."""
        first, *others = self.gates
        torch.mul(kept, _spread(first, gates, kept), out=out)
        for gate in others:
            out.mul_(_spread(gate, gates, kept))

    def bias_at(self, weight: Tensor, bias: Tensor, gates: Tensor) -> Tensor:
        """The layer's bias under gates [components], from the untouched weight and bias."""
        gates = gates.to(bias.dtype)
        if self.inputs:
            dimension = self.inputs[0].group.dimension
            absent = bias.new_zeros(weight.shape[dimension])  # what constants add to what is read
            for gate in self.inputs:
                absent = _moved(absent, gate, gates)
            bias = bias + (weight @ absent if dimension else absent @ weight)
        for gate in self.outputs:
            if not gate.keeps_bias:
                bias = _moved(bias, gate, gates)
        return bias


def _moved(values: Tensor, gate: Gate, gates: Tensor) -> Tensor:
    """Constants of all units after one group's gates: each moves what the gates before it left."""
    moved = torch.lerp(gate.rest, values[gate.entries], gate.per_entry(gates))
    return torch.cat([values[: gate.group.offset], moved, values[gate.group.stop :]])


def _spread(gate: Gate, gates: Tensor, weight: Tensor) -> Tensor:
    """Factors of a group's entries in a shape that broadcasts against the whole weight."""
    group = gate.group
    size = weight.shape[group.dimension] * group.blocks
    factors = gate.per_entry(gates)
    if len(factors) != size:
        ahead, behind = factors.new_ones(group.offset), factors.new_ones(size - group.stop)
        factors = torch.cat([ahead, factors, behind])
    shape = [1] * weight.ndim
    shape[group.dimension] = -1
    if group.blocks == 1:
        return factors.view(shape)
    # Rows of the weight come in blocks, each with its own factors for its columns.
    rows = weight.shape[0] // group.blocks
    shape[0], shape[group.dimension] = group.blocks, size // group.blocks
    return factors.view(shape).repeat_interleave(rows, dim=0)


def make_sites(
    model: nn.Module,
    components: ComponentSet,
    bias: Bias = "keep",
    value: Value = "zero",
    means: Means | None = None,
    biases: bool = True,
) -> list[Site]:
    """Sites of a private copy of a model.

    Args:
        model: where they are.
        components: of this model.
        bias: see `coar.gates.convention`.
        value: likewise.
        means: likewise.
        biases: give layers without a bias one of zeros where constants need it.

    Raises:
        ComponentError: the components are of another model, or cannot be replaced by a constant.
    """
    check_convention(bias, value)
    components.require_fits(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: dict[tuple[int, str], Site] = {}
    for group, flat in components.slices():
        module = modules[group.module]
        site = sites.setdefault((id(module), group.parameter), Site(module, group.parameter))
        site.bias = site.bias or group.bias or _bias_name(module, group)
        weight, added = site.weight_now(), site.bias_now() if group.side == "output" else None
        own = None if added is None or group.bias is None else added[group.offset : group.stop]
        at_rest = rest(group, own, bias, value, means).to(weight.device, weight.dtype)
        keeps = (
            group.side == "output"
            and value == "zero"
            and ((bias == "keep" and not group.whole) or own is None)
        )
        gate = Gate(flat, group, at_rest, keeps)
        (site.outputs if group.side == "output" else site.inputs).append(gate)
    for site in sites.values():
        site.outputs.sort(key=lambda gate: gate.group.whole)
        _require_constants_fit(site)
        if biases and site.moves_bias() and site.bias_now() is None:
            _add_bias(site)
    return list(sites.values())


def _bias_name(module: nn.Module, group: ComponentGroup) -> str | None:
    name = group.parameter.replace("weight", "bias")
    return name if name in module._parameters and name != group.parameter else None


def _require_constants_fit(site: Site) -> None:
    """A constant needs a bias to go to; what a convolution reads is cut at the padding, so none fits."""
    constants = [gate for gate in site.inputs if bool(gate.rest.any())]
    no_bias = site.moves_bias() and site.bias is None
    if no_bias or (constants and site.weight_now().ndim != 2):
        group = (constants or site.gates)[0].group
        raise ComponentError(
            f"components of {group.module} cannot be replaced by a constant",
            expected="units of a layer that can have a bias, or entries that a linear layer reads",
            got=f"{group.kind} in {type(site.module).__name__}",
            todo='use value="zero"',
        )


def _add_bias(site: Site) -> None:
    """A bias of zeros, for a constant in place of a unit to go to."""
    weight, first = site.weight_now(), site.gates[0].group
    dimension = site.outputs[0].group.dimension if site.outputs else 1 - first.dimension
    size = weight.shape[dimension] * first.blocks
    assert site.bias is not None  # _require_constants_fit has looked
    site.module._parameters[site.bias] = nn.Parameter(weight.new_zeros(size), requires_grad=False)
