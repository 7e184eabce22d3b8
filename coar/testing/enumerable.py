"""Weights of experiments with so few components that every keep mask can be run.

What attributions estimate is here a finite sum: for components that are ablated independently with
probability a, the weight of component i is the mean, over masks of the others, of what keeping i adds,

    w_i = sum over k_-i of P(k_-i) [f(k_-i, i kept) - f(k_-i, i ablated)].

The same numbers are the weights of the least squares fit of an affine function to all masks, weighted by
their probability: independent columns are uncorrelated, so w_i = Cov(k_i, f) / Var(k_i). With a = 1/2
they are Banzhaf values.
"""

from __future__ import annotations

import numpy as np

from coar.errors import SettingError
from coar.experiments.base import Experiment

MOST_COMPONENTS = 16  # 65,536 masks


def all_masks(num_components: int) -> np.ndarray:
    """Every keep mask, bool [2 ** components, components], all ablated first, all kept last.

    Raises:
        SettingError: more than 16 components.

    >>> all_masks(2).astype(int).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if not 0 < num_components <= MOST_COMPONENTS:
        raise SettingError(
            "number of components out of range for all masks",
            expected=f"1 to {MOST_COMPONENTS}",
            got=num_components,
            todo="choose fewer components, or draw masks from a design",
        )
    return np.indices((2,) * num_components).reshape(num_components, -1).T.astype(bool)


def mask_probabilities(masks: np.ndarray, ablation_fraction: float) -> np.ndarray:
    """Probability of each mask where components are ablated independently, float64 [rows].

    >>> bool(np.isclose(mask_probabilities(all_masks(5), 0.3).sum(), 1))
    True
    """
    return np.where(masks, 1 - ablation_fraction, ablation_fraction).prod(axis=1)


def exact_weights(outputs: np.ndarray, ablation_fraction: float) -> np.ndarray:
    """Weights by their definition, float64 [columns, components].

    Args:
        outputs: under every mask, in the order of `all_masks`, [2 ** components, columns].
        ablation_fraction: probability that a component is ablated.

    Raises:
        SettingError: the number of rows is no power of two, or that of too many components.

    A conjunction of three components is worth the chance that the other two are there:

    >>> exact_weights(all_masks(3).all(axis=1, keepdims=True), 0.1).round(6).tolist()
    [[0.81, 0.81, 0.81]]
    """
    values = np.asarray(outputs, dtype=np.float64)
    masks = all_masks(len(values).bit_length() - 1)
    if len(masks) != len(values):
        raise SettingError("outputs are not those of all masks", expected="2 ** components", got=len(values))
    weights = []
    for component in range(masks.shape[1]):
        kept = masks[:, component]
        # Both halves list the masks of the others in the same order.
        chance = mask_probabilities(np.delete(masks[kept], component, axis=1), ablation_fraction)
        weights.append(chance @ (values[kept] - values[~kept]))
    return np.stack(weights, axis=1)


def all_outputs(experiment: Experiment, precision: str = "float64") -> dict[str, np.ndarray]:
    """Outputs of an experiment under every mask, in the order of `all_masks`: {output: [rows, columns]}."""
    runner = experiment.prepare(experiment.device, precision=precision)
    found = runner(all_masks(len(experiment.components)))
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}
