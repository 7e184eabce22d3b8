"""fit: rows of a study -> attributions, a block of columns at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from coar.attribution_blocks import Block, write_blocks
from coar.attributions import Attributions
from coar.errors import AxisError, FitError, SettingError
from coar.progress import progress_bar
from coar.regression.algorithms import Fitter
from coar.regression.doubts import say, warn_design, warn_edges
from coar.regression.memory import memory_bytes
from coar.regression.problem import Problem
from coar.regression.ridge import Ridge
from coar.regression.study_rows import StudyRows
from coar.rows import require_output
from coar.settings import whole_number
from coar.study import Study
from coar.task import resolve_device

DEFAULT_SOLVER = Ridge()


class Solver(Protocol):
    """What `fit` needs of a solver."""

    @property
    def name(self) -> str:
        """The method's name, for provenance."""

    def prepare(self, problem: Problem) -> Fitter:
        """Do the work shared by all columns."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings as plain JSON."""


def fit(
    study: Study,
    solver: Solver | str = DEFAULT_SOLVER,
    *,
    output: str | None = None,
    columns: Sequence[int | str] | np.ndarray | None = None,
    rows: int | range | None = None,
    save_as: str | None = None,
    partial: bool = False,
    memory: int | str | None = None,
    device: str | torch.device = "auto",
    keep_statistics: bool = True,
    progress: bool = False,
    remarks: Sequence[str] = (),
) -> Attributions:
    """Fit one linear model per column to the rows of a study (COAR, section 3).

    Args:
        study: its rows are read once (twice for exact leave-one-out; as often as there are blocks of
            columns where X'Y of all columns does not fit into a small share of the memory).
        solver: default `Ridge()`, the penalty chosen per column; or `Lasso()`, ...; "auto" is the default.
        output: which output; needed where there are several.
        columns: positions or names of the columns to fit; default all.
        rows: fit to the first so many rows, or to those with numbers in a range; default all.
        save_as: write to attributions/NAME in the study as blocks are done, so that
            [columns, components] need not fit into memory; they are then read lazily.
        partial: fit what is there although rows are missing.
        memory: bytes, or text such as "8 GiB", to plan with; default half of the machine's. It decides
            between algorithms (`provenance["notes"]` says which, and why) and sizes of blocks.
        device: where to compute; default the first CUDA device, else the CPU.
        keep_statistics: keep sums in the study (up to 1 GiB for each 65,536 rows), so that another fit
            reads only new rows.
        progress: show a bar over blocks of columns.
        remarks: kept in the provenance.

    Returns:
        Attributions, in output units per component kept; with standard errors where the method has them.

    Raises:
        FitError: rows are missing, or too few.
        StoreError: a shard, or a file of sums, is damaged; it is named.

    >>> import tempfile
    >>> from coar.designs import Bernoulli
    >>> from coar.testing import SubsetMean
    >>> folder = tempfile.mkdtemp()
    >>> study = Study.create(folder, SubsetMean(), Bernoulli(ablation_fraction=0.3), num_rows=200)
    >>> _ = study.run(progress=False)
    >>> fit(study, Ridge(penalties=0.01), columns=[0, 1])
    Attributions(2 columns x 15 components, output='mean', by ridge)
    """
    if not isinstance(study, Study):
        raise SettingError(
            "the first argument is a study",
            expected="coar.Study",
            got=type(study).__name__,
            todo="open it: coar.Study.open(path); for arrays see docs/regression.md; of gate gradients, "
            "study.attributions() makes attributions",
        )
    solver = _solver(solver)
    name = require_output(output, list(study.columns))
    path = study.attributions_path(save_as) if save_as else None
    numbers = _numbers(study, rows)
    _require_complete(study, partial, numbers)
    chosen = column_positions(study, name, columns)
    source = StudyRows(study, name, chosen, keep_statistics, numbers)
    problem = Problem(source, budget=memory_bytes(memory), device=resolve_device(device))
    fitter = _prepare(solver, problem)
    counts = problem.counts()
    provenance = {
        "method": solver.name,
        "solver": solver.model_dump(mode="json"),
        "study": study.spec.digest,
        "design": study.spec.to_json()["design"],
        "rows": counts.rows,
        "notes": fitter.notes,
    }
    provenance |= {"remarks": list(remarks)} if remarks else {}
    provenance |= {"row_numbers": [numbers.start, numbers.stop]} if numbers is not None else {}
    columns_axis = study.columns[name]
    axes = study.components, columns_axis if columns is None else columns_axis.subset(chosen)
    blocks = fit_blocks(problem, fitter, progress)
    if path:
        write_blocks(path, blocks, *axes, name, provenance)
        return Attributions.load(path)
    whole = _joined(list(blocks))
    return Attributions(
        whole.weights,
        whole.intercept,
        *axes,
        output=name,
        errors=whole.errors,
        details=whole.details,
        provenance=provenance,
    )


def fit_blocks(problem: Problem, fitter: Fitter, progress: bool = False) -> Iterator[Block]:
    """Fit one block of columns after the other."""
    penalties = []
    with progress_bar(problem.num_columns, "columns", progress) as bar:
        for columns in problem.column_slices:
            block = fitter.fit(columns)
            penalties.append((block.details or {}).get("penalty", np.empty(0)))
            bar.update(len(block))
            yield block
    warn_edges(np.concatenate(penalties), getattr(fitter, "penalties", np.empty(0)))


def _prepare(solver: Solver, problem: Problem) -> Fitter:
    fitter = solver.prepare(problem)
    warn_design(problem.counts(), getattr(fitter, "rank", None))
    return fitter


def _solver(solver: Solver | str) -> Solver:
    if solver == "auto":
        return DEFAULT_SOLVER
    if isinstance(solver, str | type) or not hasattr(solver, "prepare"):
        raise SettingError(
            "not a solver", expected='coar.Ridge(), coar.Lasso(), ... or "auto"', got=f"{solver!r:.80}"
        )
    return solver


def column_positions(
    study: Study, output: str, columns: Sequence[int | str] | np.ndarray | None
) -> np.ndarray:
    """Positions of columns that were named, or given by position; None: of all.

    Raises:
        AxisError: no such column, one that comes twice, or none at all.
    """
    axis = study.columns[output]
    if columns is None:
        return np.arange(len(axis))
    plain = isinstance(columns, Iterable) and not isinstance(columns, str)
    if not plain or not all(_names_a_column(column) for column in columns):
        raise AxisError(
            "columns to fit",
            expected='a list of positions or names, such as [0, 1] or ["492"], or a range',
            got=f"{columns!r:.80}",
        )
    found = [axis.positions.get(c, -1) if isinstance(c, str) else int(c) for c in columns]
    for asked, position in zip(columns, found, strict=True):
        if not 0 <= position < len(axis):
            known = f"0 .. {len(axis) - 1}, or a name such as {axis.names[0]!r}"
            raise AxisError(f"no such column of output {output!r}", expected=known, got=repr(asked))
    if not found or len(set(found)) < len(found):
        raise AxisError("columns to fit", expected="at least one, each once", got=f"{list(columns)!r:.80}")
    return np.array(found, dtype=np.int64)


def _names_a_column(column: object) -> bool:
    return isinstance(column, str | int | np.integer) and not isinstance(column, bool)


def _joined(blocks: list[Block]) -> Block:
    arrays = [block.arrays() for block in blocks]
    return Block.from_arrays(0, {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]})


def _numbers(study: Study, rows: int | range | None) -> range | None:
    if rows is None:
        return None
    found = rows if isinstance(rows, range) else range(whole_number(rows, "rows", least=2))
    if found.step != 1 or found.start < 0 or found.stop > study.num_rows or len(found) < 2:
        raise FitError(
            "no such rows",
            expected=f"at least 2, of numbers from 0 to below {study.num_rows:,}, one after the other",
            got=f"{rows!r}",
            todo="ask the study for more rows: `study.extend`",
        )
    return found


def _require_complete(study: Study, partial: bool, numbers: range | None) -> None:
    status, present = study.status(), study.store.present()
    within = numbers if numbers is not None else range(study.num_rows)
    items = [item for item in study.items() if item.start < within.stop and item.stop > within.start]
    missing = [item for item in items if item.index not in present]
    if missing and not partial:
        raise FitError(
            f"{len(missing)} of {len(items)} shards of {study.directory} are missing",
            expected=f"{len(within)} rows",
            got=f"{len(within) - sum(map(len, missing))} rows; first missing: "
            f"{study.store.path(missing[0].index)}",
            todo="run the study to the end (`coar run`), or fit what is there: partial=True (`--partial`)",
        )
    if status.failed_rows:
        say(f"{len(status.failed_rows)} failed rows are left out of the fit; see {study.directory}/failures")
