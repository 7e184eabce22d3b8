"""Columns: which outputs play which part in an edit, by position or name, and that no two parts overlap."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from coar.axes import Axis
from coar.errors import EditError

Columns = Sequence[int | str] | np.ndarray


def positions_of(axis: Axis, columns: Columns, what: str) -> np.ndarray:
    """Positions, int64, of columns given by position or name; each once, at least one."""
    if isinstance(columns, np.ndarray) and columns.dtype == bool:
        raise EditError(
            f"{what} are positions or names",
            expected="whole numbers or texts",
            got="a bool mask",
            todo="take np.flatnonzero(mask)",
        )
    if isinstance(columns, str | int):  # a text would be read letter by letter
        raise EditError(f"{what} are a list", expected=f"[{columns!r}]", got=repr(columns))
    found = [_position(axis, column) for column in columns]
    bad = [c for c, position in zip(columns, found, strict=True) if not 0 <= position < len(axis)]
    if bad or not found or len(set(found)) != len(found):
        known = f"0 .. {len(axis) - 1}, or names such as {axis.names[0]!r}"
        got = f"unknown: {bad[0]!r}" if bad else "none" if not found else "one of them twice"
        raise EditError(
            f"{what} are not columns of the attributions", expected=f"one or more of {known}", got=got
        )
    return np.array(found, dtype=np.int64)


def _position(axis: Axis, column: Any) -> int:
    if isinstance(column, str):
        return axis.positions.get(column, -1)
    try:
        return operator.index(column)
    except TypeError:  # 1.9 is no column
        return -1


def positions_in(whole: Axis, part: Axis, where: np.ndarray, columns: Columns, what: str) -> np.ndarray:
    """Positions in an experiment's columns: a name may be any of them, a position is one of the attributions.

    Args:
        whole: columns of the experiment.
        part: columns of the attributions.
        where: positions in `whole` of all of `part`.
        columns: by position in `part`, or by name in `whole`.
        what: they are, for errors.
    """
    if isinstance(columns, str | int) or not len(columns):
        return positions_of(part, columns, what)  # refuses them
    named = [isinstance(column, str) for column in columns]
    found = np.empty(len(columns), dtype=np.int64)
    for by_name in {*named}:
        here = [i for i, name in enumerate(named) if name == by_name]
        chosen = [columns[i] for i in here]
        found[here] = (
            positions_of(whole, chosen, what) if by_name else where[positions_of(part, chosen, what)]
        )
    if len(set(found.tolist())) != len(found):
        raise EditError(f"{what} have a column twice, by position and by name", expected="each once")
    return found


def require_disjoint(axis: Axis, first: np.ndarray, one: str, second: np.ndarray, other: str) -> None:
    """Raise if two sets of columns share an example."""
    # By example, not by column: two tokens of one text do not make two examples.
    example = axis.fields.get("example", np.arange(len(axis)))
    both = first[np.isin(example[first], example[second])]
    if len(both):
        raise EditError(
            f"{one} and {other} overlap",
            expected="disjoint examples, so that nothing is chosen and judged on the same ones",
            got=f"{len(both)} in both, first {axis.names[both[0]]!r}",
            todo=f"take them out of the {other}",
        )
