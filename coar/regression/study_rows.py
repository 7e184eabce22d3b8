"""The rows of a study's output, as a solver reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coar.files import digest_json
from coar.regression.collection import BLOCK_ROWS
from coar.regression.sums import KeptSums
from coar.rows import RowBlock, as_slice, row_blocks
from coar.study import Study

KEPT_BYTES = 2**30  # sums of one range that take more are made again rather than kept


class StudyRows:
    """Rows of one output of a study that are there now; see `coar.regression.problem.RowSource`.

    Args:
        study: it may grow meanwhile: what came later is not seen.
        output: which output.
        columns: positions of the columns to fit.
        keep: keep sums in the study, and use those that are there.
        rows: numbers of the rows, if not all; sums of a part are not kept.
    """

    def __init__(
        self, study: Study, output: str, columns: np.ndarray, keep: bool, rows: range | None = None
    ) -> None:
        self._rows = range(study.num_rows) if rows is None else rows
        first, last = self._rows.start, self._rows.stop
        self._store, self._output = study.store, output
        self._items = [item for item in study.finished() if item.start < last and item.stop > first]
        self._untouched = study.untouched[output]
        self._columns = columns
        self.num_components, self.num_columns = len(study.components), len(columns)
        self.num_rows = sum(min(item.stop, last) - max(item.start, first) for item in self._items)
        self.shift = self._untouched[columns].astype(np.float64)
        missing = {item.start for item in study.items()} - {item.start for item in self._items}
        self.complete = min(missing, default=study.num_rows) if rows is None else 0
        self.kept = None
        if keep and rows is None:
            folder, digest = study.directory / "statistics", study.store.study_digest
            self.kept = KeptSums(folder, digest, self._mark, KEPT_BYTES)
        # Sums of some columns are not kept: a study would fill with those of every choice.
        everything = len(columns) == len(study.columns[output]) and isinstance(as_slice(columns), slice)
        self.key = output if everything else None
        self._digests: dict[int, str] = {}

    def _mark(self, start: int, stop: int) -> str:
        """Digest of the shards that a range of rows comes from: other shards, other sums."""
        items = [item for item in self._items if item.start < stop and item.stop > start]
        for item in items:
            if item.index not in self._digests:
                self._digests[item.index] = self._store.digest(item)
        return digest_json([[item.index, self._digests[item.index]] for item in items])

    def blocks(self, columns: slice, start: int = 0) -> Iterator[RowBlock]:
        """Rows from number `start` on, in blocks of row numbers, whatever the shards."""
        items = [item for item in self._items if item.stop > start]
        chosen = self._columns[columns]
        for block in row_blocks(self._store, items, self._output, self._untouched, BLOCK_ROWS, chosen):
            wanted = self._wanted(block) if block.rows[0] >= start else None
            del block  # a generator keeps what it names: one block in memory, not two
            if wanted is not None:
                yield wanted
            del wanted

    def _wanted(self, block: RowBlock) -> RowBlock | None:
        """The rows of a block that are in the range."""
        first, last = np.searchsorted(block.rows, [self._rows.start, self._rows.stop])
        if last - first == len(block.rows):
            return block
        here = slice(int(first), int(last))
        return RowBlock(block.rows[here], block.masks[here], block.outputs[here]) if last > first else None
