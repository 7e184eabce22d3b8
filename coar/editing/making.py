"""make_edit: from examples to a finished, judged edit in one call; only a few examples are attributed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from coar.attributions import Attributions
from coar.editing.alternatives import Method, RankingOptions, Score, rankings
from coar.editing.columns import positions_of
from coar.editing.curve import Curve
from coar.editing.edit import Edit
from coar.editing.effect import Effect
from coar.editing.parts import EditParts, LocatedParts
from coar.editing.protection import Protect
from coar.editing.ranked import Direction
from coar.editing.result import EditResult
from coar.editing.sweep import Ranking
from coar.errors import CoarWarning, EditError, GuardError
from coar.experiments.base import Experiment
from coar.rows import require_output

SIZES = (1, 2, 4, 8, 12, 16, 20, 30)


def make_edit(
    experiment: Experiment,
    parts: EditParts,
    direction: Direction = "raise",
    *,
    method: Method | Attributions = "gate_gradients",
    output: str | None = None,
    score: Score = "welch",
    ablation_fraction: float = 0.05,
    passes: int = 60,
    seed: int = 0,
    sizes: Sequence[int] | None = None,
    max_accuracy_drop: float = 0.005,
    max_output_drop: float | None = None,
    max_size: int | None = None,
    protect: Protect | None = None,
    protect_components: Sequence[str] = (),
    progress: bool = False,
) -> EditResult:
    """Attribute targets and references, rank components, sweep sizes, choose one, judge it.

    COAR-Edit (Shah, Ilyas, Madry 2024, section 5) needs attributions of the targets and references only:
    by gate gradients that is seconds.

    Args:
        experiment: whose model is to be edited; it stays as it is.
        parts: which examples play which part; see `draw_parts`.
        direction: of the targets' outputs: "raise" (fix) or "lower" (forget).
        method: what ranks components: "gate_gradients", attributions made elsewhere, or an alternative:
            "derivative" (at gate 1: one pass), "weight_norm" (largest first), "random" (by `seed`).
        output: which output; needed where there are several.
        score: "welch", "difference", "contrast", "cautious" (see `rank_components`), or "best": all of them
            are swept, and what chooses sizes chooses.
        ablation_fraction: of gate gradients.
        passes: of gate gradients.
        seed: of gate gradients, or of the random order.
        sizes: numbers of components to try; default 1, 2, 4, 8, 12, 16, 20, 30, or as many as there are.
        max_accuracy_drop: on the holdout, as a fraction (0.005 is half a point).
        max_output_drop: of the holdout's mean output; needed where its sign says nothing.
        max_size: at most so many components.
        protect: subpopulations for which the guard holds as well; see `Curve.choose`.
        protect_components: patterns of components that are never ablated; see `rank_components`.
        progress: show bars.

    Raises:
        GuardError: no size moves the targets within the guard; says the best that could be done.
        EditError: parts that overlap, an unknown method, sizes out of range.
        AxisError: attributions of another model.

    >>> from coar.testing import linear_experiment
    >>> experiment, _ = linear_experiment()
    >>> parts = EditParts(targets=[0], references=[1, 2, 3], holdout=[4, 5, 6], report=[7, 8, 9])
    >>> found = make_edit(experiment, parts, sizes=[1, 2, 3], max_output_drop=1.0, passes=8)
    >>> bool(found.targets.after > found.targets.before), len(found.edit.names) <= 3
    (True, True)
    """
    start = time.perf_counter()
    _require_arguments(experiment, parts, direction)
    name = require_output(output, list(experiment.columns))
    located = parts.located(experiment.columns[name])
    options = RankingOptions(method, score, ablation_fraction, passes, seed, protect_components)
    guards: dict[str, Any] = {
        "max_accuracy_drop": max_accuracy_drop,
        "max_output_drop": max_output_drop,
        "max_size": max_size,
    }
    candidates: list[tuple[tuple[float, ...], Curve, Edit]] = []
    refused: GuardError | None = None
    for ranking in rankings(experiment, located, direction, name, options, progress):
        curve = _swept(ranking, experiment, located, sizes, protect, progress)
        try:
            edit = curve.choose(**guards)
        except GuardError as error:
            refused = refused or error
            continue
        candidates.append((_merit(curve, edit), curve, edit))
    if not candidates:
        assert refused is not None  # there is at least one ranking
        raise refused
    _warn_if_done(candidates[0][1])
    _, curve, edit = max(candidates, key=lambda candidate: candidate[0])
    return judged(curve, edit, located, time.perf_counter() - start)


def _require_arguments(experiment: Any, parts: Any, direction: Any) -> None:
    """What is easily mistaken, before anything takes time."""
    if not hasattr(experiment, "columns"):
        raise EditError(
            "the first argument is an experiment",
            expected="coar.ComponentAblation(task, components)",
            got=type(experiment).__name__,
        )
    if not isinstance(parts, EditParts):
        raise EditError(
            "the second argument says which example plays which part",
            expected="coar.EditParts, or what coar.draw_parts(task, ...) returns",
            got=type(parts).__name__,
        )
    if direction not in get_args(Direction):
        raise EditError(
            "unknown direction of the targets' outputs", expected="raise or lower", got=repr(direction)
        )


def _warn_if_done(curve: Curve) -> None:
    outputs, raised = curve.outputs[0, curve.targets], curve.ranking.direction == "raise"
    if curve.has_accuracy and ((outputs > 0) == raised).all():
        warnings.warn(
            f"all targets are {'right' if raised else 'wrong'} without any edit: is the direction "
            f"{curve.ranking.direction!r} meant?",
            CoarWarning,
            stacklevel=3,
        )


def judged(curve: Curve, edit: Edit, parts: LocatedParts, seconds: float) -> EditResult:
    """The result of an edit of this curve: effects are read off the sweep, which ran all columns."""
    step = curve.sizes.index(len(edit.names))
    target_report = None if parts.target_report is None else _effect(curve, edit, step, parts.target_report)
    return EditResult(
        edit,
        curve,
        _effect(curve, edit, step, curve.targets),
        _effect(curve, edit, step, parts.report),
        target_report,
        seconds,
    )


def _swept(
    ranking: Ranking,
    experiment: Experiment,
    parts: LocatedParts,
    sizes: Sequence[int] | None,
    protect: Protect | None,
    progress: bool,
) -> Curve:
    axis = experiment.columns[ranking.attributions.output]

    def named(part: Any) -> list[str]:  # a position would be one of the attributions' columns
        return [axis.names[i] for i in part]

    return ranking.sweep(
        experiment,
        [size for size in SIZES if size <= len(ranking.order)] if sizes is None else sizes,
        named(parts.holdout),
        target_holdout=None if parts.target_holdout is None else named(parts.target_holdout),
        protect=protect,
        progress=progress,
    )


def _merit(curve: Curve, edit: Edit) -> tuple[float, ...]:
    """More is better: targets on the wanted side of 0, fewer components, change of the mean output."""
    effects, step = curve.effects(), curve.sizes.index(len(edit.names))
    done, gain = float(effects.done[step]), float(effects.gain[step])
    return (
        (done, -len(edit.names), gain) if done > effects.done[0] else (float(effects.done[0]), -np.inf, gain)
    )


def _effect(curve: Curve, edit: Edit, step: int, columns: Any) -> Effect:
    """Outputs of some of the experiment's columns, from the sweep."""
    before, after = curve.outputs[0, columns], curve.outputs[step, columns]
    ours = curve.ranking.attributions
    names = [curve.experiment.columns[ours.output].names[i] for i in columns]
    predictable = edit.provenance["target_output_predicted"] is not None
    if not predictable or not all(name in ours.columns.positions for name in names):
        return Effect(before, after)
    where = positions_of(ours.columns, names, "columns")
    return Effect(before, after, before + edit.predicted(ours, where))
