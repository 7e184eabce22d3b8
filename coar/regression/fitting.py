"""fit: rows of a study -> attributions, a block of columns at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from coar.attribution_blocks import Block, write_blocks
from coar.attributions import Attributions
from coar.errors import CoarWarning, FitError, SettingError
from coar.regression.ridge import Ridge
from coar.regression.statistics import BLOCK_ROWS, MaskStatistics, collect
from coar.rows import RowBlock, require_output, row_blocks
from coar.study import Study

DEFAULT_SOLVER = Ridge()
COLUMN_BLOCK_BYTES = 256 * 2**20  # of X'Y in float64


class Solver(Protocol):
    """What `fit` needs of a solver."""

    @property
    def name(self) -> str:
        """The method's name, for provenance."""

    def prepare(self, masks: MaskStatistics) -> Any:
        """Work shared by all columns; the result has `fit(outputs, start, reread) -> Block`."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings as plain JSON."""


def fit(
    study: Study,
    solver: Solver = DEFAULT_SOLVER,
    *,
    output: str | None = None,
    save_as: str | None = None,
    partial: bool = False,
) -> Attributions:
    """Fit one linear model per column to the rows of a study (COAR, section 3).

    Args:
        study: its rows are read once (twice for exact leave-one-out).
        solver: default `Ridge()`, the penalty chosen per column.
        output: which output; needed where there are several.
        save_as: write to attributions/NAME in the study as blocks are done, so that
            [columns, components] need not fit into memory; they are then read lazily.
        partial: fit what is there although rows are missing.

    Returns:
        Attributions with standard errors, in output units per component kept.

    Raises:
        FitError: rows are missing, or too few.
        StoreError: a shard is damaged; it is named.
    """
    if not hasattr(solver, "prepare"):
        raise SettingError("not a solver", expected="coar.Ridge()", got=repr(solver))
    name = require_output(output, list(study.columns))
    path = study.attributions_path(save_as) if save_as else None
    items = study.finished()
    _require_complete(study, partial)
    fitter = _BlockFitter(study, solver, name, items)
    provenance = {
        "method": solver.name,
        "solver": solver.model_dump(mode="json"),
        "study": study.spec.digest,
        "design": study.spec.to_json()["design"],
        "rows": fitter.rows,
    }
    axes = study.components, study.columns[name]
    if path:
        write_blocks(path, fitter.blocks(), *axes, name, provenance)
        return Attributions.load(path)
    blocks = list(fitter.blocks())
    joined = {key: np.concatenate([b.arrays()[key] for b in blocks]) for key in blocks[0].arrays()}
    whole = Block.from_arrays(0, joined)
    return Attributions(
        whole.weights,
        whole.intercept,
        *axes,
        output=name,
        errors=whole.errors,
        details=whole.details,
        provenance=provenance,
    )


class _BlockFitter:
    """Streams the rows once per block of columns; the design's statistics are made with the first."""

    def __init__(self, study: Study, solver: Solver, output: str, items: list[Any]) -> None:
        self._study, self._output, self._items = study, output, items
        self._untouched = study.untouched[output].astype(np.float64)
        components, columns = len(study.components), len(study.columns[output])
        size = max(1, COLUMN_BLOCK_BYTES // (8 * components))
        self._slices = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
        masks, self._first = collect(
            self._read(self._slices[0]), self._untouched[self._slices[0]], components
        )
        assert masks is not None
        self.rows = masks.rows
        _warn(masks, len(study.components))
        self._path = solver.prepare(masks)
        _warn_rank(masks, getattr(self._path, "rank", None))

    def blocks(self) -> Iterator[Block]:
        """Fit one block of columns after the other."""
        penalties = []
        for columns in self._slices:
            statistics = self._first
            if columns.start:
                shift = self._untouched[columns]
                statistics = collect(self._read(columns), shift, len(self._study.components), gram=False)[1]
            block = self._path.fit(statistics, columns.start, lambda columns=columns: self._read(columns))
            penalties.append((block.details or {}).get("penalty", np.empty(0)))
            yield block
        _warn_edges(np.concatenate(penalties), getattr(self._path, "penalties", np.empty(0)))

    def _read(self, columns: slice) -> Iterator[RowBlock]:
        store, shift = self._study.store, self._untouched
        return row_blocks(store, self._items, self._output, shift, BLOCK_ROWS, columns)


def _require_complete(study: Study, partial: bool) -> None:
    status = study.status()
    if not status.complete and not partial:
        missing = sorted({item.index for item in study.items()} - study.store.present())
        raise FitError(
            f"{len(missing)} of {status.num_shards} shards of {study.directory} are missing",
            expected=f"{status.num_rows} rows",
            got=f"{status.rows} rows; first missing: {study.store.path(missing[0])}",
            todo="run the study to the end (`coar run`), or fit what is there: partial=True (`--partial`)",
        )
    if status.failed_rows:
        _say(f"{len(status.failed_rows)} failed rows are left out of the fit; see {study.directory}/failures")


def _warn(masks: MaskStatistics, num_components: int) -> None:
    constant = int((masks.deviation == 0).sum())
    if constant:
        _say(
            f"{constant} of {num_components} components were kept, or ablated, in every one of {masks.rows} "
            "rows: their weight is 0 and its error infinite; add rows"
        )
    if masks.rows <= num_components:
        _say(
            f"{masks.rows} rows for {num_components} components: with fewer rows than unknowns the weights "
            "lean on the penalty and are shrunk; 5 to 20 rows per component is usual"
        )


def _warn_rank(masks: MaskStatistics, rank: int | None) -> None:
    determined = int((masks.deviation > 0).sum())
    if rank is not None and rank < determined < masks.rows:
        _say(
            f"the masks vary in {rank} directions, not {determined}: in sets of one size, for "
            "example, nothing tells the common level of the weights from the intercept. Predictions hold for "
            "masks of this design; "
            "Bernoulli masks determine every weight"
        )


def _warn_edges(chosen: np.ndarray, grid: np.ndarray) -> None:
    if len(grid) < 3 or not len(chosen):
        return
    # A smallest penalty that shrinks by a thousandth or less is as good as none: nothing lies beyond it.
    at_edge = float(np.mean((chosen == grid.max()) | ((chosen == grid.min()) & (chosen > 1e-3))))
    if at_edge > 0.2:
        _say(
            f"{at_edge:.0%} of the columns chose the smallest or largest penalty ({grid.min():g}, "
            f"{grid.max():g}): widen Ridge(penalties=...)"
        )


def _say(text: str) -> None:
    warnings.warn(text, CoarWarning, stacklevel=2)
