"""Ranking: components in the order in which to ablate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from coar.attributions import Attributions
from coar.editing.columns import Columns, positions_of, require_disjoint
from coar.editing.protection import protected_components
from coar.editing.ranked import Direction
from coar.editing.sweep import Ranking
from coar.errors import EditError

Score = Literal["welch", "difference", "contrast", "cautious"]
FLOOR = 0.05  # quantile over components: what references need least is no reason to come first


def rank_components(
    attributions: Attributions,
    targets: Columns,
    references: Columns,
    direction: Direction = "raise",
    score: Score = "welch",
    protect: Sequence[str] = (),
) -> Ranking:
    """Order components by how far ablating them moves the targets rather than the references.

    Welch's t per component (COAR paper, section 5): (mean_T w - mean_R w) / sqrt(var_T/|T| + var_R/|R|)
    with population variances. A single target has no variance: var_T is 0 and the reference spread alone is
    in the denominator, so that t says how far the target lies from the references, not how surely targets
    do (and the other way round with a single reference). `Ranking.spread` and the provenance of an edit say
    which spread was used. Ablating the components of lowest t raises the targets' outputs.

    Args:
        attributions: of at least these columns.
        targets: columns, by position or name.
        references: columns that should not change; not targets.
        direction: of the targets' outputs.
        score: "welch", or "difference" of means, which needs no spread. Both are also far from 0 where
            references need a component and targets do not, and ablating that one harms the references. Two
            of ours, not of the paper, leave it alone: "cautious", the targets' mean less what the references
            need in the mean, mean_T w + |mean_R w| (to lower: -); and "contrast", how much targets need a
            component by how much references do, mean_T w / sqrt(mean_R w^2 + s^2), where s is the 5 %
            quantile of the root mean squares.
        protect: components that are never ablated: names, or patterns (`*`, `?`, `[...]`) for names of
            components or of their groups, such as "layer4.*".

    Raises:
        EditError: overlapping or empty sets, or Welch's t with one target and one reference; or weights
            that were pooled over examples, which shrinks what tells targets from references; or a
            pattern that matches no component.

    >>> from coar.axes import Axis
    >>> axes = Axis("components", ["a", "b", "c"], {}), Axis("columns", ["0", "1", "2"], {})
    >>> weights = np.array([[-4.0, -2.0, 1.0], [0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
    >>> attributions = Attributions(weights, np.zeros(3), *axes, output="margin")
    >>> rank_components(attributions, [0], [1, 2], protect=["a"])
    Ranking(2 components by welch, reference spread in the denominator, 1 protected, first b)
    """
    if attributions.provenance.get("pooled"):
        raise EditError(
            "pooled attributions are not for edits: examples were drawn towards each other",
            expected="attributions of each example by itself",
            got="pool=True",
            todo="make them again without pooling",
        )
    if direction not in ("raise", "lower") or score not in get_args(Score):
        raise EditError(
            "unknown ranking",
            expected=f"raise or lower; {', '.join(get_args(Score))}",
            got=f"{direction}, {score}",
        )
    chosen = positions_of(attributions.columns, targets, "targets")
    others = positions_of(attributions.columns, references, "references")
    require_disjoint(attributions.columns, chosen, "targets", others, "references")
    protected = protected_components(attributions.components, protect)
    weights = attributions.rows(chosen), attributions.rows(others)
    scores = _scores(*weights, score, 1 if direction == "raise" else -1)
    order = np.argsort(scores if direction == "raise" else -scores, kind="stable")
    allowed = order[~protected[order]]
    return Ranking(allowed, scores, chosen, others, attributions, direction, score, tuple(protect))


def _scores(targets: np.ndarray, references: np.ndarray, score: str, sign: int) -> np.ndarray:
    """Scores of components; `sign` is 1 if the lowest come first."""
    targets, references = targets.astype(np.float64), references.astype(np.float64)
    if score == "contrast":
        return _contrast(targets, references)
    if score == "cautious":
        return targets.mean(axis=0) + sign * np.abs(references.mean(axis=0))
    difference = targets.mean(axis=0) - references.mean(axis=0)
    if score == "difference":
        return difference
    if len(targets) == len(references) == 1:
        raise EditError(
            "Welch's t of one target and one reference is infinite: there is no spread to compare with",
            expected="at least two references (20 or more are better)",
            got="1 target, 1 reference",
            todo='add references, or rank with score="difference"',
        )
    scale = np.sqrt(targets.var(axis=0) / len(targets) + references.var(axis=0) / len(references))
    # A component that is 0 everywhere (never ablated, say) scores 0, not 0 / 0.
    limit = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.divide(difference, scale, out=limit, where=scale > 0)


def _contrast(targets: np.ndarray, references: np.ndarray) -> np.ndarray:
    needed = np.sqrt((references**2).mean(axis=0))
    scale = np.sqrt(needed**2 + np.quantile(needed, FLOOR) ** 2)
    means = targets.mean(axis=0)
    # Where references need nothing at all, and targets do, nothing stands in the way.
    limit = np.where(means == 0, 0.0, np.copysign(np.inf, means))
    return np.divide(means, scale, out=limit, where=scale > 0)
