"""Outputs and predictions as tables [rows, columns] that are read or computed as they are indexed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.metrics import Table

MASK_ROWS = 1024  # masks unpacked at a time


class Lazy(ABC):
    """A table of which `table[rows, columns]` and `numpy.asarray(table)` make what is asked for."""

    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        positions = np.arange(self.shape[1])[columns]
        found = self._columns(np.atleast_1d(positions))[rows]
        return found if np.ndim(positions) else found[..., 0]

    @abstractmethod
    def _columns(self, positions: np.ndarray) -> np.ndarray:
        """All rows of some columns."""


@dataclass(frozen=True)
class PackedMasks:
    """Keep masks as bits, eight components to a byte.

    >>> masks = np.random.default_rng(0).random((5, 11)) < 0.5
    >>> bool((PackedMasks.of([masks[:2], masks[2:]]).rows(slice(1, 4)) == masks[1:4]).all())
    True
    """

    bits: np.ndarray
    num_components: int

    @classmethod
    def of(cls, masks: Iterable[np.ndarray]) -> PackedMasks:
        """From bool [rows, components], some rows at a time."""
        parts = [(np.packbits(rows, axis=1), rows.shape[1]) for rows in masks]
        return cls(np.concatenate([bits for bits, _ in parts]), parts[0][1])

    def __len__(self) -> int:
        return len(self.bits)

    def first(self, count: int) -> PackedMasks:
        """The first rows alone."""
        return PackedMasks(self.bits[:count], self.num_components)

    def rows(self, here: slice) -> np.ndarray:
        """Some of them, bool [rows, components]."""
        return np.unpackbits(self.bits[here], axis=1, count=self.num_components).view(bool)


class Predicted(Lazy):
    """What attributions predict under masks, float64 [rows, columns].

    >>> from coar.testing import linear_experiment
    >>> from coar.baselines import leave_one_out
    >>> experiment, _ = linear_experiment()
    >>> found = leave_one_out(experiment, progress=False)
    >>> masks = np.ones((2, len(experiment.components)), dtype=bool)
    >>> Predicted(found, PackedMasks.of([masks]))[:, 0].shape
    (2,)
    """

    def __init__(self, attributions: Attributions, masks: PackedMasks) -> None:
        self._attributions, self._masks = attributions, masks
        self.shape = len(masks), len(attributions.columns)

    def _columns(self, positions: np.ndarray) -> np.ndarray:
        found = np.empty((len(self._masks), len(positions)))
        for start in range(0, len(found), MASK_ROWS):
            here = slice(start, start + MASK_ROWS)
            found[here] = self._attributions.predict(self._masks.rows(here), positions)
        return found


class Chosen(Lazy):
    """The first rows of some columns of a table.

    Args:
        table: the whole.
        positions: of the columns.
        rows: how many; None = all.
    """

    def __init__(self, table: Table, positions: np.ndarray, rows: int | None = None) -> None:
        self._table, self._positions = table, positions
        self.shape = (table.shape[0] if rows is None else rows), len(positions)

    def _columns(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self._table[: self.shape[0], self._positions[positions]])
