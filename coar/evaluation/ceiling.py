"""The linear ceiling: the correlation that the best linear model of a column would reach.

No attribution can do better than the linear model with the exact weights w. With independent masks, ablated
with probability a, its predictions have the variance L = a (1 - a) |w|^2, and its R2 is L / var f. What has
to be estimated is |w|^2 without the noise of any one estimate, from products of independent ones:

- of rows, by the difference that a component makes between rows of disjoint groups (`linear_ceiling`);
- of gate gradients, by their replicates (`ceiling_from_replicates`), where var f is what they explain plus
  what they leave of held-out rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from coar.attributions import Attributions
from coar.designs import Bernoulli
from coar.errors import FitError, SettingError
from coar.metrics import Estimate, Table, interval
from coar.randomness import integers
from coar.regression.collection import BLOCK_ROWS
from coar.regression.fitting import column_positions
from coar.rows import require_output, row_blocks
from coar.study import Study

GROUPS = 10  # of rows
COLUMNS = 1_000  # the ceiling is a mean over columns: so many tell it
GROUP_BYTES = 2**29  # of sums; where they would take more, fewer columns tell it
LEAST_ROWS = 4 * GROUPS
STUDENT = 2.262  # 97.5 % of Student's t with GROUPS - 1 degrees of freedom
DRAWS = 500


def linear_ceiling(
    study: Study, *, output: str | None = None, columns: Sequence[int | str] | np.ndarray | None = None
) -> Estimate:
    """Correlation of the best linear model, mean over columns, from the rows of a study.

    |w|^2 is unbiased: the sum over pairs of groups of rows of the products of their estimates (the mean of
    (kept - chance) times output), which needs no regression and no more rows than components. With few rows
    per component the interval is wide; gate gradients then tell it better.

    Args:
        study: its rows were drawn by `Bernoulli`; those that are there are read once.
        output: which output; needed where there are several.
        columns: names or positions of the columns to take the mean over; default all.

    Returns:
        The mean over (at most 1,000) columns with a 95 % interval from leaving out groups of rows in turn.
        Columns whose output never changes are left out.

    Raises:
        SettingError: another design, whose components are not ablated independently.
        FitError: fewer than 40 rows, or no column changes.

    >>> import tempfile
    >>> from coar.testing import SubsetMean
    >>> design = Bernoulli(ablation_fraction=0.3)
    >>> study = Study.create(tempfile.mkdtemp(), SubsetMean(), design, num_rows=2_000)
    >>> _ = study.run(progress=False)
    >>> linear_ceiling(study).value > 0.97  # a mean is almost linear in what it is taken of
    True
    """
    if not isinstance(study, Study):
        raise SettingError(
            "the first argument is a study of random ablations",
            expected="coar.Study",
            got=type(study).__name__,
            todo="of gate gradients `coar.evaluate` tells the ceiling, from held-out rows",
        )
    design, name = study.spec.design, require_output(output, list(study.columns))
    if not isinstance(design, Bernoulli):
        raise SettingError(
            "the linear ceiling needs components that are ablated independently",
            expected="rows of coar.Bernoulli",
            got=design.name,
            todo="evaluate with ceiling=None",
        )
    items = study.finished()
    bounds = _bounds(sum(map(len, items)))
    positions = column_positions(study, name, columns)
    chosen = positions[_some_columns(len(positions), len(study.components))]
    sums = _Sums(len(study.components), len(chosen), 1 - design.ablation_fraction)
    read = 0
    for block in row_blocks(study.store, items, name, study.untouched[name], BLOCK_ROWS, chosen):
        outputs = block.outputs.astype(np.float64) - study.untouched[name][chosen]
        for group, (start, stop) in enumerate(pairwise(bounds)):
            here = slice(max(0, start - read), max(0, stop - read))
            sums.add(group, block.masks[here], outputs[here])
        read += len(block.rows)
    return sums.ceiling()


class _Sums:
    """Sums of (kept - chance) times output over groups of rows."""

    def __init__(self, components: int, columns: int, kept: float) -> None:
        self._kept = kept
        self._products = np.zeros((GROUPS, components, columns))
        self._moves = np.zeros((GROUPS, components))
        self._totals, self._squares = np.zeros((GROUPS, columns)), np.zeros((GROUPS, columns))
        self._rows = np.zeros(GROUPS)

    def add(self, group: int, masks: np.ndarray, outputs: np.ndarray) -> None:
        """Add rows of a group: masks bool [rows, components], outputs float64 [rows, columns]."""
        if not len(masks):
            return
        moves = masks.astype(np.float64) - self._kept
        self._products[group] += moves.T @ outputs
        self._moves[group] += moves.sum(axis=0)
        self._totals[group] += outputs.sum(axis=0)
        self._squares[group] += (outputs**2).sum(axis=0)
        self._rows[group] += len(masks)

    def ceiling(self) -> Estimate:
        """The mean over columns, and its jackknife interval."""
        mean = self._totals.sum(axis=0) / self._rows.sum()
        for products, moves in zip(self._products, self._moves, strict=True):
            products -= np.outer(moves, mean)  # outputs less their mean: less noise
        everything = self._products.sum(axis=0)
        own = np.einsum("gpc,gpc->gc", self._products, self._products)
        with_all = np.einsum("gpc,pc->gc", self._products, everything)
        whole = (everything**2).sum(axis=0) - own.sum(axis=0)
        moving = self._moving()
        r2 = self._r2(whole, np.ones(GROUPS, dtype=bool))[moving]
        without = [whole - 2 * (with_all[group] - own[group]) for group in range(GROUPS)]
        away = np.stack([self._r2(w, np.arange(GROUPS) != g)[moving] for g, w in enumerate(without)])
        noise = float(((GROUPS - 1) / GROUPS * ((away - away.mean(axis=0)) ** 2).sum(axis=0)).mean())
        centres = away.mean(axis=1)
        spread = np.sqrt((GROUPS - 1) / GROUPS * ((centres - centres.mean()) ** 2).sum())
        # Of the mean R2, which is not cut off at 0 or 1: an interval that ends there is as wide as it is.
        margins = (0.0, -STUDENT * spread, STUDENT * spread)
        return Estimate(*(mean_root(r2 + margin, noise) for margin in margins))

    def _variance(self, groups: np.ndarray) -> np.ndarray:
        rows = self._rows[groups].sum()
        total, squares = self._totals[groups].sum(axis=0), self._squares[groups].sum(axis=0)
        return (squares - total**2 / rows) / (rows - 1)

    def _moving(self) -> np.ndarray:
        """Columns whose outputs change."""
        found = (
            self._variance(np.ones(GROUPS, dtype=bool)) > 1e-12 * self._squares.sum(axis=0) / self._rows.sum()
        )
        if not found.any():
            raise FitError(
                "there is nothing to explain", expected="outputs that change", got="constant outputs"
            )
        return found

    def _r2(self, products: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Of each column [columns], not confined to 0..1; `products` over pairs of different groups."""
        rows = self._rows[groups]
        explained = products / (rows.sum() ** 2 - (rows**2).sum()) / (self._kept * (1 - self._kept))
        variance = self._variance(groups)
        return np.divide(explained, variance, out=np.zeros(len(variance)), where=variance > 0)


def mean_root(r2: np.ndarray, noise: float) -> float:
    """Mean of sqrt(R2) over columns whose R2 is known with noise.

    The root of a noisy number is too small on average, and of one that is cut off at 0 too large: columns are
    first drawn together until their spread is what noise leaves of it.

    Args:
        r2: [columns], perhaps below 0 or above 1.
        noise: variance of what is wrong with each, mean over columns.

    >>> mean_root(np.array([0.25, 1.0]), noise=0.0)
    0.75
    """
    centre, spread = max(0.0, float(r2.mean())), float(r2.var())
    share = np.sqrt(max(0.0, 1 - noise / spread)) if spread > 0 else 0.0
    return float(np.sqrt(np.clip(centre + share * (r2 - centre), 0.0, 1.0)).mean())


def _bounds(rows: int) -> np.ndarray:
    if rows < LEAST_ROWS:
        raise FitError("the linear ceiling needs rows", expected=f"at least {LEAST_ROWS}", got=rows)
    return np.linspace(0, rows, GROUPS + 1).astype(int)


def _some_columns(columns: int, components: int) -> np.ndarray:
    most = max(1, min(COLUMNS, GROUP_BYTES // (8 * GROUPS * components)))
    return np.unique(np.linspace(0, columns - 1, min(columns, most)).astype(int))


@dataclass(frozen=True)
class _Pieces:
    """Per column [columns], of one estimate v of the exact weights w, in its own scale."""

    signal: np.ndarray  # unbiased for |w|^2
    agreement: np.ndarray  # unbiased for v . w
    own: np.ndarray  # |v|^2


def tells_ceiling(source: object) -> bool:
    """Whether there is a linear ceiling to be had from a study or attributions."""
    if isinstance(source, Study):
        return isinstance(source.spec.design, Bernoulli) and sum(map(len, source.finished())) >= LEAST_ROWS
    return isinstance(source, Attributions) and has_replicates(source)


def has_replicates(attributions: Attributions) -> bool:
    """Whether attributions say what independent replicates agree on: it takes three of them."""
    known = next(attributions.blocks()).details or {}
    return {"signal", "agreement"} <= set(known) and attributions.provenance.get("replicates", 3) >= 3


def ceiling_from_replicates(
    found: Sequence[Attributions], truth: Table, predicted: Sequence[Table], fraction: float, seed: int
) -> Estimate | None:
    """Correlation of the best linear model, mean over columns, from gate gradients and held-out rows.

    R2 = L / (L + E): E is what the weights v at hand leave of the rows, less a (1 - a) |w - s v|^2, which
    is their own error; s is the slope of the rows on v. So no variance over all of few rows is in it, nor
    a correlation that any method has reached.

    Args:
        found: gate gradients of the same columns, of one or several seeds.
        truth: outputs of held-out rows, [rows, columns].
        predicted: of each of `found`, likewise.
        fraction: of components ablated in these rows; that of the attributions, too.
        seed: of the bootstrap over rows.

    Returns:
        With an interval over rows and columns (their gates are independent); None where replicates do not
        agree on anything.
    """
    columns = _some_columns(truth.shape[1], len(found[0].components))
    outputs = np.asarray(truth[:, columns], np.float64)
    pieces = [_pieces(one, columns) for one in found]
    moving = (np.ptp(outputs, axis=0) > 0) & np.all([piece.own > 0 for piece in pieces], axis=0)
    if not moving.any():
        return None
    signal = np.mean([piece.signal for piece in pieces], axis=0)[moving]
    weights, r2 = _row_weights(len(outputs), seed), []
    for piece, table in zip(pieces, predicted, strict=True):
        here = _Pieces(signal, piece.agreement[moving], piece.own[moving])
        of_rows = outputs[:, moving], np.asarray(table[:, columns])[:, moving]
        if (found_r2 := _linear_r2(here, *of_rows, fraction, weights)) is None:
            return None
        r2.append(found_r2)
    mean = np.mean(r2, axis=0)
    noise = float(mean[1:].var(axis=0).mean())  # of a column, from its rows
    count = int(moving.sum())
    chosen = [integers(seed, "bootstrap columns", draw, count, below=count) for draw in range(DRAWS)]
    drawn = [mean_root(one[which], noise) for one, which in zip(mean[1:], chosen, strict=True)]
    return Estimate(mean_root(mean[0], noise), *interval(np.array(drawn)))


def _row_weights(rows: int, seed: int) -> np.ndarray:
    """Of the rows as they are, and of each draw, [1 + draws, rows]."""
    drawn = (integers(seed, "bootstrap rows", draw, rows, below=rows) for draw in range(DRAWS))
    counts = [np.bincount(which, minlength=rows) for which in drawn]
    return np.stack([np.ones(rows), *counts]) / rows


def _pieces(found: Attributions, columns: np.ndarray) -> _Pieces:
    own = np.concatenate([(block.weights.astype(np.float64) ** 2).sum(axis=1) for block in found.blocks()])
    return _Pieces(found.detail("signal")[columns], found.detail("agreement")[columns], own[columns])


def _linear_r2(
    piece: _Pieces, truth: np.ndarray, predicted: np.ndarray, fraction: float, weights: np.ndarray
) -> np.ndarray | None:
    """R2 of exact weights, [1 + draws, columns]; None where replicates agree on nothing."""
    y, p = truth - truth.mean(axis=0), predicted - predicted.mean(axis=0)
    if not (piece.agreement.sum() > 0 and piece.signal.sum() > 0 and (p * p).sum() > 0):
        return None
    slope = float((y * p).sum() / (p * p).sum())
    scale = slope / float((piece.agreement / piece.own).mean())  # of exact weights, in the rows
    chance = fraction * (1 - fraction)
    error = scale**2 * piece.signal - 2 * slope * scale * piece.agreement + slope**2 * piece.own
    rest = y - slope * p
    few = len(y) / (len(y) - 1)  # a variance from few rows is small, that of rows drawn from them twice
    left = (weights @ rest**2 - (weights @ rest) ** 2) * np.where(np.arange(len(weights)) > 0, few**2, few)[
        :, None
    ]
    linear = np.maximum(chance * scale**2 * piece.signal, 0.0)
    return linear / (linear + np.maximum(left - chance * error, 1e-300))
