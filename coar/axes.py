"""Axis: what a dimension of a mask, output or attribution array indexes.

Axes are always `[rows, components]`, `[rows, columns]`, `[columns, components]`. Two arrays may be
combined only if their axes have equal fingerprints; the error says which side differs, and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from coar.errors import AxisError, StoreError
from coar.files import digest_json

# What to do about names that came with a file, by the key that says so in their source.
OF_FILES = {
    "weights": "pass components=study.components, columns=study.columns[OUTPUT] to load_weights",
    "store": "pass components=experiment.components, columns=experiment.columns[OUTPUT] to import_store",
}


class Axis:
    """Names and fingerprint of what one dimension indexes.

    Args:
        kind: "components" or "columns".
        names: one unique name per entry.
        source: what the names belong to, as digests or short texts, for example
            `{"model": "3fa9...", "ablation": "bias=keep value=zero"}`; compared key by key, so that an
            error can say that the *model* differs. The first key is the most telling one.
        fields: arrays of the same length that describe the entries, for example `group` for
            components, `example` and `position` for columns.

    >>> axis = Axis("columns", ["0", "1", "2"], {"data": "d1"})
    >>> axis.subset([2, 0]).names
    ('2', '0')
    """

    def __init__(
        self,
        kind: str,
        names: Sequence[str],
        source: Mapping[str, str],
        fields: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    ) -> None:
        self.kind = kind
        self.names = tuple(names)
        self.source = dict(source)
        self.fields = {key: np.asarray(values) for key, values in (fields or {}).items()}
        if len(self.positions) != len(self.names):
            repeated = next(name for i, name in enumerate(self.names) if self.positions[name] != i)
            raise AxisError(f"names of {kind} must be unique", got=f"{repeated!r} more than once")
        for key, values in self.fields.items():
            if values.shape != (len(self.names),):
                raise AxisError(
                    f"field {key!r} of {kind} has the wrong shape",
                    expected=(len(self.names),),
                    got=values.shape,
                )

    @cached_property
    def positions(self) -> dict[str, int]:
        """Position of each name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def fingerprint(self) -> str:
        """Digest of kind, source and names in order."""
        return digest_json([self.kind, self.source, list(self.names)])

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Axis) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Axis({self.kind!r}, {len(self)} names, {self.fingerprint[:12]})"

    def subset(self, indices: Sequence[int] | np.ndarray) -> Axis:
        """Axis of some entries, in the order given; it still knows what it came from."""
        if np.asarray(indices).dtype == bool:
            raise AxisError(
                f"a subset of {self.kind} is given by positions",
                expected="whole numbers",
                got="a bool mask",
                todo="use np.flatnonzero(mask)",
            )
        chosen = np.asarray(indices, dtype=np.int64)
        names = [self.names[i] for i in chosen]
        return Axis(
            self.kind, names, self.source, {key: values[chosen] for key, values in self.fields.items()}
        )

    def require_same(self, other: Axis, ours: str, theirs: str) -> None:
        """Raise `AxisError` unless both axes index the same things in the same order.

        Args:
            other: the axis to compare with.
            ours: what this axis belongs to, for the message ("attributions").
            theirs: what the other belongs to ("experiment").
        """
        if self.fingerprint != other.fingerprint:
            self._refuse(other, ours, theirs)

    def locate(self, other: Axis, ours: str, theirs: str) -> np.ndarray:
        """Positions in `other` of every entry of this axis, which must be a part of it."""
        self._require_source(other, ours, theirs)
        missing = [name for name in self.names if name not in other.positions]
        if missing:
            raise AxisError(
                f"{len(missing)} {self.kind} of the {ours} are not in the {theirs}",
                expected=f"names of the {theirs}, such as {_name(other, 0)}",
                got=repr(missing[0]),
                todo=f"use {ours} made for this {theirs}",
            )
        return np.array([other.positions[name] for name in self.names], dtype=np.int64)

    def _require_source(self, other: Axis, ours: str, theirs: str, keys: Sequence[str] = ()) -> None:
        for key in keys or list(dict.fromkeys([*self.source, *other.source])):
            if self.source.get(key) != other.source.get(key):
                raise AxisError(
                    f"the {self.kind} of {ours} and {theirs} belong to different things: {key} differs",
                    expected=f"{_source(other, key)} ({theirs})",
                    got=f"{_source(self, key)} ({ours})",
                    todo=_remedy(self, other) or f"use {ours} that were made with this very {key}",
                )

    def _refuse(self, other: Axis, ours: str, theirs: str) -> None:
        self._require_source(other, ours, theirs, keys=list(self.source)[:1])
        if self.names == other.names:
            self._require_source(other, ours, theirs)
        pairs = zip(self.names, other.names, strict=False)
        where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self), len(other)))
        raise AxisError(
            f"the {self.kind} of {ours} and {theirs} differ",
            expected=f"{len(other)} {self.kind} ({theirs}), at position {where}: {_name(other, where)}",
            got=f"{len(self)} {self.kind} ({ours}), at position {where}: {_name(self, where)}",
            todo=_remedy(self, other) or f"use {ours} that were made for this {theirs}",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form."""
        fields = {key: values.tolist() for key, values in self.fields.items()}
        return {"kind": self.kind, "names": list(self.names), "source": self.source, "fields": fields}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Axis:
        """Rebuild an axis written by `to_json`; `where` names the file in errors."""
        try:
            return cls(value["kind"], [str(n) for n in value["names"]], value["source"], value["fields"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{where}: an axis is damaged", got=repr(error)[:200]) from None


def _source(axis: Axis, key: str) -> str:
    return f"{key} {axis.source[key][:12]}" if key in axis.source else f"{axis.kind} without {key}"


def _remedy(ours: Axis, theirs: Axis) -> str | None:
    """What to do where names came with a file, which knows no model, and the others did not."""
    key = next((key for key in OF_FILES if key in ours.source and key not in theirs.source), None)
    return f"a file knows the {ours.kind} of no model: {OF_FILES[key]}" if key else None


def _name(axis: Axis, position: int) -> str:
    return repr(axis.names[position]) if position < len(axis) else "nothing"
