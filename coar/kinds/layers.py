"""Components that are units of one layer: filters, neurons, and the published input rows of GPT-2.

A unit is what a layer emits along its channels. In torch, a Linear and a convolution keep one row
of the weight per unit; Hugging Face's Conv1D keeps `(in, out)`, so its units are columns, and a
transposed convolution keeps `(in, out / groups, ...)`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from coar.components import ComponentGroup
from coar.kinds.registry import component_rule

LINEAR = "torch.nn.modules.linear.Linear"
CONV1D = "transformers.pytorch_utils.Conv1D"
MULTIHEAD_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"


def bias_of(module: nn.Module, name: str = "bias") -> str | None:
    """Name of a module's bias, or None where it has none."""
    return name if module._parameters.get(name) is not None else None


def join(name: str, path: str) -> str:
    """Name of a module in a module: the model itself has no name."""
    return f"{name}.{path}".strip(".")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is Hugging Face's Conv1D, which keeps `(in, out)`."""
    return any(f"{base.__module__}.{base.__qualname__}" == CONV1D for base in type(module).__mro__)


def input_size(module: nn.Module) -> int | None:
    """How many entries a Linear or a Hugging Face Conv1D reads; None for other layers."""
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return None
    weight: Any = module.weight
    return int(weight.shape[0 if is_conv1d(module) else 1])


def output_size(module: nn.Module) -> int:
    """How many units a Linear or a Hugging Face Conv1D emits."""
    weight: Any = module.weight
    return int(weight.shape[1 if is_conv1d(module) else 0])


def input_entries(
    name: str, kind: str, path: str, module: nn.Module, count: int, width: int, scope: tuple[str, ...]
) -> ComponentGroup:
    """A group that cuts what a Linear or a Conv1D reads; `path` is that layer's name."""
    dimension = 0 if is_conv1d(module) else 1
    return ComponentGroup(name, kind, path, "weight", dimension, count, width, side="input", scope=scope)


def output_units(name: str, kind: str, module: nn.Module) -> ComponentGroup:
    """A group with one component per unit of a Linear or a Conv1D."""
    return conv1d_units(name, kind, module) if is_conv1d(module) else units(name, kind, module)


def units(
    name: str, kind: str, module: nn.Module, parameter: str = "weight", **fields: Any
) -> ComponentGroup:
    """A group with one component per row of a parameter (its bias is found, too)."""
    size = len(getattr(module, parameter))
    return ComponentGroup(name, kind, name, parameter, 0, size, bias=bias_of(module), **fields)


@component_rule(
    "conv_filter",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
)
def _conv_filters(name: str, module: nn.Module) -> list[ComponentGroup]:
    return [units(name, "conv_filter", module)]


@component_rule(
    "conv_filter",
    "torch.nn.modules.conv.ConvTranspose1d",
    "torch.nn.modules.conv.ConvTranspose2d",
    "torch.nn.modules.conv.ConvTranspose3d",
)
def _transposed_filters(name: str, module: Any) -> list[ComponentGroup]:
    bias, count = bias_of(module), int(module.out_channels)
    return [ComponentGroup(name, "conv_filter", name, "weight", 1, count, bias=bias, blocks=module.groups)]


@component_rule("neuron", LINEAR)
def _linear_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    return [units(name, "neuron", module)]


@component_rule("neuron", CONV1D)
def _conv1d_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    return [conv1d_units(name, "neuron", module)]


def conv1d_units(name: str, kind: str, module: nn.Module) -> ComponentGroup:
    """A group with one component per output unit of a Hugging Face Conv1D: a column of its weight."""
    weight: Any = module.weight
    return ComponentGroup(name, kind, name, "weight", 1, int(weight.shape[1]), bias=bias_of(module))


@component_rule("neuron", MULTIHEAD_ATTENTION)
def _projection_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    return in_projection_units(name, "neuron", module)


def in_projection_units(name: str, kind: str, module: nn.Module) -> list[ComponentGroup]:
    """Rows of the fused query, key and value projection inside torch's MultiheadAttention.

    They are a parameter of the attention module itself, not of a Linear in it. Where keys and values
    have widths of their own, the three weights are not fused and share one bias: not cut.
    """
    weight = module._parameters.get("in_proj_weight")
    if weight is None:
        return []
    bias = bias_of(module, "in_proj_bias")
    label = f"{name}.in_proj".lstrip(".")
    return [ComponentGroup(label, kind, name, "in_proj_weight", 0, len(weight), bias=bias)]


@component_rule("conv1d_input_row", CONV1D)
def _conv1d_input_rows(name: str, module: nn.Module) -> list[ComponentGroup]:
    """The published GPT-2 components: rows of `(in, out)` weights, which are what a layer reads."""
    weight: Any = module.weight
    return [ComponentGroup(name, "conv1d_input_row", name, "weight", 0, int(weight.shape[0]), side="input")]
