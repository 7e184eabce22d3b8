"""Plain means of derivatives under the gate law of gate gradients: no mixing, no pooling, no errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from coar.attributions import Attributions
from coar.baselines.gate_means import GateMeans, Plan, require_ablation
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import GateDraws, Gates
from coar.gradients.layout import REPLICATES
from coar.settings import whole_number

Counted = Callable[[Gates], np.ndarray]


def kept_mean(
    experiment: ComponentAblation,
    ablation_fraction: float,
    passes: int,
    seed: int = 0,
    *,
    output: str | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    progress: bool = True,
) -> Attributions:
    """Mean derivative by a gate where its component is kept, others being partly away.

    The quieter one of the two means that `coar.gradients.gate_gradients` mixes: at the kept end of each
    gate's path instead of along it, under the same draws of all other gates.

    Args:
        experiment: a component ablation whose output has gradients.
        ablation_fraction: of the ablations to predict.
        passes: forward and backward passes over the examples, rounded up to whole rounds.
        seed: of the gates; they are those of gate gradients with as many passes.
        output: which output; needed where there are several.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes.
        progress: show a bar.

    Returns:
        Attributions in output units; the mean of all masks predicts the mean output over passes.

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
        SettingError: not a component ablation, fraction or passes out of range, or a component that is
            never kept in so few passes.
    """
    draws, rounds = _drawn(experiment, ablation_fraction, passes, seed)
    means = GateMeans(experiment, output, device, batch_size, precision)
    return _sampled(means, "kept_mean", _kept, draws, rounds, progress)


def uniform_gradient_sampling(
    experiment: ComponentAblation,
    ablation_fraction: float,
    passes: int,
    seed: int = 0,
    *,
    output: str | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    progress: bool = True,
) -> Attributions:
    """Plain mean of derivatives over passes in which a component's gate is uniform on (0, 1).

    The estimator of uniform gradient sampling (Li and Janson, arXiv 2409.09951) as weights: gates at the
    layers, before the nonlinearity, and nothing mixed. Unlike there, probes are balanced (each component
    is one exactly once a round) and their gates spread evenly, as gate gradients have it: what is left
    between the two is placement and mixing.

    Args:
        experiment: a component ablation whose output has gradients.
        ablation_fraction: of the ablations to predict.
        passes: forward and backward passes over the examples, rounded up to whole rounds.
        seed: of the gates; they are those of gate gradients with as many passes.
        output: which output; needed where there are several.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes.
        progress: show a bar.

    Returns:
        Attributions in output units; the mean of all masks predicts the mean output over passes.

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
        SettingError: not a component ablation, or fraction or passes out of range.
    """
    draws, rounds = _drawn(experiment, ablation_fraction, passes, seed)
    means = GateMeans(experiment, output, device, batch_size, precision, placed=False)
    return _sampled(means, "uniform_gradient_sampling", _probes, draws, rounds, progress)


def _probes(gates: Gates) -> np.ndarray:
    return gates.probes


def _kept(gates: Gates) -> np.ndarray:
    return ~gates.probes & (gates.gates == 1)


def _drawn(
    experiment: ComponentAblation, ablation_fraction: float, passes: int, seed: int
) -> tuple[GateDraws, int]:
    """The draws, and how many rounds of them; refuses settings before the model is prepared."""
    draws = GateDraws(ablation_fraction, seed, len(require_ablation(experiment).components))
    return draws, -(-whole_number(passes, "passes") // draws.passes_per_round)


def _sampled(
    means: GateMeans, method: str, counted: Counted, draws: GateDraws, rounds: int, progress: bool
) -> Attributions:
    """Weights, and an intercept such that masks predict on average what passes gave on average."""
    count = rounds * draws.passes_per_round
    plan = _rounds(draws, rounds, counted)
    weights, outputs = means.over(plan, count, method.replace("_", " "), progress)
    intercept = outputs - (1 - draws.ablation_fraction) * weights.sum(axis=1, dtype=np.float64)
    more = {"ablation_fraction": draws.ablation_fraction, "seed": draws.seed}
    return means.attributions(method, weights, intercept, count, **more)


def _rounds(draws: GateDraws, rounds: int, counted: Counted) -> Plan:
    """Round after round from the replicates in turn: with as many passes, the gates of gate gradients."""

    def plan(examples: np.ndarray) -> Iterator[tuple[Gates, np.ndarray]]:
        for number in range(rounds):
            for gates in draws.round(number % REPLICATES, number // REPLICATES, examples):
                yield gates, counted(gates)

    return plan
