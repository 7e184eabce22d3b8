"""Problem: what a solver may ask about rows, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from coar.errors import FitError, SettingError
from coar.regression.collection import (
    ALL,
    BLOCK_ROWS,
    HELD_OUT,
    TRAIN,
    Chain,
    Kept,
    add_blocks,
    in_order,
    is_held_out,
)
from coar.regression.memory import memory_bytes
from coar.regression.statistics import MaskCounts, MaskStatistics, MaskSums, OutputStatistics, OutputSums
from coar.rows import RowBlock

COLUMN_SHARE = 1 / 16  # of the budget, for X'Y of one block of columns and a block of its rows
BLOCK_COLUMN_BYTES = (
    32 * BLOCK_ROWS
)  # of one column of a block of rows: float32 and 64, whole numbers, digits


class RowSource(Protocol):
    """Rows of one output."""

    @property
    def num_components(self) -> int:
        """Length of a mask."""

    @property
    def num_columns(self) -> int:
        """Of the output."""

    @property
    def num_rows(self) -> int:
        """How many there are, failed ones perhaps counted."""

    @property
    def shift(self) -> np.ndarray:
        """float64 [columns], about as large as the outputs: sums are of differences to it."""

    @property
    def complete(self) -> int:
        """Rows with a smaller number are all there, or recorded as failed."""

    @property
    def kept(self) -> Kept | None:
        """Where sums are kept."""

    @property
    def key(self) -> str | None:
        """Names the output among the kept sums; None: sums of these columns are not kept."""

    def blocks(self, columns: slice, start: int = 0) -> Iterator[RowBlock]:
        """Rows from number `start` on, in blocks `[k * BLOCK_ROWS, (k + 1) * BLOCK_ROWS)`."""


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory: masks bool [rows, components], outputs [rows, columns]."""

    masks: np.ndarray
    outputs: np.ndarray
    shift: np.ndarray
    numbers: np.ndarray
    complete: int = 0
    kept: Kept | None = None
    key: str | None = None

    @property
    def num_components(self) -> int:
        """Length of a mask."""
        return self.masks.shape[1]

    @property
    def num_columns(self) -> int:
        """Number of outputs."""
        return self.outputs.shape[1]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.masks)

    def blocks(self, columns: slice, start: int = 0) -> Iterator[RowBlock]:
        """Views, block by block."""
        for first in range(start, len(self.masks), BLOCK_ROWS):
            here = slice(first, first + BLOCK_ROWS)
            outputs = np.asarray(self.outputs[here, columns], np.float32)
            yield RowBlock(self.numbers[here], self.masks[here], outputs)


class Problem:
    """The rows of one output, and their statistics, made when they are asked for.

    Args:
        source: the rows.
        held_out: every row with `row % held_out == held_out - 1` is held out; 0: none.
        budget: bytes of memory to plan with; default half of the machine's.
        device: where sums and solutions are computed.

    >>> masks = np.random.default_rng(0).random((50, 3)) < 0.8
    >>> problem = Problem.from_arrays(masks, masks @ np.array([[1.0], [2.0], [3.0]]), held_out=10)
    >>> problem.masks("train").rows, problem.masks("held_out").rows, problem.masks().rows
    (45, 5, 50)
    """

    def __init__(
        self,
        source: RowSource,
        held_out: int = 0,
        budget: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.source, self.held_out = source, held_out
        self.budget = budget or memory_bytes(None)
        self.device = device or torch.device("cpu")
        self.num_components, self.num_columns = source.num_components, source.num_columns
        self.num_rows = source.num_rows
        if self.num_rows < 2:
            raise _too_few(f"{self.num_rows}")
        self._masks: dict[str, MaskCounts] = {}
        self._outputs: tuple[slice, dict[str, OutputStatistics]] | None = None

    @classmethod
    def from_arrays(
        cls, masks: np.ndarray, outputs: np.ndarray, held_out: int = 0, budget: int | None = None
    ) -> Problem:
        """Rows in memory: masks bool [rows, components], outputs [rows, columns]."""
        if masks.ndim != 2 or outputs.ndim != 2 or len(masks) != len(outputs):
            raise FitError(
                "masks and outputs do not belong together",
                expected="[rows, components] and [rows, columns]",
                got=f"{masks.shape} and {outputs.shape}",
            )
        if masks.dtype != bool and not np.isin(masks, (0, 1)).all():
            raise FitError("masks are 0 or 1", expected="0 = ablated, 1 = kept", got="other numbers")
        shift = np.zeros(outputs.shape[1]) if not len(outputs) else outputs[0].astype(np.float64)
        rows = ArrayRows(np.asarray(masks, dtype=bool), outputs, shift, np.arange(len(masks)))
        return cls(rows, held_out, budget)

    @property
    def parts(self) -> list[str]:
        """Names of the parts that rows fall into."""
        return [TRAIN, HELD_OUT] if self.held_out else [ALL]

    @cached_property
    def column_slices(self) -> list[slice]:
        """Blocks of columns, such that X'Y of one takes a small share of the memory."""
        each = 8 * self.num_components + BLOCK_COLUMN_BYTES
        size = max(1, int(self.budget * COLUMN_SHARE) // each)
        starts = range(0, self.num_columns, size)
        return [slice(start, min(start + size, self.num_columns)) for start in starts]

    def masks(self, part: str = ALL) -> MaskStatistics:
        """X'X of a part of the rows; the first call reads the first block of columns, too."""
        if not isinstance(self._masks.get(self.parts[0]), MaskStatistics):
            self._collect(self.column_slices[0], gram=True)
        found = self._part(self._masks, part)
        assert isinstance(found, MaskStatistics)
        return found

    def counts(self, part: str = ALL) -> MaskCounts:
        """How often each component was kept, without X'X."""
        if not self._masks:
            self._collect(self.column_slices[0], gram=False)
        return self._part(self._masks, part)

    def outputs(self, columns: slice, part: str = ALL) -> OutputStatistics:
        """X'Y and sums of some columns."""
        if self._outputs is None or self._outputs[0] != columns:
            self._outputs = None
            self._collect(columns, gram=False)
        assert self._outputs is not None
        return self._part(self._outputs[1], part)

    def hold_out(self, every: int) -> None:
        """Hold every `every`th row out; to be said before anything is read."""
        if every != self.held_out and (self._masks or self._outputs):
            raise SettingError("rows are held out before they are read", expected=self.held_out, got=every)
        self.held_out = every

    def forget_gram(self) -> None:
        """Let go of X'X; counts remain."""
        self._masks = {part: MaskCounts(m.rows, m.counts) for part, m in self._masks.items()}

    def _part(self, found: dict[str, Any], part: str) -> Any:
        if part not in found and part == ALL:
            found[ALL] = found[TRAIN] + found[HELD_OUT]
        if part not in found:
            raise SettingError(
                "no such part of the rows", expected=", ".join({*self.parts, ALL}), got=repr(part)
            )
        return found[part]

    def _collect(self, columns: slice, gram: bool) -> None:
        source, edge = self.source, self.source.complete // BLOCK_ROWS * BLOCK_ROWS
        shift, suffix = source.shift[columns], f"every {self.held_out}" if self.held_out else "all"
        again = bool(self._masks) and not gram

        def new_masks() -> MaskSums:
            return MaskSums(self.num_components, gram, self.device)

        def new_outputs() -> OutputSums:
            return OutputSums(self.num_components, shift, self.device)

        name = f"{source.key}, columns {columns.start} to {columns.stop}, {suffix}"
        kept = source.kept if source.key else None
        outputs = Chain(new_outputs, self.parts, edge, kept, f"outputs of {name}")
        kind = "masks" if gram else "counts"
        masks = None if again else Chain(new_masks, self.parts, edge, source.kept, f"{kind}, {suffix}")
        start = min(outputs.resume, masks.resume if masks else outputs.resume)
        add_blocks(source.blocks(columns, start), masks, outputs, shift, self.held_out, self.device)
        self._outputs = columns, outputs.finish()
        if masks:
            self._masks = masks.finish()
        self._require_rows()
        for part, found in self._outputs[1].items():
            if found.rows != self._masks[part].rows:
                raise FitError(
                    "the rows have changed while they were read",
                    expected=f"{self._masks[part].rows} rows ({part})",
                    got=f"{found.rows}",
                    todo="fit again",
                )

    def _require_rows(self) -> None:
        rows = {part: found.rows for part, found in self._masks.items()}
        if sum(rows.values()) < 2 or not all(rows.values()):
            raise _too_few(", ".join(f"{count} ({part})" for part, count in rows.items()))

    def blocks(self, columns: slice, part: str = ALL) -> Iterator[RowBlock]:
        """The rows themselves, block by block."""
        for block in in_order(self.source.blocks(columns)):
            if part != ALL:
                here = is_held_out(block.rows, self.held_out) == (part == HELD_OUT)
                block = RowBlock(block.rows[here], block.masks[here], block.outputs[here])
            yield block
            del block  # before the next is read

    def packed(self, part: str = ALL) -> PackedMasks:
        """All masks of a part in memory, eight components to a byte."""
        bits = np.empty((self.num_rows, (self.num_components + 7) // 8), np.uint8)
        count = 0
        for block in self.blocks(slice(0, 0), part):
            bits[count : count + len(block.rows)] = np.packbits(block.masks, axis=1, bitorder="little")
            count += len(block.rows)
        return PackedMasks(bits[:count], self.num_components)


def _too_few(got: str) -> FitError:
    return FitError(
        "too few rows to fit",
        expected="at least 2, and some to hold out where they choose the penalty",
        got=got,
        todo="run the study first",
    )


@dataclass(frozen=True)
class PackedMasks:
    """Masks as bits: uint8 [rows, ceil(components / 8)], least significant bit first."""

    bits: np.ndarray
    num_components: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.bits)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[slice, np.ndarray]]:
        """Positions and masks bool [k, components] of up to `size` rows at a time."""
        for start in range(0, self.rows, size):
            here = slice(start, min(start + size, self.rows))
            masks = np.unpackbits(self.bits[here], axis=1, count=self.num_components, bitorder="little")
            yield here, masks.view(bool)
