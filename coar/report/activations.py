"""How strongly each example activates each component."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from coar.components import ComponentSet
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import move
from coar.experiments.private_model import DTYPES, PrivateModel
from coar.gates import Means, measure_means
from coar.progress import progress_bar

PRECISION = "float32"


def measure_activations(experiment: ComponentAblation, progress: bool = True) -> np.ndarray:
    """Mean over positions of what each component emits, for each example by itself.

    Of a convolution filter with BatchNorm behind it, what that makes of the filter's output (before any
    nonlinearity), so that more means more whatever the sign of its scale; as it is where `ComponentAblation`
    could not fold the BatchNorm. Components that are entries
    of a layer's input (heads, neurons read by a projection) count by what is read. One of several
    entries, such as a head, has no one sign: root mean square of its entries' means.

    Args:
        experiment: whose components and examples.
        progress: show a bar.

    Returns:
        float32 [examples, components].

    Raises:
        SettingError: not a component ablation.
        ComponentError: an example for which a component's layer is never called.
    """
    if not isinstance(experiment, ComponentAblation):
        raise SettingError(
            "only components of a model have activations",
            expected="ComponentAblation",
            got=type(experiment).__name__,
        )
    task, components, device = experiment.task, experiment.component_set, experiment.device
    private = PrivateModel(task, (components, "keep", "zero", None), device, PRECISION)
    components = _with_biases(components, private.model)
    found = np.empty((len(task), len(components)), dtype=np.float32)

    def run(model: nn.Module, batch: Any) -> None:
        for function in task.outputs.values():
            function(model, batch)

    with progress_bar(len(task), "activations", progress) as bar:
        for example in range(len(task)):  # alone: layers may mix examples with positions, in any order
            batch = move(task.batch([example]), device, DTYPES[PRECISION], private.channels_last)
            found[example] = _per_component(
                components, measure_means(private.model, components, [batch], run)
            )
            bar.update(1)
    return found


def _with_biases(components: ComponentSet, model: nn.Module) -> ComponentSet:
    """The same components of a copy whose layers got biases where BatchNorm was folded into them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = [
        replace(group, bias="bias")
        if group.side == "output"
        and not group.bias
        and modules[group.module]._parameters.get("bias") is not None
        else group
        for group in components
    ]
    return ComponentSet(groups, overlap=components.overlap)


def _per_component(components: ComponentSet, means: Means) -> np.ndarray:
    parts = []
    for group in components:
        own = means[group.name].reshape(group.count, group.width)
        parts.append(own[:, 0] if group.width == 1 else np.sqrt((own**2).mean(axis=1)))
    return np.concatenate(parts)
