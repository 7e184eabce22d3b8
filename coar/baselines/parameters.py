"""gradient_x_parameter: the derivative by a gate on a component's parameters themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.attributions import Attributions
from coar.baselines.cost import cost_of_passes
from coar.components import ComponentGroup
from coar.errors import OutputError, SettingError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import move
from coar.experiments.reading import per_example
from coar.progress import progress_bar
from coar.rows import require_output


def gradient_x_parameter(
    experiment: ComponentAblation, *, output: str | None = None, progress: bool = True
) -> Attributions:
    """Sum over a component's parameters of gradient times parameter, per column.

    Equals the derivative at g = 1 of a gate g that scales those parameters: the weights, and with
    `bias="ablate"` the biases too. One backward pass per column, by plain autograd.

    Not the same as `attribution_patching`, whose gate acts behind the unit's own nonlinearity. Along
    the gate here that nonlinearity bends the path, and this is the slope at its kept end: 0 for a unit
    that is saturated (a tanh far out, a ReLU that is off), whatever its ablation would change. There
    the unit itself moves on a straight line, and only what comes after is taken to first order.

    Raises:
        OutputError: the output has no gradient.
        SettingError: the experiment replaces units by a constant, which no scaled parameter does.
    """
    if experiment.value != "zero":
        raise SettingError(
            "gradient x parameter is the derivative of a gate that scales to zero",
            expected='an experiment with value="zero"',
            got=f"value={experiment.value}",
            todo="use leave_one_out",
        )
    experiment.require_unchanged()
    name = require_output(output, list(experiment.columns))
    task, columns = experiment.task, experiment.columns[name]
    # In float32 like the rows of a study, and like the batches.
    model = copy.deepcopy(task.model).to(experiment.device, torch.float32).requires_grad_(False)
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = experiment.component_set.groups
    parameters = [
        p for group in groups for p in _gated_parameters(modules[group.module], group, experiment.bias)
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    # One array from the start: on ImageNet these are the largest numbers there are.
    weights = np.empty((len(columns), len(experiment.components)), np.float32)
    untouched: list[float] = []
    with progress_bar(len(columns), "gradient x parameter", progress) as bar, torch.enable_grad():
        for example in range(len(task)):
            batch = move(task.batch([example]), experiment.device)
            values, _ = per_example(task.outputs[name](model, batch), 1, name)
            _require_gradient(values, name)
            for position, value in enumerate(values):
                found = torch.autograd.grad(
                    value, parameters, allow_unused=True, retain_graph=position + 1 < len(values)
                )
                gradients: dict[nn.Parameter, Tensor | None] = dict(zip(parameters, found, strict=True))
                weights[len(untouched) + position] = _per_component(experiment, modules, gradients)
            untouched.extend(values.detach().cpu().tolist())
            bar.update(len(values))
    intercept = np.array(untouched) - weights.sum(axis=1, dtype=np.float64)
    provenance = {
        "method": "gradient_x_parameter",
        "backward_passes": len(columns),
        "passes": 1,
        "forwards": cost_of_passes(1, columns),
    }
    return Attributions(weights, intercept, experiment.components, columns, name, provenance=provenance)


def _gated_parameters(module: nn.Module, group: ComponentGroup, bias: str) -> list[nn.Parameter]:
    names = [group.parameter]
    if group.bias and (bias == "ablate" or group.whole):
        names.append(group.bias)
    return [parameter for name in names if (parameter := module._parameters[name]) is not None]


def _per_component(
    experiment: ComponentAblation, modules: dict[str, nn.Module], gradients: dict[nn.Parameter, Tensor | None]
) -> np.ndarray:
    """Sum gradient x parameter over each component's slice, float64 [components]."""
    sums = np.zeros(len(experiment.component_set))
    for group, flat in experiment.component_set.slices():
        parameters = _gated_parameters(modules[group.module], group, experiment.bias)
        for dimension, parameter in zip((group.dimension, 0), parameters, strict=False):
            gradient = gradients[parameter]
            if gradient is not None:
                product = (gradient * parameter.detach()).double()
                sums[flat] += component_rows(product, group, dimension).sum(dim=1).cpu().numpy()
    return sums


def component_rows(values: Tensor, group: ComponentGroup, dimension: int) -> Tensor:
    """Numbers in the shape of a group's weight or bias, a component's in each row: [count, numbers]."""
    if values.ndim > 1 and group.blocks > 1:  # units are columns of their block's rows
        values = values.unflatten(0, (group.blocks, -1)).movedim(1, -1).flatten(0, 1)
        dimension = 0
    return values.movedim(dimension, 0)[group.offset : group.stop].reshape(group.count, -1)


def _require_gradient(values: Any, name: str) -> None:
    if not values.requires_grad:
        raise OutputError(
            f"output {name!r} has no gradient",
            expected="a differentiable function of the model's parameters",
            got="a constant (argmax, accuracy, rounding, or a forward pass under no_grad)",
            todo="use leave_one_out or a regression on random ablations instead",
        )
