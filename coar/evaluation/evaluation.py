"""Evaluation: true and predicted outputs of held-out ablations, and every figure made of them.

Figures per column: Pearson and Spearman correlation over rows, R2 and calibration slope in output units.
Intervals come from a two-way bootstrap over columns and rows; methods are compared on the same draws.
Columns are read and predicted block by block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from coar.axes import Axis
from coar.errors import SettingError
from coar.evaluation.predicted import Chosen
from coar.metrics import (
    Bootstrap,
    Estimate,
    Table,
    bootstrap_means,
    column_blocks,
    interval,
    per_column,
)

if TYPE_CHECKING:
    import pandas

DRAWS = 500
NOTHING = float("nan")


@dataclass(frozen=True)
class Cost:
    """What made a method, and what that took.

    Attributes:
        family: the method, as the attributions name it.
        made_for: ablation fraction that it was made for, or None.
        forwards: forward passes over all examples, or None where attributions do not say.
    """

    family: str
    made_for: float | None
    forwards: float | None


@dataclass(frozen=True)
class Measured:
    """Figures of one method at one fraction.

    Attributes:
        each: pearson, spearman, r2, slope, float64 [columns] each.
        draws: bootstrapped mean correlations, float64 [draws].
    """

    each: dict[str, np.ndarray]
    draws: np.ndarray


@dataclass(repr=False)
class Evaluation:
    """True and predicted outputs under held-out ablations.

    Attributes:
        columns: axis of the outputs.
        truth: per fraction, [rows, columns]; read as it is indexed where it lies on disk.
        predictions: per method and fraction, [rows, columns]; computed as they are indexed.
        seed: of the masks and of the bootstrap.
        ceilings: per fraction, the correlation of the best linear model where it is known.
        output: name of the output.
        ceiling_sources: per fraction, what told the ceiling.
        costs: per method, what made it and what that took.
    """

    columns: Axis
    truth: dict[float, Table]
    predictions: dict[str, dict[float, Table]]
    seed: int
    ceilings: dict[float, Estimate] = field(default_factory=dict)
    output: str = ""
    ceiling_sources: dict[float, str] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    _measured: dict[tuple[str, float], Measured] = field(default_factory=dict, repr=False)
    _kept: list[Any] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        fractions = ", ".join(f"{fraction:g}" for fraction in self.truth)
        return f"Evaluation({', '.join(self.methods)}; {len(self.columns)} columns, fractions {fractions})"

    def keep(self, folder: Any) -> None:
        """Hold on to a temporary folder that rows are in."""
        self._kept.append(folder)

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order given."""
        return list(self.predictions)

    @property
    def table(self) -> pandas.DataFrame:
        """Tidy: method, ablation_fraction, column, pearson, spearman, r2, slope (NaN = not defined)."""
        import pandas

        parts = []
        for method, fraction in self._pairs():
            head = {"method": method, "ablation_fraction": fraction, "column": self.columns.names}
            parts.append(pandas.DataFrame(head | self._figures(method, fraction).each))
        return pandas.concat(parts, ignore_index=True)

    def means(self) -> pandas.DataFrame:
        """Per method and fraction: means over columns, medians of R2 and slope.

        Returns:
            method, ablation_fraction; correlation with its 95 % interval `low` to `high`; spearman; r2 and
            slope, medians; undefined, how many columns have a constant true or predicted output: they are
            left out; ceiling, the correlation of the best linear model, with its own interval (ceiling_low,
            ceiling_high), and share, correlation / ceiling (NaN where it is not known); family, what made the
            method, made_for, at which ablation fraction, and forwards, passes over all examples that it took.
        """
        import pandas

        return pandas.DataFrame([self._row(method, fraction) for method, fraction in self._pairs()])

    def _pairs(self) -> list[tuple[str, float]]:
        return [(method, fraction) for method in self.methods for fraction in self.predictions[method]]

    def _row(self, method: str, fraction: float) -> dict[str, Any]:
        found = self._figures(method, fraction)
        each, defined = found.each, np.isfinite(found.each["pearson"])
        low, high = interval(found.draws)
        ceiling = self.ceilings.get(fraction, Estimate(NOTHING, NOTHING, NOTHING))
        cost = self.costs.get(method, Cost("", None, None))
        correlation = _over(np.mean, each["pearson"])
        return {
            "method": method,
            "ablation_fraction": fraction,
            "correlation": correlation,
            "low": low,
            "high": high,
            "spearman": _over(np.mean, each["spearman"]),
            "r2": _over(np.median, each["r2"]),
            "slope": _over(np.median, each["slope"]),
            "undefined": int((~defined).sum()),
            "ceiling": ceiling.value,
            "ceiling_low": ceiling.low,
            "ceiling_high": ceiling.high,
            "share": correlation / ceiling.value if ceiling.value > 0 else NOTHING,
            "family": cost.family,
            "made_for": NOTHING if cost.made_for is None else cost.made_for,
            "forwards": NOTHING if cost.forwards is None else cost.forwards,
        }

    def compare(self, first: str, second: str) -> pandas.DataFrame:
        """Paired difference of mean correlations, first - second, with 95 % intervals, per fraction.

        Over the columns in which both correlations are defined.
        """
        import pandas

        rows = []
        for fraction, truth in self.truth.items():
            tables = [self._predicted(method, fraction) for method in (first, second)]
            each = [self._figures(method, fraction).each["pearson"] for method in (first, second)]
            both = np.flatnonzero(np.isfinite(each[0]) & np.isfinite(each[1]))  # the same on both sides
            difference = float((each[0] - each[1])[both].mean()) if len(both) else NOTHING
            ours, theirs = (
                bootstrap_means(Chosen(truth, both), Chosen(table, both), self.seed, DRAWS)
                for table in tables
            )
            low, high = interval(ours - theirs)
            rows.append({"ablation_fraction": fraction, "difference": difference, "low": low, "high": high})
        return pandas.DataFrame(rows)

    def summary(self) -> str:
        """Method x ablation fraction: mean correlation, its 95 % interval, its share of the ceiling."""
        means = self.means()
        table = [["method", *(f"ablate {100 * f:.4g}%{self._pad(f)}" for f in self.truth)]]
        for method in self.methods:
            rows = means[means.method == method].to_dict("records")
            table.append([method, *(_cell(r) + self._pad(r["ablation_fraction"], r["share"]) for r in rows)])
        if self.ceilings:
            ceilings = (f"{self.ceilings.get(f, '-')}{self._pad(f)}" for f in self.truth)
            table.append(["linear ceiling", *ceilings])
        lines = aligned(table)
        seen = f"{len(self.columns)} columns, {next(iter(self.truth.values())).shape[0]} held-out rows each"
        lines.append(f"mean correlation over {seen}, 95 % intervals")
        told = [f"{100 * f:.4g}%: {source}" for f, source in self.ceiling_sources.items()]
        if self.ceilings:
            where = f" ({'; '.join(told)})" if told else ""
            lines.append(f"linear ceiling{where}: what the best linear model would reach; %: share of it")
        if means.undefined.any():
            lines.append(f"not defined, and left out: up to {means.undefined.max()} constant columns")
        return "\n".join(line.rstrip() for line in lines)

    def _pad(self, fraction: float, share: float = NOTHING) -> str:
        """Room for shares where the ceiling is known, and the share."""
        if fraction not in self.ceilings:
            return ""
        return f"{round(100 * share):4d} %" if math.isfinite(share) else " " * 6

    def example(
        self, column: int | str, method: str | None = None, fraction: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted outputs of one column, [rows] each; the first method and fraction by default."""
        name = self.methods[0] if method is None else method
        chosen = next(iter(self.truth)) if fraction is None else fraction
        if chosen not in self.truth:
            tested = ", ".join(f"{f:g}" for f in self.truth)
            raise SettingError("not evaluated at this fraction", expected=f"one of: {tested}", got=chosen)
        known = isinstance(column, str | int | np.integer) and not isinstance(column, bool)
        position = self.columns.positions.get(column, -1) if isinstance(column, str) else column
        if not known or not 0 <= position < len(self.columns):
            raise SettingError(
                "no such column", expected=f"a name, or 0 to {len(self.columns) - 1}", got=repr(column)
            )
        return self.truth[chosen][:, position], self._predicted(name, chosen)[:, position]

    def plot(self, ax: Any = None, against: str = "fraction") -> Any:
        """Correlation against the ablation fraction, or against "compute"; matplotlib Axes.

        More pictures are in `coar.report.figures`.
        """
        from coar.report import figures

        kinds = {"fraction": figures.correlation_by_fraction, "compute": figures.correlation_by_compute}
        if against not in kinds:
            raise SettingError("nothing to plot against", expected=" or ".join(kinds), got=repr(against))
        draw: Any = kinds[against]
        return draw(self.means(), ax=ax)

    def _predicted(self, method: str, fraction: float) -> Table:
        if method not in self.predictions:
            raise SettingError("no such method", expected=", ".join(self.methods), got=repr(method))
        return self.predictions[method][fraction]

    def _figures(self, method: str, fraction: float) -> Measured:
        key = method, fraction
        if key not in self._measured:
            self._measured[key] = _measure(self.truth[fraction], self._predicted(*key), self.seed)
        return self._measured[key]


def _measure(truth: Table, predicted: Table, seed: int) -> Measured:
    """All figures of a method in one pass over the columns."""
    bootstrap = Bootstrap(truth.shape, seed, DRAWS)
    parts: list[dict[str, np.ndarray]] = []
    for block in column_blocks(truth.shape):
        # Sums over rows are rounded by the order in memory: the same bits wherever the table lies.
        here = np.ascontiguousarray(truth[:, block]), np.ascontiguousarray(predicted[:, block])
        bootstrap.add(block, *here)
        parts.append(per_column(*here))
    each = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Measured(each, bootstrap.means())


def _over(statistic: Any, values: np.ndarray) -> float:
    """A mean or median over the columns in which a figure is defined."""
    known = values[np.isfinite(values)]
    return float(statistic(known)) if len(known) else NOTHING


def _cell(row: Mapping[Any, Any]) -> str:
    return f"{row['correlation']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def aligned(table: list[list[str]]) -> list[str]:
    """Lines of a table with a rule below its head; all but the first entry stand to the right."""
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
