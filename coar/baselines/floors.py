"""Floors: attributions that know nothing of the outputs. What scores no better has found nothing.

Neither runs the model on a mask, so their intercepts are 0: predictions are right in order at best, and
only correlations say something of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coar.attributions import Attributions
from coar.baselines.gate_means import require_ablation
from coar.baselines.parameters import component_rows
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.randomness import check_seed, uniform
from coar.rows import require_output

STREAM = "random attributions"


def random_attributions(experiment: Experiment, seed: int = 0, *, output: str | None = None) -> Attributions:
    """Standard normal weights: held-out correlation 0 but for chance.

    Args:
        experiment: any.
        seed: a column's weights depend on it and on the column's number alone.
        output: which output; needed where there are several.

    Returns:
        Attributions with intercept 0.

    Raises:
        SettingError: the seed is no whole number, or there are several outputs and none is named.

    >>> from coar.testing import linear_experiment
    >>> found = random_attributions(linear_experiment()[0], seed=3)
    >>> found.weights.shape, found.provenance["forwards"]
    ((10, 12), 0)
    """
    check_seed(seed)
    name = require_output(output, list(experiment.columns))
    components, columns = experiment.components, experiment.columns[name]
    weights = np.empty((len(columns), len(components)), np.float32)
    for column in range(len(columns)):
        weights[column] = _normal(seed, column, len(components))
    provenance = {"method": "random_attributions", "forwards": 0, "ablation_fraction": None, "seed": seed}
    return Attributions(weights, np.zeros(len(columns)), components, columns, name, provenance=provenance)


def weight_norm(experiment: ComponentAblation, *, output: str | None = None) -> Attributions:
    """Euclidean norm of a component's weights, the same for every column: what pruning by magnitude keeps.

    Of a unit on the output side of a layer (a filter, a neuron) the weights that make it, of one on the
    input side (a head, an MLP's hidden unit) those that read it; without biases. Positive: keeping
    raises the output, as it does for margins more often than not.

    Args:
        experiment: a component ablation; how it ablates does not matter.
        output: which output; needed where there are several.

    Returns:
        Attributions with intercept 0.

    Raises:
        SettingError: not a component ablation, or there are several outputs and none is named.

    >>> from coar.testing import linear_experiment
    >>> experiment, _ = linear_experiment()
    >>> norms = experiment.task.model.hidden.weight.norm(dim=1)
    >>> bool(np.allclose(weight_norm(experiment).weights, norms.tolist()))
    True
    """
    require_ablation(experiment, "norms of weights").require_unchanged()
    name = require_output(output, list(experiment.task.outputs))
    norms = np.zeros(len(experiment.components), np.float32)
    modules = dict(experiment.task.model.named_modules(remove_duplicate=False))
    for group, flat in experiment.component_set.slices():
        weight = modules[group.module]._parameters[group.parameter]
        assert isinstance(weight, Tensor)  # components fit their model
        rows = component_rows(weight.detach(), group, group.dimension)
        norms[flat] = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    columns = experiment.columns[name]
    weights = np.repeat(norms[None], len(columns), axis=0)
    axes = experiment.components, columns, name
    provenance = {"method": "weight_norm", "forwards": 0, "ablation_fraction": None, "seed": None}
    return Attributions(weights, np.zeros(len(columns)), *axes, provenance=provenance)


def _normal(seed: int, column: int, count: int) -> np.ndarray:
    """Box and Muller's pairs, one of each: [count]."""
    radius, angle = uniform(seed, STREAM, column, 2 * count).reshape(2, count)
    return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
