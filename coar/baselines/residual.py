"""hybrid: what a prior knows of the weights, and ridge regression on what it leaves of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from coar.attribution_blocks import Block, write_blocks
from coar.attributions import Attributions
from coar.baselines.cost import spent
from coar.errors import FitError, SettingError
from coar.progress import progress_bar
from coar.regression import Ridge
from coar.regression.algorithms import Fitter
from coar.regression.doubts import warn_design
from coar.regression.matrix_free import Prediction
from coar.regression.memory import memory_bytes
from coar.regression.problem import Problem
from coar.regression.study_rows import StudyRows
from coar.rows import RowBlock, require_output
from coar.study import Study
from coar.task import resolve_device


def hybrid(
    study: Study,
    prior: Attributions,
    solver: Ridge | None = None,
    *,
    save_as: str | None = None,
    partial: bool = False,
    memory: int | str | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Attributions:
    """Scale a prior to the rows of a study, and fit ridge regression to what it does not explain.

    One slope for all columns, by least squares of outputs on the prior's predictions, both centred per
    column; then, with the predictions times the slope taken away from the rows, ridge as `coar.fit` does
    it. Weights are the sum of both. Cheap priors: `attribution_patching`, or gate gradients.

    Args:
        study: its rows are read twice, once for the slope (and as often as `coar.fit` would).
        prior: attributions of the same components, for the study's columns or some of them.
        solver: default `coar.Ridge()`.
        save_as: write to attributions/NAME in the study as blocks of columns are done.
        partial: fit what is there although rows are missing.
        memory: bytes, or text such as "8 GiB", to plan with; see `coar.fit`.
        device: where to compute; default the first CUDA device, else the CPU.
        progress: show a bar over blocks of columns.

    Returns:
        Attributions for the prior's columns, in output units; errors and details are those of the ridge
        part (`residual_r2`: what it explains of what the prior leaves).

    Raises:
        SettingError: not a study and attributions, or the study has no such output.
        AxisError: components or columns of the prior are not the study's.
        FitError: rows are missing, or too few.

    >>> import tempfile
    >>> from coar.baselines import attribution_patching
    >>> from coar.designs import Bernoulli
    >>> from coar.testing import linear_experiment
    >>> experiment, truth = linear_experiment()
    >>> study = Study.create(tempfile.mkdtemp(), experiment, Bernoulli(ablation_fraction=0.2), num_rows=40)
    >>> _ = study.run(progress=False)
    >>> found = hybrid(study, attribution_patching(experiment, progress=False))
    >>> bool(np.allclose(found.weights, truth, atol=1e-5)), found.provenance["forwards"]
    (True, 43)
    """
    chosen = _chosen(study, prior)
    solver = _ridge(solver)
    _require_rows(study, partial)
    path = study.attributions_path(save_as) if save_as else None
    where, budget = resolve_device(device), memory_bytes(memory)
    rows = StudyRows(study, prior.output, chosen, keep=True)
    slope = _slope(rows, prior, Problem(rows, budget=budget, device=where).column_slices, where)
    problem = Problem(ResidualRows(rows, prior, slope, where), budget=budget, device=where)
    fitter = solver.prepare(problem)
    warn_design(problem.counts(), getattr(fitter, "rank", None))
    provenance = _provenance(study, prior, problem.counts().rows) | {
        "slope": slope,
        "solver": solver.model_dump(mode="json"),
        "notes": fitter.notes,
    }
    axis = study.columns[prior.output]
    axes = study.components, axis if len(chosen) == len(axis) else axis.subset(chosen), prior.output
    blocks = _blocks(problem, fitter, prior, slope, progress)
    if path:
        write_blocks(path, blocks, *axes, provenance)
        return Attributions.load(path)
    arrays = [block.arrays() for block in blocks]
    whole = Block.from_arrays(0, {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]})
    weights, intercept, errors, details = whole.weights, whole.intercept, whole.errors, whole.details
    return Attributions(weights, intercept, *axes, errors=errors, details=details, provenance=provenance)


class ResidualRows:
    """Rows less what a scaled prior predicts of them; see `coar.regression.problem.RowSource`.

    Args:
        rows: of the prior's columns.
        prior: whose intercept does not matter.
        slope: that its weights are multiplied with.
        device: where predictions are computed.
    """

    key = None  # sums of X'Y are of this prior alone; those of X'X are the study's

    def __init__(self, rows: StudyRows, prior: Attributions, slope: float, device: torch.device) -> None:
        self._rows, self._prior, self._slope, self._device = rows, prior, slope, device
        self.num_components, self.num_columns = rows.num_components, rows.num_columns
        self.num_rows, self.complete, self.kept = rows.num_rows, rows.complete, rows.kept
        everything = [block.weights.sum(axis=1, dtype=np.float64) for block in prior.blocks()]
        self.shift = rows.shift - slope * np.concatenate(everything)

    def blocks(self, columns: slice, start: int = 0) -> Iterator[RowBlock]:
        """Rows from number `start` on, outputs float64."""
        predictions = _Predictions(self._prior, columns, self._device)
        for block in self._rows.blocks(columns, start):
            left = block.outputs.astype(np.float64)
            if left.size:
                left -= self._slope * predictions(block.masks)
            yield RowBlock(block.rows, block.masks, left)
            del block, left  # before the next is read


class _Predictions:
    """Masks bool [rows, components] -> weights . mask of some of the prior's columns, float64."""

    def __init__(self, prior: Attributions, columns: slice, device: torch.device) -> None:
        self._device = device
        positions = np.arange(len(prior.columns))[columns]
        if len(positions):
            weights = torch.from_numpy(prior.rows(positions)).to(device).double()
            level = torch.zeros(weights.shape[1], dtype=torch.float64, device=device)
            self._of = Prediction(level, weights.T.contiguous())

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        kept = torch.from_numpy(np.ascontiguousarray(masks)).to(self._device).view(torch.int8)
        return self._of(kept).cpu().numpy()


def _slope(rows: StudyRows, prior: Attributions, slices: list[slice], device: torch.device) -> float:
    """Least squares of outputs on predictions, centred per column, over all rows and columns at once."""
    both = own = 0.0
    for columns in slices:
        predictions = _Predictions(prior, columns, device)
        sums: Any = 0.0  # of predictions, of outputs, of their products, of squared predictions
        count = 0
        for block in rows.blocks(columns):
            found, outputs = predictions(block.masks), block.outputs - rows.shift[columns]
            if not count:
                level = found[0]  # so that sums are of differences
            found = found - level
            sums = sums + np.stack([p.sum(axis=0) for p in (found, outputs, found * outputs, found**2)])
            count += len(block.rows)
            del block, found, outputs  # before the next is read
        if count:
            both += float((sums[2] - sums[0] * sums[1] / count).sum())
            own += float((sums[3] - sums[0] ** 2 / count).sum())
    return both / own if own > 0 else 0.0  # a prior that says the same of every mask says nothing


def _blocks(
    problem: Problem, fitter: Fitter, prior: Attributions, slope: float, progress: bool
) -> Iterator[Block]:
    # No word about columns that choose the largest penalty: what a good prior leaves is noise.
    with progress_bar(problem.num_columns, "columns", progress) as bar:
        for columns in problem.column_slices:
            block = fitter.fit(columns)
            bar.update(len(block))
            yield _with_prior(block, prior, slope)


def _with_prior(block: Block, prior: Attributions, slope: float) -> Block:
    weights = slope * prior.rows(range(block.start, block.start + len(block))).astype(np.float64)
    details = {("residual_r2" if key == "r2" else key): v for key, v in (block.details or {}).items()}
    return Block(block.start, weights + block.weights, block.intercept, block.errors, details)


def _provenance(study: Study, prior: Attributions, rows: int) -> dict[str, Any]:
    design = study.spec.to_json()["design"]
    cost = spent(prior.provenance, prior.columns)
    return {
        "method": "hybrid",
        "prior": prior.provenance,
        "study": study.spec.digest,
        "design": design,
        "rows": rows,
        "passes": prior.provenance.get("passes", 0),
        "forwards": None if cost is None else cost + rows,
        "ablation_fraction": design.get("ablation_fraction"),
        "seed": design.get("seed"),
    }


def _chosen(study: Study, prior: Attributions) -> np.ndarray:
    """Positions of the prior's columns in the study."""
    for value, kind, what in ((study, Study, "study"), (prior, Attributions, "prior")):
        if not isinstance(value, kind):
            raise SettingError(
                f"hybrid(study, prior): not a {what}",
                expected=f"coar.{kind.__name__}",
                got=type(value).__name__,
                todo="rows: coar.Study.open(path) or create; a prior: for example attribution_patching",
            )
    name = require_output(prior.output, list(study.columns))
    prior.components.require_same(study.components, "prior", "study")
    return prior.columns.locate(study.columns[name], "prior", "study")


def _ridge(solver: Ridge | None) -> Ridge:
    if solver is not None and not isinstance(solver, Ridge):
        raise SettingError("a hybrid is fitted by ridge", expected="coar.Ridge()", got=f"{solver!r:.80}")
    return solver or Ridge()


def _require_rows(study: Study, partial: bool) -> None:
    status = study.status()
    if not status.complete and not partial:
        raise FitError(
            f"rows of {study.directory} are missing",
            expected=f"{status.num_rows} rows",
            got=f"{status.rows} rows",
            todo="run the study to the end (`coar run`), or take what is there: partial=True",
        )
