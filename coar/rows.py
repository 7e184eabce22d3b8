"""Reading the rows of a store: lazily as arrays, or streamed in fixed blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coar.errors import SettingError
from coar.store import Item, Store


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows, decoded.

    Attributes:
        rows: int64 [k], row numbers.
        masks: bool [k, components].
        outputs: [k, columns], in output units; float32, or float64 where float16 differences are stored.
    """

    rows: np.ndarray
    masks: np.ndarray
    outputs: np.ndarray


def decode(stored: np.ndarray, untouched: np.ndarray) -> np.ndarray:
    """float32 outputs in output units; float16 arrays hold differences to the untouched outputs."""
    if stored.dtype != np.float16:
        return stored
    return stored.astype(np.float32) + untouched.astype(np.float32)


def row_blocks(
    store: Store,
    items: Sequence[Item],
    output: str,
    untouched: np.ndarray,
    size: int,
    columns: slice | np.ndarray = slice(None),
) -> Iterator[RowBlock]:
    """Stream rows in blocks `[k * size, (k + 1) * size)` of row numbers, whatever the shards.

    Each shard is read once; what is summed over these blocks in order does not depend on how the
    rows were sharded.
    """
    columns = as_slice(columns)
    block = None
    for item in items:
        shard = store.read(item)
        values = _exact(shard.outputs[output][:, columns], untouched[columns])
        for number in np.unique(shard.rows // size):
            if block and number != block.number:
                yield block.taken()
                block = None
            here = shard.rows // size == number
            block = block or _Filling(int(number), size, shard.masks.shape[1], values)
            block.add(shard.rows[here], shard.masks[here], values[here])
    if block:
        yield block.taken()


class _Filling:
    """A block that shards are copied into: the memory is that of one block, however many shards it spans."""

    def __init__(self, number: int, size: int, components: int, values: np.ndarray) -> None:
        self.number, self._count = number, 0
        shapes = ((size,), np.int64), ((size, components), np.bool_), ((size, values.shape[1]), values.dtype)
        self._arrays = [np.empty(shape, dtype) for shape, dtype in shapes]

    def add(self, *parts: np.ndarray) -> None:
        stop = self._count + len(parts[0])
        for array, part in zip(self._arrays, parts, strict=True):
            array[self._count : stop] = part
        self._count = stop

    def taken(self) -> RowBlock:
        return RowBlock(*(array[: self._count] for array in self._arrays))


def _exact(stored: np.ndarray, untouched: np.ndarray) -> np.ndarray:
    """As `decode`, in float64: float32 would round small differences to a large output away."""
    return stored if stored.dtype != np.float16 else stored + untouched.astype(np.float64)


def as_slice(columns: slice | np.ndarray) -> slice | np.ndarray:
    """Columns that follow each other as a slice: a view instead of a copy."""
    if isinstance(columns, slice) or not len(columns) or (np.diff(columns) != 1).any():
        return columns
    return slice(int(columns[0]), int(columns[-1]) + 1)


class StoredArray:
    """One array of a study, [rows, ...], read shard by shard as it is indexed.

    `array[5]`, `array[10:20]`, `array[[1, 7]]` and `array[:, 3]` read only the shards concerned;
    `numpy.asarray(array)` reads all. Positions count the rows that are there.
    """

    def __init__(
        self, store: Store, items: Sequence[Item], output: str | None, untouched: Mapping[str, np.ndarray]
    ):
        self._store, self._items, self._output, self._untouched = store, items, output, untouched
        counts = [store.count(item) for item in items]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        width = store.num_components if output is None else store.num_columns[output]
        self.shape = (int(self._starts[-1]), width)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredArray({self._output or 'masks'}, shape={self.shape})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        positions = np.arange(len(self))[rows]
        flat = np.atleast_1d(positions)
        parts = self._read(flat, columns)
        return parts if np.ndim(positions) else parts[0]

    def _read(self, positions: np.ndarray, columns: Any) -> np.ndarray:
        probe = np.empty((1, self.shape[1]), dtype=bool if self._output is None else np.float32)[:, columns]
        found = np.empty((len(positions), *probe.shape[1:]), dtype=probe.dtype)
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(owner):
            here = owner == number
            values = self._values(self._items[number])
            found[here] = values[positions[here] - self._starts[number]][:, columns]
        return found

    def _values(self, item: Item) -> np.ndarray:
        shard = self._store.read(item)
        if self._output is None:
            return shard.masks
        return decode(shard.outputs[self._output], self._untouched[self._output])


def require_output(name: str | None, known: Sequence[str]) -> str:
    """The output meant: the one named, or the only one there is."""
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        raise SettingError(
            "which output?" if name is None else "no such output",
            expected=f"one of: {', '.join(known)}",
            got=name,
        )
    return name
