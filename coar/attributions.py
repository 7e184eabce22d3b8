"""Attributions: one linear model per column, on two axes, in memory or block by block on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coar.attribution_blocks import (
    Block,
    block_ranges,
    read_block,
    read_index,
    require_shape,
    split,
    write_blocks,
)
from coar.axes import Axis
from coar.errors import AxisError

if TYPE_CHECKING:
    import pandas

MASK_ROWS = 1024  # masks as float64 at a time


class Attributions:
    """Linear models `output = weights . mask + intercept`, one per column.

    Args:
        weights: [columns, components], in output units.
        intercept: [columns].
        components: axis of the masks.
        columns: axis of the outputs.
        output: name of the output.
        errors: standard errors of the weights (inf where a weight is not determined), or None.
        details: further figures per column.
        provenance: how they were made; plain JSON.

    >>> axes = Axis("components", ["a", "b"], {}), Axis("columns", ["0"], {})
    >>> model = Attributions(np.array([[2.0, -1.0]]), np.array([0.5]), *axes, output="margin")
    >>> model.predict(np.array([[True, False]])).tolist()
    [[2.5]]
    """

    def __init__(
        self,
        weights: np.ndarray,
        intercept: np.ndarray,
        components: Axis,
        columns: Axis,
        output: str,
        *,
        errors: np.ndarray | None = None,
        details: Mapping[str, np.ndarray] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        block = Block(0, np.asarray(weights), np.asarray(intercept), errors, details)
        require_shape(block, len(columns), len(components), "the arrays given")
        block = Block.from_arrays(0, block.arrays())  # as on disk, so that loading changes no number
        self._init([(0, len(columns))], lambda _: block, components, columns, output, provenance)

    def _init(
        self,
        ranges: list[tuple[int, int]],
        load: Callable[[int], Block],
        components: Axis,
        columns: Axis,
        output: str,
        provenance: Mapping[str, Any] | None,
    ) -> None:
        self.ranges = ranges
        self._load = load
        self.components, self.columns, self.output = components, columns, output
        self.provenance = dict(provenance or {})

    def __repr__(self) -> str:
        shape = f"{len(self.columns)} columns x {len(self.components)} components"
        said = [f"by {self.provenance.get('method', 'hand')}"]
        passes, correlation = (self.provenance.get(key) for key in ("passes", "correlation"))
        said += [f"{passes:,} passes"] if isinstance(passes, int) and passes > 1 else []
        said += [f"estimated correlation {correlation:.3f}"] if isinstance(correlation, float) else []
        return f"Attributions({shape}, output={self.output!r}, {', '.join(said)})"

    def blocks(self) -> Iterator[Block]:
        """All blocks in column order; from disk, one at a time."""
        for position in range(len(self.ranges)):
            yield self._load(position)

    @property
    def weights(self) -> np.ndarray:
        """All weights, [columns, components]; read into memory if they are on disk."""
        return self._gather(lambda block: block.weights)

    @property
    def intercept(self) -> np.ndarray:
        """All intercepts, [columns]."""
        return self._gather(lambda block: block.intercept)

    @property
    def errors(self) -> np.ndarray | None:
        """Standard errors, [columns, components], or None where the method has none."""
        found = [block.errors for block in self.blocks() if block.errors is not None]
        return np.concatenate(found) if len(found) == len(self.ranges) else None

    def detail(self, name: str) -> np.ndarray:
        """A figure per column, for example "penalty"."""
        known = next(self.blocks()).details or {}
        if name not in known:
            raise AxisError("no such figure", expected=", ".join(known) or "none", got=repr(name))
        return self._gather(lambda block: (block.details or {})[name])

    def _gather(self, part: Callable[[Block], np.ndarray]) -> np.ndarray:
        parts = [part(block) for block in self.blocks()]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, columns: Sequence[int | str] | np.ndarray) -> np.ndarray:
        """Weights of some columns, [columns, components], touching only the blocks they lie in."""
        return self._pick(self._positions(columns))["weights"]

    def predict(self, masks: np.ndarray, columns: slice | np.ndarray | None = None) -> np.ndarray:
        """Predicted outputs under masks.

        Args:
            masks: bool [rows, components], True = kept.
            columns: positions of the columns to predict; default all. Only their blocks are read.

        Returns:
            float64 [rows, columns], in output units.
        """
        masks = np.atleast_2d(masks)
        if masks.shape[1] != len(self.components):
            raise AxisError(
                "masks of another length", expected=f"[rows, {len(self.components)}]", got=masks.shape
            )
        positions = np.arange(len(self.columns))[slice(None) if columns is None else columns]
        found = np.empty((len(masks), len(positions)))
        for number, (start, stop) in enumerate(self.ranges):
            here = (start <= positions) & (positions < stop)
            if here.any():
                found[:, here] = _predict(self._load(number), masks, positions[here] - start)
        return found

    def subset(self, columns: Sequence[int | str] | np.ndarray) -> Attributions:
        """The attributions of some columns, in memory; they remember where they come from."""
        chosen = self._positions(columns)
        block = Block.from_arrays(0, self._pick(chosen))
        return Attributions(
            block.weights,
            block.intercept,
            self.components,
            self.columns.subset(chosen),
            self.output,
            errors=block.errors,
            details=block.details,
            provenance=self.provenance,
        )

    def top(self, column: int | str, count: int = 10, by: str = "magnitude") -> pandas.DataFrame:
        """Most important components of a column.

        Args:
            column: position or name.
            count: how many.
            by: "magnitude"; "positive" (removing them lowers the output); "negative" (raises it).

        Returns:
            A DataFrame with component, group, weight and, where known, error.
        """
        table = self.to_dataframe(column)
        keys = {"magnitude": -table.weight.abs(), "positive": -table.weight, "negative": table.weight}
        if by not in keys:
            raise AxisError("unknown order", expected=", ".join(keys), got=repr(by))
        return table.iloc[np.argsort(keys[by].to_numpy(), kind="stable")[:count]].reset_index(drop=True)

    def by_group(self) -> pandas.DataFrame:
        """Sum of the weights of each group of components, [columns, groups]."""
        import pandas

        groups = self._groups()
        names = list(dict.fromkeys(groups.tolist()))
        member = (groups[:, None] == np.array(names)[None, :]).astype(np.float64)
        sums = self._gather(lambda block: block.weights @ member)
        return pandas.DataFrame(sums, index=list(self.columns.names), columns=names)

    def nearest(self, column: int | str, count: int = 10) -> pandas.DataFrame:
        """Columns whose attributions point in the most similar direction (cosine similarity)."""
        import pandas

        position = self._position(column)
        own = self.rows([position])[0].astype(np.float64)
        cosine = self._gather(lambda block: _cosine(block.weights, own))
        order = [i for i in np.argsort(-cosine, kind="stable") if i != position][:count]
        names = [self.columns.names[i] for i in order]
        return pandas.DataFrame({"column": names, "similarity": cosine[order]})

    def to_dataframe(self, column: int | str) -> pandas.DataFrame:
        """All components of one column, in component order: component, group, weight, error."""
        import pandas

        position = self._position(column)
        start, block = self._block_of(position)
        table = {"component": self.components.names, "group": self._groups()}
        table["weight"] = block.weights[position - start]
        if block.errors is not None:
            table["error"] = block.errors[position - start]
        return pandas.DataFrame(table)

    def _groups(self) -> np.ndarray:
        return self.components.fields.get("group", np.array(["all"] * len(self.components)))

    def _position(self, column: int | str) -> int:
        position = self.columns.positions.get(column, -1) if isinstance(column, str) else int(column)
        if not 0 <= position < len(self.columns):
            known = f"0 .. {len(self.columns) - 1}, or a name such as {self.columns.names[0]!r}"
            raise AxisError("no such column", expected=known, got=repr(column))
        return position

    def _positions(self, columns: Sequence[int | str] | np.ndarray) -> np.ndarray:
        if not len(columns):
            raise AxisError("no columns", expected="at least one, by position or name", got="none")
        return np.array([self._position(column) for column in columns], dtype=np.int64)

    def _pick(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        """All arrays of some columns, by name; reads only the blocks they lie in."""
        found: dict[str, np.ndarray] = {}
        for number, (start, stop) in enumerate(self.ranges):
            here = (start <= positions) & (positions < stop)
            for key, array in self._load(number).arrays().items() if here.any() else ():
                empty = np.empty((len(positions), *array.shape[1:]), array.dtype)
                found.setdefault(key, empty)[here] = array[positions[here] - start]
        return found

    def _block_of(self, column: int) -> tuple[int, Block]:
        position = next(i for i, (start, stop) in enumerate(self.ranges) if start <= column < stop)
        return self.ranges[position][0], self._load(position)

    def save(self, directory: str | Path) -> Path:
        """Write to a folder, block by block; equal attributions may be there already."""
        pieces = (piece for block in self.blocks() for piece in split(block, len(self.components)))
        write_blocks(Path(directory), pieces, self.components, self.columns, self.output, self.provenance)
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> Attributions:
        """Open a folder written by `save`; blocks are read, and checked, when they are needed.

        Raises:
            StoreError: missing or damaged files, each named.
        """
        folder = Path(directory)
        index = read_index(folder / "index.json")
        components = Axis.from_json(index["components"], str(folder / "index.json"))
        columns = Axis.from_json(index["columns"], str(folder / "index.json"))
        entries = index["blocks"]
        ranges = block_ranges(entries, len(columns), folder / "index.json")

        @lru_cache(maxsize=2)
        def load(position: int) -> Block:
            return read_block(folder, entries[position], len(components))

        found = cls.__new__(cls)
        found._init(ranges, load, components, columns, index["output"], index["provenance"])
        return found


def _predict(block: Block, masks: np.ndarray, columns: np.ndarray) -> np.ndarray:
    everything = np.array_equal(columns, np.arange(len(block)))
    weights = (block.weights if everything else block.weights[columns]).astype(np.float64).T
    found = np.empty((len(masks), len(columns)))
    for start in range(0, len(masks), MASK_ROWS):
        here = slice(start, start + MASK_ROWS)
        found[here] = masks[here].astype(np.float64) @ weights
    return found + block.intercept[columns]


def _cosine(weights: np.ndarray, own: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(weights, axis=1) * np.linalg.norm(own)
    return np.divide(weights @ own, norms, out=np.zeros(len(weights)), where=norms > 0)
