"""Alternatives: other ways of putting components in order, to hold an edit against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from coar.attributions import Attributions
from coar.baselines import attribution_patching, random_attributions, weight_norm
from coar.editing.parts import LocatedParts
from coar.editing.protection import protected_components
from coar.editing.ranked import SCORES, Direction
from coar.editing.ranking import rank_components
from coar.editing.sweep import Ranking
from coar.errors import EditError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.gradients import gate_gradients
from coar.randomness import permutation

Method = Literal["gate_gradients", "derivative", "weight_norm", "random"]
Score = Literal["welch", "difference", "contrast", "cautious", "best"]


@dataclass(frozen=True)
class RankingOptions:
    """How components are put in order; see `coar.editing.make_edit`."""

    method: Method | Attributions = "gate_gradients"
    score: Score = "welch"
    ablation_fraction: float = 0.05
    passes: int = 60
    seed: int = 0
    protect_components: Sequence[str] = ()


def rankings(
    experiment: Experiment,
    parts: LocatedParts,
    direction: Direction,
    output: str,
    options: RankingOptions,
    progress: bool = False,
) -> Iterator[Ranking]:
    """Rankings of one method: one, or with score="best" one per score.

    Args:
        experiment: whose components.
        parts: located on the experiment's columns of the output.
        direction: of the targets' outputs.
        output: which output.
        options: the method and its settings.
        progress: show a bar.

    Raises:
        EditError: an unknown method or score.
    """
    method = options.method
    if not isinstance(method, Attributions) and method not in get_args(Method):
        raise EditError(
            "unknown method of an edit",
            expected=f"{', '.join(get_args(Method))}, or Attributions",
            got=repr(method)[:80],
        )
    if options.score not in get_args(Score):
        raise EditError("unknown score", expected=", ".join(get_args(Score)), got=repr(options.score))
    if isinstance(method, str) and method in ("weight_norm", "random"):
        yield _blind(experiment, parts, direction, output, options)
        return
    attributions = _attributed(experiment, parts, output, options, progress)
    names = experiment.columns[output].names
    targets, references = ([names[i] for i in part] for part in (parts.targets, parts.references))
    single = len(targets) == len(references) == 1
    scores = {"best": SCORES[1:] if single else SCORES}
    for score in scores.get(options.score, (options.score,)):
        yield rank_components(
            attributions,
            targets,
            references,
            direction,
            score,  # type: ignore[arg-type]  # checked above
            options.protect_components,
        )


def _attributed(
    experiment: Experiment, parts: LocatedParts, output: str, options: RankingOptions, progress: bool
) -> Attributions:
    """Attributions of targets and references, or those that were given."""
    if isinstance(options.method, Attributions):
        options.method.components.require_same(experiment.components, "attributions", "experiment")
        if options.method.output != output:
            raise EditError(
                "the attributions are of another output", expected=output, got=options.method.output
            )
        return options.method
    if not isinstance(experiment, ComponentAblation):
        raise EditError(
            f"{options.method} needs a component ablation",
            expected="coar.ComponentAblation, or Attributions as method=",
            got=type(experiment).__name__,
        )
    owner = experiment.columns[output].fields["example"]
    wanted = np.concatenate([parts.targets, parts.references])
    examples = sorted({int(owner[i]) for i in wanted})
    how: dict[str, Any] = {"output": output, "examples": examples, "progress": progress}
    with torch.enable_grad():  # also where the caller has switched gradients off
        if options.method == "derivative":
            return attribution_patching(experiment, **how)
        fraction, passes = options.ablation_fraction, options.passes
        return gate_gradients(experiment, fraction, passes=passes, seed=options.seed, **how)


def _blind(
    experiment: Experiment, parts: LocatedParts, direction: Direction, output: str, options: RankingOptions
) -> Ranking:
    """Components in an order that knows nothing of targets: at random, or the largest weights first."""
    count = len(experiment.components)
    if options.method == "random":
        attributions = random_attributions(experiment, options.seed, output=output)
        order = permutation(options.seed, "random edit", 0, count)
        scores = np.empty(count)
        scores[order] = np.arange(count)
    else:
        attributions = weight_norm(experiment, output=output)  # type: ignore[arg-type]  # checked there
        scores = -attributions.rows([0])[0].astype(np.float64)
        order = np.argsort(scores, kind="stable")
    protected = protected_components(experiment.components, options.protect_components)
    return Ranking(
        order[~protected[order]],
        scores,
        parts.targets,
        parts.references,
        attributions,
        direction,
        str(options.method),
        tuple(options.protect_components),
    )
