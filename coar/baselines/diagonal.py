"""Derivatives with all gates at one value, between everything ablated (0) and everything kept (1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from coar.attributions import Attributions
from coar.baselines.gate_means import GateMeans, Plan
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import Gates
from coar.settings import whole_number


def attribution_patching(
    experiment: ComponentAblation,
    *,
    gates: float = 1.0,
    output: str | None = None,
    examples: Sequence[int] | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    progress: bool = True,
) -> Attributions:
    """Derivative by every gate with all gates at one value: one pass.

    At 1 that is attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348; Kramar et al., arXiv
    2403.00745) with what ablation puts in a unit's place as the patch: (activation - ablated
    activation) times gradient, behind the unit's own nonlinearity wherever the path exists. With gates
    at 1 - ablation_fraction the derivative is taken at the mean of the masks to be predicted instead of
    at their edge. `gradient_x_parameter` has its gates on the parameters.

    Args:
        experiment: a component ablation whose output has gradients.
        gates: of all components, above 0 and at most 1.
        output: which output; needed where there are several.
        examples: positions of the examples to attribute; default all.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the pass.
        progress: show a bar.

    Returns:
        Attributions in output units; all components kept predict the untouched output (one more forward
        where gates are not at 1).

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
        SettingError: not a component ablation, or gates out of range.

    >>> from coar.testing import linear_experiment
    >>> experiment, truth = linear_experiment()
    >>> found = attribution_patching(experiment, progress=False)
    >>> bool(np.allclose(found.weights, truth, atol=1e-6)), found.provenance["forwards"]
    (True, 3)
    """
    level = _level(gates)
    means = GateMeans(experiment, output, device, batch_size, precision, examples=examples)
    plan = _together([level], len(experiment.components))
    weights, untouched = means.over(plan, 1, "attribution patching", progress)
    more = {"gates": level, "ablation_fraction": round(1 - level, 12) or None, "seed": None}
    if level < 1:
        untouched, more["forwards"] = means.untouched(), 1
    intercept = untouched - weights.sum(axis=1, dtype=np.float64)
    return means.attributions("attribution_patching", weights, intercept, 1, **more)


def integrated_gradients(
    experiment: ComponentAblation,
    steps: int = 20,
    *,
    output: str | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    progress: bool = True,
) -> Attributions:
    """Integrated gradients (Sundararajan et al., arXiv 1703.01365) over all gates together.

    All gates move along the diagonal, from everything ablated to everything kept; the derivative by each
    is averaged with the midpoint rule. Weights sum to the difference of the outputs at both ends, up to
    the error of the rule.

    Args:
        experiment: a component ablation whose output has gradients.
        steps: of the rule, one pass each.
        output: which output; needed where there are several.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes.
        progress: show a bar.

    Returns:
        Attributions in output units; all components kept predict the untouched output (one more
        forward).

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
        SettingError: not a component ablation, or fewer than one step.
    """
    count = whole_number(steps, "steps")
    means = GateMeans(experiment, output, device, batch_size, precision)
    plan = _together([(step + 0.5) / count for step in range(count)], len(experiment.components))
    weights, _ = means.over(plan, count, "integrated gradients", progress)
    intercept = means.untouched() - weights.sum(axis=1, dtype=np.float64)
    more = {"steps": count, "ablation_fraction": None, "seed": None, "forwards": 1}
    return means.attributions("integrated_gradients", weights, intercept, count, **more)


def _together(levels: Sequence[float], num_components: int) -> Plan:
    """All gates at one value in each pass."""

    def plan(examples: np.ndarray) -> Iterator[tuple[Gates, np.ndarray]]:
        shape = (len(examples), num_components)
        everything = np.ones(shape, dtype=bool)
        for level in levels:
            yield Gates(np.full(shape, level, np.float32), everything), everything

    return plan


def _level(gates: float) -> float:
    number = isinstance(gates, int | float | np.number) and not isinstance(gates, bool)
    if not number or not 0 < gates <= 1:
        raise SettingError(
            "gates out of range",
            expected="one number for all of them, above 0 and at most 1",
            got=repr(gates),
            todo="1 for attribution patching, or 1 - ablation_fraction",
        )
    return float(gates)
