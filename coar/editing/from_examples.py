"""edit_examples: from examples to a finished, judged edit in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.editing.columns import Columns, positions_of
from coar.editing.making import make_edit
from coar.editing.parts import EditParts
from coar.editing.protection import Protect, protected_components, protected_groups
from coar.editing.ranked import Direction
from coar.editing.ranking import rank_components
from coar.editing.result import EditResult
from coar.errors import EditError, GuardError
from coar.experiments.base import Experiment
from coar.randomness import permutation

SIZES = (1, 2, 3, 4, 6, 8, 12)
NUM_REFERENCES = 50


def edit_examples(
    experiment: Experiment,
    attributions: Attributions,
    targets: Columns,
    direction: Direction = "raise",
    *,
    max_accuracy_drop: float = 0.01,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    protect: Protect | None = None,
    protect_components: Sequence[str] = (),
    progress: bool = False,
) -> EditResult:
    """Rank, sweep, choose and judge, on disjoint examples.

    Fifty examples that the model gets right are the references; of all others, half choose the size
    and half are reported on. The split depends on `seed` alone.

    Args:
        experiment: the one that the attributions are of.
        attributions: of a margin.
        targets: columns whose outputs are to change, by position or name.
        direction: "raise" (fix) or "lower" (forget).
        max_accuracy_drop: on the half that chooses.
        sizes: numbers of components to try; default up to 12, or as many as there are.
        seed: of the split.
        protect: subpopulations for which the guard holds as well; see `Curve.choose`.
        protect_components: patterns of components that are never ablated; see `rank_components`.
        progress: show a bar.

    Raises:
        EditError: no size moves the targets to the wanted side of 0 within the guard.
    """
    output = attributions.output
    attributions.components.require_same(experiment.components, "attributions", "experiment")
    chosen = positions_of(attributions.columns, targets, "targets")
    where, untouched = _untouched(experiment, attributions)
    done = untouched[chosen] > 0 if direction == "raise" else untouched[chosen] <= 0
    if done.all():
        raise EditError(
            "there is nothing to edit: the targets are on the wanted side of 0 already",
            expected=f"a target whose {output} is {'below' if direction == 'raise' else 'above'} 0",
            got=f"{output} {untouched[chosen].mean():+.2f}",
            todo="choose another target, or the other direction",
        )
    references, holdout, report = (
        where[part] for part in _split(attributions.columns, untouched, chosen, seed)
    )
    parts = EditParts(where[chosen], references, holdout, report)
    most = int((~protected_components(attributions.components, protect_components)).sum())
    found = make_edit(
        experiment,
        parts,
        direction,
        method=attributions,
        output=output,
        sizes=[size for size in SIZES if size <= most] if sizes is None else sizes,
        max_accuracy_drop=max_accuracy_drop,
        protect=protect,
        protect_components=protect_components,
        progress=progress,
    )
    effect = found.targets
    if _done(effect.after, direction) <= _done(effect.before, direction):
        groups = f", also of {', '.join(found.curve.groups)}" if found.curve.groups else ""
        raise GuardError(
            "no size of this edit moves a target across 0 within the guard; nothing was applied",
            expected=f"holdout accuracy down by at most {max_accuracy_drop:.2%}{groups}",
            got=f"target margin {effect.before.mean():+.2f} before, {effect.after.mean():+.2f} after at best",
            todo="allow a larger drop, or use attributions from more rows",
        )
    return found


def edit_misread(
    experiment: Experiment,
    attributions: Attributions,
    *,
    max_accuracy_drop: float = 0.01,
    protect: Protect | None = None,
    protect_components: Sequence[str] = (),
) -> Iterator[tuple[int, float, EditResult | None]]:
    """Try to fix every misread example by itself, the closest mistakes first.

    Arguments as in `edit_examples`.

    Yields:
        Position of the column, its output, and the edit: None where no size fixes it within the guard.

    Raises:
        EditError: what stands in the way of every edit: pooled attributions, too few examples, unknown
            patterns or groups.
    """
    where, untouched = _untouched(experiment, attributions)
    errors = np.flatnonzero(untouched <= 0)
    if len(errors):  # what concerns all of them is no reason to give up one after the other
        references, holdout, _ = _split(attributions.columns, untouched, errors[:1], seed=0)
        rank_components(attributions, errors[:1], references, protect=protect_components)
        protected_groups(experiment, experiment.columns[attributions.output], where[holdout], protect)
    how: dict[str, Any] = {
        "max_accuracy_drop": max_accuracy_drop,
        "protect": protect,
        "protect_components": protect_components,
    }
    for target in errors[np.argsort(-untouched[errors], kind="stable")]:
        try:
            found = edit_examples(experiment, attributions, [target], **how)
        except GuardError:
            found = None
        yield int(target), float(untouched[target]), found


def first_fixed(
    experiment: Experiment,
    attributions: Attributions,
    *,
    max_accuracy_drop: float = 0.01,
    protect: Protect | None = None,
    protect_components: Sequence[str] = (),
) -> EditResult:
    """The first of `edit_misread` that is fixed; arguments as there.

    Raises:
        EditError: none is.
    """
    tried = 0
    how: dict[str, Any] = {"protect": protect, "protect_components": protect_components}
    for _, _, found in edit_misread(experiment, attributions, max_accuracy_drop=max_accuracy_drop, **how):
        if found:
            return found
        tried += 1
    raise EditError(
        "no misread example can be fixed by itself within the guard",
        expected=f"holdout accuracy down by at most {max_accuracy_drop:.2%}",
        got=f"{tried} examples tried" if tried else "no example is misread",
        todo="allow a larger drop, or use attributions from more rows",
    )


def _untouched(experiment: Experiment, attributions: Attributions) -> tuple[np.ndarray, np.ndarray]:
    """Where the attributions' columns are in the experiment, and their outputs without any ablation."""
    output = attributions.output
    where = attributions.columns.locate(experiment.columns[output], "attributions", "experiment")
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    return where, experiment.prepare(experiment.device)(everything)[output][0][where]


def _done(outputs: np.ndarray, direction: Direction) -> int:
    """How many outputs are on the wanted side of 0."""
    return int(((outputs > 0) == (direction == "raise")).sum())


def _split(
    axis: Axis, untouched: np.ndarray, targets: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """References (answered right), holdout and report: disjoint from each other and from the targets."""
    example = axis.fields.get("example", np.arange(len(untouched)))  # its values are never divided
    rank = np.argsort(permutation(seed, "edit split", 0, int(example.max()) + 1), kind="stable")
    order = np.argsort(rank[example], kind="stable")
    order = order[~np.isin(example[order], example[targets])]
    right = order[untouched[order] > 0]
    count = min(NUM_REFERENCES, len(right) // 2)
    if count < 2 or len(order) - count < 2:
        raise EditError(
            "too few examples to make and judge an edit",
            expected="at least 4 right examples besides the targets",
            got=f"{len(right)} right of {len(order)}",
            todo="give the task more examples, or use rank_components and sweep with sets of your own",
        )
    references = right[:count]
    rest = order[~np.isin(example[order], example[references])]
    return references, *_halves(example, rest)


def _halves(example: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of some columns, in their order, which share no example."""
    owners = list(dict.fromkeys(example[rest].tolist()))
    first = np.isin(example[rest], owners[: len(owners) // 2])
    return rest[first], rest[~first]
