"""Outputs and predictions as tables [rows, columns] that are read or computed as they are indexed."""

from __future__ import annotations

from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.metrics import Table


class Lazy:
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

    def _columns(self, positions: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Predicted(Lazy):
    """What attributions predict under masks, float64 [rows, columns].

    >>> from coar.testing import linear_experiment
    >>> from coar.baselines import leave_one_out
    >>> experiment, _ = linear_experiment()
    >>> found = leave_one_out(experiment, progress=False)
    >>> masks = np.ones((2, len(experiment.components)), dtype=bool)
    >>> Predicted(found, masks)[:, 0].shape
    (2,)
    """

    def __init__(self, attributions: Attributions, masks: np.ndarray) -> None:
        self._attributions, self._masks = attributions, masks
        self.shape = len(masks), len(attributions.columns)

    def _columns(self, positions: np.ndarray) -> np.ndarray:
        return self._attributions.predict(self._masks, positions)


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
