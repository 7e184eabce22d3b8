"""Parts: which examples play which part in an edit, given by hand or drawn from a task's metadata."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np

from coar.axes import Axis
from coar.editing.columns import Columns, positions_of, require_disjoint
from coar.errors import EditError
from coar.randomness import check_seed, permutation
from coar.settings import whole_number
from coar.task import Task

STREAM = "parts of an edit"
_HARMLESS = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop),
    *(ast.BinOp, ast.BitAnd, ast.BitOr, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)


@dataclass(frozen=True, repr=False)
class EditParts:
    """Which examples play which part: what is attributed, what chooses, what judges.

    Columns of one output of the experiment, by position or name. No example is in two of: targets,
    references, those that choose (`holdout`, `target_holdout`), those that judge (`report`,
    `target_report`).

    Attributes:
        targets: whose outputs are to change; attributed.
        references: whose outputs are not; attributed.
        holdout: must keep their accuracy; they choose the size of the edit.
        report: nothing is chosen by them; the edit's effect is told on them.
        target_holdout: further examples like the targets, on which sizes are compared; None takes the
            targets themselves.
        target_report: further examples like the targets, on which the effect is told.

    >>> EditParts(targets=["7"], references=[0, 1, 2], holdout=[3, 4], report=[5, 6]).target_report is None
    True
    """

    targets: Columns
    references: Columns
    holdout: Columns
    report: Columns
    target_holdout: Columns | None = None
    target_report: Columns | None = None

    def located(self, axis: Axis) -> LocatedParts:
        """The same parts as positions of an axis.

        Raises:
            EditError: a part that is empty or not of this axis, or two that share an example.
        """
        found = {
            part.name: positions_of(axis, columns, part.name)
            for part in fields(EditParts)
            if (columns := getattr(self, part.name)) is not None
        }
        roles = ({"targets"}, {"references"}, {"holdout", "target_holdout"}, {"report", "target_report"})
        for first, second in combinations(roles, 2):
            for one in sorted(first & found.keys()):
                for other in sorted(second & found.keys()):
                    require_disjoint(axis, found[one], one, found[other], other)
        return LocatedParts(**found)

    def __repr__(self) -> str:
        sizes = [
            f"{len(getattr(self, part.name))} {part.name}"
            for part in fields(EditParts)
            if getattr(self, part.name) is not None
        ]
        return f"EditParts({', '.join(sizes)})"


@dataclass(frozen=True)
class LocatedParts:
    """The same as positions, int64; see `EditParts`."""

    targets: np.ndarray
    references: np.ndarray
    holdout: np.ndarray
    report: np.ndarray
    target_holdout: np.ndarray | None = None
    target_report: np.ndarray | None = None

    @property
    def compared(self) -> np.ndarray:
        """Examples on which sizes are compared."""
        return self.targets if self.target_holdout is None else self.target_holdout

    @property
    def judging(self) -> np.ndarray:
        """Examples like the targets on which the effect is told."""
        return self.targets if self.target_report is None else self.target_report


@dataclass(frozen=True, repr=False)
class DrawnParts(EditParts):
    """Parts as positions of a task's examples: for outputs with one value per example.

    Attributes:
        data: fingerprint of the task's examples.
    """

    data: str = ""

    def located(self, axis: Axis) -> LocatedParts:
        """As of `EditParts`; refuses other examples, and an output with several values per example."""
        if axis.source.get("data") != self.data:
            raise EditError(
                "the parts were drawn from other examples than the experiment's",
                expected=f"data {axis.source.get('data', 'unknown')[:12]} (experiment)",
                got=f"data {self.data[:12]} (parts)",
                todo="draw them from experiment.task",
            )
        example = axis.fields.get("example", np.arange(len(axis)))
        if len(np.unique(example)) != len(axis):
            raise EditError(
                "parts were drawn by example, and this output has several values per example",
                expected="one column per example",
                got=f"{len(axis)} columns of {len(np.unique(example))} examples",
                todo="choose an output with one value per example, or make EditParts of columns",
            )
        return super().located(axis)


def draw_parts(
    task: Task,
    targets: str,
    references: str,
    *,
    guarded: str | None = None,
    num_targets: int = 20,
    num_references: int = 60,
    pairs: str | None = None,
    seed: int = 0,
) -> EditParts:
    """Draw parts at random from the examples that queries on the task's metadata choose.

    Of the targets' query, `num_targets` are attributed, half of the others compare sizes and half are
    reported on; likewise of the references'.

    Args:
        task: with metadata; one output value per example.
        targets: a query as `pandas.DataFrame.query` takes it, such as "label == 3".
        references: a query for examples that should not change.
        guarded: which examples have to keep their accuracy; default the references' query. Of both
            queries' examples, only those that are not attributed.
        num_targets: how many targets are attributed.
        num_references: how many references are attributed.
        pairs: a column of the metadata: examples with the same value (an image with and without a
            trigger) are always on the same side, and the targets' partners are the first references.
        seed: of the draw.

    Raises:
        EditError: no metadata, a query that cannot be read or finds too few examples.

    >>> import torch
    >>> examples = torch.utils.data.TensorDataset(torch.zeros(40, 2), torch.zeros(40, dtype=torch.int64))
    >>> labels = {"label": [0] * 20 + [1] * 20}
    >>> task = Task(torch.nn.Identity().eval(), examples, metadata=labels)
    >>> draw_parts(task, "label == 1", "label == 0", num_targets=4, num_references=6)
    EditParts(4 targets, 6 references, 7 holdout, 7 report, 8 target_holdout, 8 target_report)
    """
    table = _metadata(task)
    wanted, others = _query(table, targets, "targets"), _query(table, references, "references")
    kept = others if guarded is None else _query(table, guarded, "guarded")
    if (wanted & others).any():
        raise EditError(
            "targets and references overlap",
            expected="queries that no example answers both",
            got=f"{int((wanted & others).sum())} examples answer {targets!r} and {references!r}",
            todo="narrow one of them",
        )
    group = _groups(table, pairs)
    order = permutation(check_seed(seed), STREAM, 0, int(group.max()) + 1)
    rank = np.argsort(order, kind="stable")[group]  # examples of one group stay together
    by_rank = np.argsort(rank, kind="stable")
    attributed = _first(by_rank[wanted[by_rank]], num_targets, "targets", targets, table)
    partners = np.isin(group, group[attributed])
    near = by_rank[np.argsort(~partners[by_rank], kind="stable")]
    compared = _first(near[others[near]], num_references, "references", references, table)
    used = np.isin(group, group[np.concatenate([attributed, compared])])
    free = by_rank[~used[by_rank]]
    judging = _every_second(group, free, [wanted, kept])
    return DrawnParts(
        attributed,
        compared,
        _some(free[kept[free] & ~judging[free]], "holdout", references if guarded is None else guarded),
        _some(free[kept[free] & judging[free]], "report", references if guarded is None else guarded),
        _any(free[wanted[free] & ~judging[free]]),
        _any(free[wanted[free] & judging[free]]),
        data=task.data_fingerprint(),
    )


def _metadata(task: Task) -> Any:
    if getattr(task, "metadata", None) is None:
        raise EditError(
            "parts are drawn by the task's metadata, and it has none",
            expected='Task(..., metadata={"label": [...]})',
            todo="give the task metadata, or make EditParts by hand",
        )
    return task.metadata.reset_index(drop=True)


def _query(table: Any, query: str, what: str) -> np.ndarray:
    """Which examples answer a query: bool [examples]."""
    _require_harmless(query, what)
    expected = f"a condition on the columns {', '.join(map(str, table))}, such as 'label == 3'"
    try:
        answered = np.asarray(table.eval(query, engine="python"))
    except Exception as error:  # whatever pandas makes of a text
        got = f"{query!r}: {type(error).__name__}: {error!s:.200}"
        raise EditError(f"the query for {what} cannot be read", expected=expected, got=got) from None
    if answered.dtype != bool or answered.shape != (len(table),):
        raise EditError(f"the query for {what} is no condition", expected=expected, got=repr(query))
    return answered


def _require_harmless(query: Any, what: str) -> None:
    """Refuse all but conditions on columns: pandas would run calls and attributes that a spec file names."""
    try:
        nodes = list(ast.walk(ast.parse(re.sub("`[^`]*`", "column", query).strip(), mode="eval")))
    except (SyntaxError, TypeError, ValueError, RecursionError):
        nodes = []
    strange = [type(node).__name__ for node in nodes if not isinstance(node, _HARMLESS)]
    if strange or not nodes:
        signs = isinstance(query, str) and re.search(r"[^=!<>]=[^=]", query)
        raise EditError(
            f"the query for {what} cannot be read",
            expected="column names, numbers, texts, comparisons, in, and, or, not: label == 3 and group != 1",
            got=f"{query!r}" + (f" with a {strange[0]}" if strange else ""),
            todo="an equality has two signs: ==" if signs else None,
        )


def _groups(table: Any, pairs: str | None) -> np.ndarray:
    """Number of the group that an example stays with, [examples]."""
    if pairs is None:
        return np.arange(len(table))
    if pairs not in table:
        raise EditError(
            f"the task's metadata has no column {pairs!r} that names pairs",
            expected=f"one of: {', '.join(map(str, table))}",
            got=repr(pairs),
        )
    if table[pairs].isna().any():
        raise EditError(
            f"some examples have no {pairs!r} that names their pair",
            expected="a value for every example",
            got=f"{int(table[pairs].isna().sum())} without one",
        )
    return np.unique(table[pairs].astype(str), return_inverse=True)[1]


def _first(candidates: np.ndarray, count: int, what: str, query: str, table: Any) -> np.ndarray:
    wanted = whole_number(count, f"num_{what}")
    if not len(candidates):
        named = [name for name in table if re.search(rf"\b{re.escape(str(name))}\b", query)]
        values = [f"{name} is {_values(table[name])}" for name in named]
        raise EditError(
            f"no example answers the query for the {what}",
            expected="; ".join(values) or None,
            got=repr(query),
        )
    if len(candidates) < wanted:
        raise EditError(
            f"too few examples for the {what}",
            expected=f"{wanted} (num_{what}) that answer {query!r}",
            got=f"{len(candidates)}",
            todo=f"ask for fewer with num_{what}=, or give the task more examples",
        )
    return np.sort(candidates[:wanted])


def _values(column: Any) -> str:
    """The first values of a column, as a query would write them."""
    values = list(dict.fromkeys(column.tolist()))
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    return ", ".join(map(repr, values[:8])) + more


def _every_second(group: np.ndarray, free: np.ndarray, kinds: Sequence[np.ndarray]) -> np.ndarray:
    """Which examples are in every second group of the free ones, by kind of group: bool [all examples].

    Args:
        group: of every example.
        free: examples to divide, in random order.
        kinds: bool [examples] each; groups with an example of the same kinds are divided evenly.
    """
    has = np.stack([np.bincount(group, kind) > 0 for kind in kinds], axis=1)
    seen: Counter[tuple[bool, ...]] = Counter()
    chosen = []
    for number in dict.fromkeys(group[free].tolist()):
        kind = tuple(has[number].tolist())
        seen[kind] += 1
        if seen[kind] % 2 == 1:  # a single one judges
            chosen.append(number)
    return np.isin(group, chosen)


def _some(found: np.ndarray, what: str, query: str) -> np.ndarray:
    if not len(found):
        raise EditError(
            f"no example is left for the {what}",
            expected=f"examples that answer {query!r} besides the targets and references",
            got="none",
            todo="ask for fewer targets or references, or give the task more examples",
        )
    return np.sort(found)


def _any(found: np.ndarray) -> np.ndarray | None:
    """None where every example that answers the targets' query is a target."""
    return np.sort(found) if len(found) else None
