"""Literal rebuilds: a model with one component removed by hand, to compare gates with.

Slow and obvious on purpose: one slice after the other, written without the code that it is to test.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from coar.components import ComponentGroup
from coar.gates import Bias, Value


def zeroed(model: nn.Module, group: ComponentGroup, number: int) -> nn.Module:
    """Literal rebuild: a deep copy with one component's slice of the parameter set to zero."""
    return replaced(model, group, number, "keep", "zero")


def replaced(model: nn.Module, group: ComponentGroup, number: int, bias: Bias, value: Value) -> nn.Module:
    """Literal rebuild of a model with one component removed or replaced by a constant."""
    rebuilt = copy.deepcopy(model)
    module = rebuilt.get_submodule(group.module)
    parameter = module._parameters[group.parameter]
    assert parameter is not None
    entries = entries_of(group, number)
    constant = 0.0 if value in ("zero", "mean") else float(value)
    biases = module._parameters.get(group.bias or group.parameter.replace("weight", "bias"))
    if constant and biases is None:
        name = group.bias or group.parameter.replace("weight", "bias")
        biases = nn.Parameter(parameter.new_zeros(_outputs(parameter, group)))
        module._parameters[name] = biases
    with torch.no_grad():
        if group.side == "input" and constant and biases is not None:
            for entry in entries:
                biases.add_(parameter.select(group.dimension, entry), alpha=constant)
        for entry in entries:
            numbers_of(parameter, group, entry).zero_()
        with_bias = bias == "ablate" or group.whole or value != "zero"
        if group.side == "output" and biases is not None and with_bias:
            biases[list(entries)] = constant
    return rebuilt


def _outputs(parameter: Tensor, group: ComponentGroup) -> int:
    """How many units the layer has."""
    dimension = group.dimension if group.side == "output" else 1 - group.dimension
    return parameter.shape[dimension] * group.blocks


def entries_of(group: ComponentGroup, number: int) -> range:
    """Positions of one component's entries along the gated dimension."""
    start = group.offset + number * group.width
    return range(start, start + group.width)


def numbers_of(parameter: Tensor, group: ComponentGroup, entry: int) -> Tensor:
    """The numbers of one entry of a group, as a view."""
    if group.blocks == 1:
        return parameter.select(group.dimension, entry)
    columns, rows = parameter.shape[group.dimension], len(parameter) // group.blocks
    block, column = divmod(entry, columns)
    return parameter[block * rows : (block + 1) * rows].select(group.dimension, column)
