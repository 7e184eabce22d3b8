"""Reliability: would other rows, or other passes, have given the same attributions?

That is not a ceiling. Attributions of many rows are reliable whether or not the model is linear in its
components; and a noisy method may be far from reliable and still predict what matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from coar.attributions import Attributions
from coar.errors import FitError, SettingError
from coar.evaluation.ceiling import has_replicates
from coar.metrics import Estimate, interval, pearson
from coar.randomness import integers
from coar.regression import fit
from coar.regression.fitting import DEFAULT_SOLVER, Solver
from coar.study import Study

DRAWS = 500


@dataclass(frozen=True)
class Reliability:
    """Agreement of attributions with themselves.

    Attributes:
        halves: correlation over components of the weights from two halves, per column [columns]; NaN where
            it is not defined.
        whole: reliability of all rows or passes together, mean over columns, by Spearman and Brown's formula
            2 r / (1 + r), with a 95 % interval over columns (which share the rows). Of gate gradients, the
            squared correlation with exact weights that replicates estimate.
    """

    halves: np.ndarray
    whole: Estimate

    def __str__(self) -> str:
        halves = float(np.nanmean(self.halves))
        return f"reliability {self.whole} (two halves correlate by {halves:.3f})"


def split_half(
    source: Study | Attributions, solver: Solver = DEFAULT_SOLVER, *, output: str | None = None
) -> Reliability:
    """Do two halves of the rows (or of the passes) give the same weights?

    Args:
        source: a study, of which both halves of the rows are fitted; or gate gradients, whose replicates say
            how far their weights agree with exact ones.
        solver: of the fits.
        output: which output of the study; needed where there are several.

    Returns:
        The correlation of weights over components, per column and as a mean.

    Raises:
        FitError: rows are missing.
        SettingError: attributions of one piece, which cannot say.

    >>> import tempfile
    >>> from coar.designs import Bernoulli
    >>> from coar.testing import SubsetMean
    >>> study = Study.create(tempfile.mkdtemp(), SubsetMean(), Bernoulli(ablation_fraction=0.3), num_rows=400)
    >>> _ = study.run(progress=False)
    >>> split_half(study).whole.value > 0.95
    True
    """
    if isinstance(source, Study):
        return _of_halves(_halves_of_rows(source, solver, output))
    if isinstance(source, Attributions) and has_replicates(source):
        return _of_replicates(source)
    raise SettingError(
        "nothing to split",
        expected="a study, or gate gradients with replicates",
        got=repr(source)[:80],
        todo="give the study that the attributions were fitted to",
    )


def _halves_of_rows(study: Study, solver: Solver, output: str | None) -> np.ndarray:
    middle = study.num_rows // 2
    if middle < 2:
        raise FitError("two halves need rows", expected="at least 4", got=study.num_rows)
    parts = (range(middle), range(middle, 2 * middle))
    first, second = (fit(study, solver, output=output, rows=rows) for rows in parts)
    return np.concatenate(
        [
            pearson(ours.weights.T, theirs.weights.T)
            for ours, theirs in zip(first.blocks(), second.blocks(), strict=True)
        ]
    )


def _of_replicates(found: Attributions) -> Reliability:
    """The squared cosine of weights to exact ones, with its sign: of all columns from sums over them."""
    own = np.concatenate([(block.weights.astype(np.float64) ** 2).sum(axis=1) for block in found.blocks()])
    both, signal = found.detail("agreement"), found.detail("signal")
    sums = np.stack([both, own, signal], axis=1)  # each is noisy in a column, and unbiased
    whole = np.clip(both * np.abs(both) / np.where(own * signal > 0, own * signal, np.nan), -1.0, 1.0)
    drawn = [_ratio(sums[which].sum(axis=0)) for which in _drawn(len(sums))]
    return Reliability(whole / (2 - whole), Estimate(_ratio(sums.sum(axis=0)), *interval(np.array(drawn))))


def _ratio(sums: np.ndarray) -> float:
    both, own, signal = sums
    return float(np.clip(both * abs(both) / (own * signal), -1.0, 1.0)) if own * signal > 0 else float("nan")


def _drawn(columns: int) -> Iterator[np.ndarray]:
    for draw in range(DRAWS):
        yield integers(0, "bootstrap columns", draw, columns, below=columns)


def _of_halves(halves: np.ndarray) -> Reliability:
    whole = 2 * halves / (1 + np.maximum(halves, 0.0))
    known = whole[np.isfinite(whole)]
    if not len(known):
        raise FitError(
            "no column has weights that differ", expected="weights of several sizes", got="constants"
        )
    means = np.array([known[which].mean() for which in _drawn(len(known))])
    return Reliability(halves, Estimate(float(known.mean()), *interval(means)))
