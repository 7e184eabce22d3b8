"""Protection: components that an edit never ablates, and subpopulations that it must not harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from coar.axes import Axis
from coar.errors import EditError
from coar.experiments.base import Experiment

Protect = str | Sequence[str] | Mapping[str, Any]


def protected_components(axis: Axis, patterns: Sequence[str]) -> np.ndarray:
    """Which components match a pattern: bool [components].

    Args:
        axis: of the components.
        patterns: names of components, or patterns (`*`, `?`, `[...]`) of names of components or groups.

    Raises:
        EditError: a pattern that matches nothing, or patterns that leave nothing to ablate.

    >>> axis = Axis("components", ["a[0]", "a[1]", "b[0]"], {}, {"group": ["a", "a", "b"]})
    >>> protected_components(axis, ["a"]).tolist(), protected_components(axis, ["a[1]"]).tolist()
    ([True, True, False], [False, True, False])
    """
    if isinstance(patterns, str):  # it would be read letter by letter
        raise EditError("protect is a list of patterns", expected=f"[{patterns!r}]", got=repr(patterns))
    groups = axis.fields.get("group", np.array([""] * len(axis))).tolist()
    protected = np.zeros(len(axis), dtype=bool)
    for pattern in patterns:
        matching = _matching(axis, groups, pattern)
        if not matching.any():
            known = [group for group in dict.fromkeys(groups) if group]
            raise EditError(
                f"protect pattern {pattern!r} matches no component",
                expected=f"a component such as {axis.names[0]!r}"
                + (f", or groups: {_some(known)}" if known else ""),
                got=repr(pattern),
                todo="patterns match whole names: 'layer4.*' is everything in layer4",
            )
        protected |= matching
    if protected.all():
        raise EditError(
            "every component is protected: there is nothing to ablate",
            expected="patterns that leave some",
            got=", ".join(map(repr, patterns)),
        )
    return protected


def _matching(axis: Axis, groups: list[str], pattern: str) -> np.ndarray:
    if pattern in axis.positions:  # `conv[3]` is a component before it is a pattern for `conv3`
        return np.arange(len(axis)) == axis.positions[pattern]
    pairs = zip(axis.names, groups, strict=True)
    return np.array([fnmatchcase(name, pattern) or fnmatchcase(group, pattern) for name, group in pairs])


def protected_groups(
    experiment: Experiment, axis: Axis, holdout: np.ndarray, protect: Protect | None
) -> dict[str, np.ndarray]:
    """Holdout columns of every protected subpopulation, by name such as "label=3".

    Args:
        experiment: whose task has metadata.
        axis: its columns.
        holdout: positions in the axis.
        protect: a column of the metadata, or several: every value there is; or `{column: [values]}`.

    Returns:
        Positions in the axis, per group.

    Raises:
        EditError: no such column or value, or no holdout example of a group.
    """
    if not protect:
        return {}
    table = _metadata(experiment)
    example = axis.fields.get("example", np.arange(len(axis)))[holdout]
    groups: dict[str, np.ndarray] = {}
    for column, wanted in _wanted(protect).items():
        values = _values(table, column)
        for value in _known(values) if wanted is None else wanted:
            member = np.array([entry == value for entry in values], dtype=bool)
            name = f"{column}={value}"
            if not member.any():
                raise _unknown_value(column, value, _known(values))
            if not member[example].any():
                raise EditError(
                    f"no holdout example is of the protected group {name}",
                    expected=f"a holdout with some of the {int(member.sum())} examples of {name}",
                    got=f"{len(holdout)} holdout columns, none of them of {name}",
                    todo="add examples of this group to the holdout, or name only groups that can be judged",
                )
            groups[name] = holdout[member[example]]
    return groups


def _wanted(protect: Protect) -> dict[str, list[Any] | None]:
    """Values by metadata column; None for all of them."""
    if isinstance(protect, str):
        return {protect: None}
    if not isinstance(protect, Mapping):
        return dict.fromkeys(protect)
    single = str | bytes | int | float | np.generic
    return {key: [value] if isinstance(value, single) else list(value) for key, value in protect.items()}


def _metadata(experiment: Experiment) -> Any:
    table = getattr(getattr(experiment, "task", None), "metadata", None)
    if table is None:
        raise EditError(
            "there is no metadata that says which examples are of a protected group",
            expected="a task with metadata",
            got="none",
            todo='Task(..., metadata={"subpopulation": [...]}), with one entry per example',
        )
    return table


def _values(table: Any, column: str) -> list[Any]:
    if column not in table:
        raise EditError(
            f"the task's metadata has no column {column!r}",
            expected=f"one of: {_some([str(key) for key in table])}",
            got=repr(column),
            todo="component patterns are for rank_components(..., protect=[...])",
        )
    return np.asarray(table[column]).tolist()


def _known(values: list[Any]) -> list[Any]:
    """Different values in order of appearance; an example without one is in no group."""
    return [value for value in dict.fromkeys(values) if value is not None and value == value]


def _unknown_value(column: str, value: Any, known: list[Any]) -> EditError:
    return EditError(
        f"no example has {column} {value!r}",
        expected=f"one of: {_some([repr(entry) for entry in known])}",
        got=repr(value),
    )


def _some(names: Sequence[str], count: int = 8) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
