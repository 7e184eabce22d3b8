"""Collecting statistics: one streaming pass over row blocks, in ranges that can be kept on disk.

Sums are formed in one order whatever the shards, workers or interruptions: block by block within
ranges of `RANGE_ROWS` row numbers, then range by range. What is kept of a range is loaded instead of
read again, so that after new rows only they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from coar.errors import FitError, OutputError
from coar.regression.products import COLUMNS, FixedPoint, fixed_point
from coar.regression.statistics import MaskSums, OutputSums
from coar.rows import RowBlock

BLOCK_ROWS = 2048
RANGE_ROWS = 32 * BLOCK_ROWS
ALL, TRAIN, HELD_OUT = "all", "train", "held_out"


class Kept(Protocol):
    """Where sums over ranges of rows are kept; see `coar.regression.sums`."""

    def load(self, key: str) -> Iterable[tuple[int, int, dict[str, Any]]]:
        """(first row, end, {part: statistics}) of ranges that follow each other from row 0."""

    def write(self, key: str, start: int, stop: int, found: Mapping[str, Any]) -> None:
        """Keep a range, in place of a shorter one with the same start."""


class Chain:
    """Sums of one kind, for each part of the rows, over ranges in row order.

    Args:
        new: makes empty sums.
        parts: names of the parts.
        edge: all rows below it are there, whole blocks of them: what is summed up to here may be kept.
        kept: where ranges are kept, or None.
        key: what is summed; the same key, the same sums.
    """

    def __init__(
        self,
        new: Callable[[], MaskSums | OutputSums],
        parts: Sequence[str],
        edge: int,
        kept: Kept | None,
        key: str,
    ) -> None:
        self._new, self._parts, self._edge, self._kept, self._key = new, parts, edge, kept, key
        self._merged: dict[str, Any] = {}
        self._start = 0  # of the range at hand
        self.resume = 0  # rows below are summed
        self._running = self._empty()
        for start, stop, found in kept.load(key) if kept else ():
            self._start, self.resume = start, stop
            if stop % RANGE_ROWS:
                for part, sums in self._running.items():
                    sums.load(found[part])
            else:
                self._restart(found, stop)

    def _empty(self) -> dict[str, Any]:
        return {part: self._new() for part in self._parts}

    def _restart(self, found: Mapping[str, Any], start: int) -> None:
        """Put the sums of a range with the others, and begin the next one."""
        for part, statistics in found.items():
            self._merged[part] = self._merged[part] + statistics if part in self._merged else statistics
        self._start, self._running = start, self._empty()

    def add(self, first: int, part: str, *rows: Any) -> None:
        """Add rows of a part, of the block that begins at row `first`."""
        if first >= self.resume:
            self._running[part].add(*rows)

    def count(self, first: int, part: str, rows: int) -> None:
        """Say how many rows of a part, of the block that begins at row `first`, were added."""
        if first >= self.resume:
            self._running[part].rows += rows

    def advance(self, row: int) -> None:
        """Close every range that ends at or before `row`."""
        while (stop := self._boundary()) <= row:
            found = {part: sums.found() for part, sums in self._running.items()}
            if self._kept and self.resume < stop <= self._edge:
                self._kept.write(self._key, self._start, stop, found)
            self._restart(found, stop)

    def _boundary(self) -> int:
        end = (self._start // RANGE_ROWS + 1) * RANGE_ROWS
        return self._edge if self._start < self._edge < end else end

    def finish(self) -> dict[str, Any]:
        """All sums, {part: statistics}."""
        self.advance(self._edge)
        if not self._merged or any(sums.rows for sums in self._running.values()):
            self._restart({part: sums.found() for part, sums in self._running.items()}, self._start)
        return self._merged


def add_blocks(
    blocks: Iterable[RowBlock],
    masks: Chain | None,
    outputs: Chain,
    shift: np.ndarray,
    held_out: int,
    device: torch.device,
) -> None:
    """Stream rows into chains of sums.

    Args:
        blocks: from `coar.rows.row_blocks` with `BLOCK_ROWS`.
        masks: of `MaskSums`, or None.
        outputs: of `OutputSums`.
        shift: of these columns, [columns].
        held_out: every row with `row % held_out == held_out - 1` is held out; 0: none.
        device: where to compute.

    Raises:
        FitError: rows that come twice.
        OutputError: NaN or infinite outputs.
    """
    moved = torch.from_numpy(shift).to(device)
    chains = (masks, outputs) if masks else (outputs,)
    for block in in_order(blocks):
        first = int(block.rows[0]) // BLOCK_ROWS * BLOCK_ROWS
        kept = torch.from_numpy(np.ascontiguousarray(block.masks)).to(device).view(torch.int8)
        for chain in chains:
            chain.advance(first)
        parts = [
            (part, here, kept if part == ALL else kept[here]) for part, here in parts_of(block.rows, held_out)
        ]
        for part, _, rows in parts:
            if masks:
                masks.add(first, part, rows)
        _add_outputs(outputs, block, first, parts, moved)
        for part, _, rows in parts:
            outputs.count(first, part, len(rows))
        del block, kept, parts, rows  # before the next is read: one block in memory, not two
        for chain in chains:  # and before sums are written: these are not there with a block, either
            chain.advance(first + BLOCK_ROWS)


def _add_outputs(
    outputs: Chain,
    block: RowBlock,
    first: int,
    parts: Sequence[tuple[str, torch.Tensor, torch.Tensor]],
    shift: torch.Tensor,
) -> None:
    """Add outputs of a block, some columns at a time: whole numbers of all of them would be another block.

    Args:
        outputs: of `OutputSums`.
        block: the rows.
        first: row that the block begins at.
        parts: their names, where their rows are, and masks.
        shift: [columns].
    """
    for start in range(0, len(shift), COLUMNS):
        some = slice(start, start + COLUMNS)
        values = torch.from_numpy(np.ascontiguousarray(block.outputs[:, some])).to(shift.device)
        whole = fixed_point(values, shift[some])
        require_finite(whole, block, start)
        for part, here, rows in parts:
            outputs.add(first, part, rows, whole if part == ALL else whole[here], some)


def parts_of(rows: np.ndarray, held_out: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Positions of the rows of each part."""
    if not held_out:
        yield ALL, torch.arange(len(rows))
        return
    away = torch.from_numpy(is_held_out(rows, held_out))
    yield TRAIN, torch.nonzero(~away)[:, 0]
    yield HELD_OUT, torch.nonzero(away)[:, 0]


def is_held_out(rows: np.ndarray, held_out: int) -> np.ndarray:
    """Whether rows are held out, by their number alone: more rows change nothing for the others."""
    return np.asarray(rows % held_out == held_out - 1)


def in_order(blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
    """Pass blocks on; refuse a row that comes twice or out of order."""
    last = -1
    for block in blocks:
        steps = np.diff(block.rows, prepend=last)
        if (steps <= 0).any():
            row = int(block.rows[np.argmax(steps <= 0)])
            raise FitError(
                f"row {row} comes twice, or out of order",
                expected="each row once, in increasing order",
                got=f"row {row} after row {max(last, int(block.rows.max()))}",
                todo="remove the repeated rows",
            )
        last = int(block.rows[-1])
        yield block
        del block  # before the next is read


def require_finite(whole: FixedPoint, block: RowBlock, start: int) -> None:
    """Name the first NaN or infinity of a block; `whole` has its columns from `start` on."""
    if bool(torch.isfinite(whole.scale).all()):
        return
    row, column = np.argwhere(~np.isfinite(block.outputs[:, start : start + len(whole.scale)]))[0] + [
        0,
        start,
    ]
    raise OutputError(
        f"row {block.rows[row]}: the output of column {column} is not finite",
        expected="finite outputs",
        got=float(block.outputs[row, column]),
        todo="leave the row out, or compute it again",
    )
