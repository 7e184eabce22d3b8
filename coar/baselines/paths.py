"""Path integrals over inputs: what components' activations contribute from a baseline input to the input.

Both methods look at what a component's own layer emits (of heads and other components on the input
side of a layer: at what that layer reads of them), before the normalisation or nonlinearity that
follows. A filter has an activation at every position and a neuron at every token; their papers, and
the COAR paper's use of them, leave open how these become one number. Here they are summed, as the
completeness of conductance asks for.

Points and weights of the rules are those of captum's `LayerConductance` and `InternalInfluence`, so
that their numbers with `n_steps=steps`, summed over positions, are the weights here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.attributions import Attributions
from coar.baselines.cost import cost_of_passes
from coar.baselines.gate_means import untouched_outputs
from coar.baselines.path_passes import PathPasses, Point, Rule
from coar.baselines.straight_line import baseline_record, read_baseline
from coar.experiments.ablation import ComponentAblation
from coar.settings import whole_number

MOST_STEPS = 10_000  # abscissas of the rule are eigenvalues of a matrix of this size


def neuron_conductance(
    experiment: ComponentAblation,
    steps: int = 50,
    *,
    baseline: Any = "zero",
    output: str | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> Attributions:
    """Conductance (Dhamdhere et al., arXiv 1805.12233): integrated gradients that flow through a unit.

    The integral of (derivative of the output by a component's activation) d(activation) while the
    input moves from the baseline to itself, summed over positions: what of output(input) -
    output(baseline) goes through the component. Over a layer that all paths go through, weights sum to
    that difference, up to the error of the rule. The rule takes steps + 1 Gauss-Legendre points, and
    the derivative at each times the change of the activation up to the next: an error of order
    1 / steps.

    Args:
        experiment: a component ablation whose output has gradients; how it ablates does not matter.
        steps: of the rule, one pass each, and a forward.
        baseline: "zero", or numbers that fit (broadcast to) one example's input. Where a model reads
            tokens, the path is of what its `get_input_embeddings()` emits, and so is the baseline.
        output: which output; needed where there are several.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        progress: show a bar.

    Returns:
        Attributions in output units; all components kept predict the untouched output (one more
        forward).

    Raises:
        OutputError: the output has no gradient, does not call the model, or a derivative is not finite.
        SettingError: not a component ablation, fewer than one step, or a baseline that does not fit.
        ComponentError: activations of a component cannot be seen, or not example by example.
        TaskError: tokens, and no module says which embeds them.

    >>> from coar.testing import linear_experiment
    >>> experiment, truth = linear_experiment()
    >>> found = neuron_conductance(experiment, steps=200, progress=False)
    >>> bool(np.allclose(found.weights, truth, atol=1e-3)), found.provenance["forwards"]
    (True, 602)
    """
    fractions = _gauss_legendre(_steps(steps) + 1)[0]

    def rule(at: Callable[[float], Point], num_components: int) -> Tensor:
        now, total = at(fractions[0]), torch.zeros(())
        for fraction in fractions[1:]:
            later = at(fraction)  # both graphs live: the factors of a backward pass are known before it
            total = now.contributions(now.changes(later), num_components).double() + total
            now = later
        return total

    passes = PathPasses(experiment, read_baseline(baseline), output, device, batch_size)
    return _attributions("neuron_conductance", passes, rule, len(fractions) - 1, 1, baseline, progress)


def internal_influence(
    experiment: ComponentAblation,
    steps: int = 50,
    *,
    baseline: Any = "zero",
    output: str | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> Attributions:
    """Internal influence (Leino et al., arXiv 1802.03788): the mean derivative by a component's activation.

    Over the straight path from a baseline to the input, by the Gauss-Legendre rule, summed over
    positions. Derivatives are per unit of the activation: a component that says nothing but whose
    reader listens has influence, and weights of layers of different scale do not compare.

    Args:
        experiment: a component ablation whose output has gradients; how it ablates does not matter.
        steps: points of the rule, one pass each.
        baseline: "zero", or numbers that fit (broadcast to) one example's input. Where a model reads
            tokens, the path is of what its `get_input_embeddings()` emits, and so is the baseline.
        output: which output; needed where there are several.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        progress: show a bar.

    Returns:
        Attributions whose weights are output units per unit of activation; all components kept predict
        the untouched output (one more forward).

    Raises:
        OutputError: the output has no gradient, does not call the model, or a derivative is not finite.
        SettingError: not a component ablation, fewer than one step, or a baseline that does not fit.
        ComponentError: activations of a component cannot be seen, or not example by example.
        TaskError: tokens, and no module says which embeds them.

    >>> from coar.testing import linear_experiment
    >>> found = internal_influence(linear_experiment()[0], steps=3, progress=False)
    >>> np.unique(found.weights).round(6).tolist()     # the output is the sum of all activations
    [1.0]
    """
    fractions, shares = _gauss_legendre(_steps(steps))

    def rule(at: Callable[[float], Point], num_components: int) -> Tensor:
        total = torch.zeros(())
        for fraction, share in zip(fractions, shares, strict=True):
            total = share * at(fraction).contributions(None, num_components).double() + total
        return total

    passes = PathPasses(experiment, read_baseline(baseline), output, device, batch_size)
    return _attributions("internal_influence", passes, rule, len(fractions), 0, baseline, progress)


def _attributions(
    method: str, passes: PathPasses, rule: Rule, steps: int, more: int, baseline: Any, progress: bool
) -> Attributions:
    """Run a rule of some steps and `more` forwards, and say so."""
    weights = passes.over(rule, steps + more, method.replace("_", " "), progress)
    experiment, axis = passes.experiment, passes.axis
    untouched = untouched_outputs(experiment, passes.output, passes.device, passes.asked)
    intercept = untouched - weights.sum(axis=1, dtype=np.float64)
    provenance = {
        "method": method,
        "steps": steps,
        "passes": steps,
        "forwards": cost_of_passes(steps, axis) + more + 1,
        "baseline": baseline_record(read_baseline(baseline)),
        "path": passes.line.moved,
        "precision": "float32",
        "ablation_fraction": None,
        "seed": None,
    }
    axes = experiment.components, axis, passes.output
    return Attributions(weights.astype(np.float32), intercept, *axes, provenance=provenance)


def _steps(steps: int) -> int:
    return whole_number(steps, "steps", most=MOST_STEPS)


def _gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Points in (0, 1) and their shares, which sum to 1."""
    points, shares = np.polynomial.legendre.leggauss(count)
    return ((1 + points) / 2).tolist(), (shares / 2).tolist()
