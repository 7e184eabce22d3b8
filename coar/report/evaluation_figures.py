"""Figures of evaluations: correlations over fractions, compute and examples, and one column's rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from coar.errors import SettingError
from coar.metrics import pearson
from coar.report.style import (
    CEILING,
    COLOURS,
    GREY,
    INSIDE,
    legend,
    log_x,
    method_styles,
    new_figure,
    note,
    percent,
    plain,
)

CORRELATION = "correlation of predicted and true output"
BIN = 0.05
_WIDE = 5  # times the smallest fraction: beyond, labels on a linear axis run into each other


def correlation_by_fraction(means: Any, ax: Any = None) -> Any:
    """Mean correlation against ablation fraction, one line with a 95 % band per method.

    Args:
        means: from `Evaluation.means()`. Where it has a `ceiling`, the best that any linear model could
            reach is dotted; methods that each estimate it count by their median.
        ax: drawn on; None makes a figure.

    Returns:
        The matplotlib Axes.
    """
    ax = ax or _axes_for(means.method)
    fractions = sorted(set(means.ablation_fraction))
    styles = method_styles(means.method)
    for method, part in means.groupby("method", sort=False):
        part, style = part.sort_values("ablation_fraction"), styles[method]
        ax.plot(part.ablation_fraction, part.correlation, **style, label=method)
        ax.fill_between(part.ablation_fraction, part.low, part.high, color=style["color"], alpha=0.2, lw=0)
    _draw_ceiling(ax, means)
    ax.set(xlabel="fraction of components ablated", ylabel=CORRELATION)
    if fractions[-1] > _WIDE * fractions[0] > 0:
        ax.set_xscale("log")
    ax.set_xticks(fractions)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(percent)
    ax.set_ylim(_lowest(means.low), 1.0)
    legend(ax)
    return plain(ax)


def correlation_by_compute(means: Any, fraction: float | None = None, ax: Any = None) -> Any:
    """Mean correlation at one fraction against what the attributions cost, with 95 % intervals.

    Args:
        means: from `Evaluation.means()`. `forwards` is the cost in forward passes over all examples;
            methods that share a `family` (and differ in what was spent) are joined by a line. Those that
            cost nothing are lines across; those whose cost is not known are named under the axis.
        fraction: ablated; None takes the first.
        ax: drawn on; None makes a figure.

    Returns:
        The matplotlib Axes.

    Raises:
        SettingError: no such fraction, or no cost of any method is known.
    """
    fraction, means = _at_fraction(means, fraction)
    known = _with_cost(means)
    ax = ax or _axes_for(known.family)
    styles = method_styles(known.family)
    for family, part in known.groupby("family", sort=False):
        label = family.replace("_", " ") if len(part) > 1 else part.method.iloc[0]
        _draw_family(ax, part.sort_values("forwards"), styles[family], label)
    _draw_ceiling(ax, means, across=True)
    log_x(ax)
    ax.set(xlabel="cost, in forward passes over all examples", ylabel=CORRELATION)
    ax.set_ylim(_lowest(known.low), 1.0)
    ax.set_title(f"{percent(fraction)} ablated", fontsize=10)
    left_out = [method for method in means.method if method not in set(known.method)]
    if left_out:
        note(ax, f"left out, cost or correlation not known: {', '.join(left_out)}")
    legend(ax)
    return plain(ax)


def correlation_histogram(table: Any, ax: Any = None, fraction: float | None = None) -> Any:
    """How many columns (examples) a method predicts how well, at one fraction; medians are marked.

    Args:
        table: `Evaluation.table`. Columns whose correlation is not defined are counted under the axis.
        ax: drawn on; None makes a figure.
        fraction: ablated; None takes the first.

    Returns:
        The matplotlib Axes.

    Raises:
        SettingError: no such fraction.
    """
    fraction, table = _at_fraction(table, fraction)
    ax = ax or _axes_for(table.method)
    bins = round(1 / BIN) - int(np.floor(_lowest(table.pearson) / BIN + 1e-9))
    edges = 1.0 - BIN * np.arange(bins, -1, -1)
    undefined = []
    for method, style in method_styles(table.method).items():
        values = table.pearson[table.method == method].to_numpy()
        defined = values[np.isfinite(values)]
        if len(defined) < len(values):
            undefined.append(f"{method} {len(values) - len(defined)}")
        if len(defined):
            look = {"color": style["color"], "linestyle": style["linestyle"]}
            middle = float(np.median(defined))
            counts = np.histogram(np.clip(defined, edges[0], 1.0), edges)[0]
            ax.stairs(counts, edges, **look, linewidth=1.5, label=f"{method}, median {middle:.2f}")
            ax.plot(middle, 0.0, marker="^", markersize=9, color=look["color"], clip_on=False, zorder=5)
    ax.set(xlabel=CORRELATION, ylabel="columns (examples)", xlim=(edges[0], 1.0))
    ax.set_ylim(0.0, ax.get_ylim()[1] * 1.35)  # room for the legend
    ax.set_title(f"{percent(fraction)} ablated", fontsize=10)
    if undefined:
        note(ax, f"constant outputs, no correlation: {', '.join(undefined)}")
    legend(ax)
    return plain(ax)


def predictions(truth: np.ndarray, predicted: np.ndarray, ax: Any = None, title: str = "") -> Any:
    """Predicted against true output of one column under held-out ablations, each [rows]."""
    ax = ax or new_figure()[1][0]
    ax.scatter(predicted, truth, s=14, color=COLOURS[0], alpha=0.7, linewidth=0)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    ax.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
    correlation = pearson(truth[:, None], predicted[:, None])[0]  # NaN, not a warning, where constant
    ax.set(xlabel="predicted output", ylabel="output of the ablated model", title=title)
    ax.text(0.04, 0.94, f"correlation {correlation:.2f}", transform=ax.transAxes, va="top")
    return plain(ax)


def _axes_for(methods: Any) -> Any:
    """Axes of a figure that has room for a legend of so many methods and the ceiling."""
    return new_figure(width=5.0 if methods.nunique() < INSIDE else 8.0)[1][0]


def _draw_family(ax: Any, part: Any, style: dict[str, Any], label: str) -> None:
    """Points of one family in order of cost, joined where there are several."""
    free, paid = part[part.forwards == 0], part[part.forwards > 0]
    for row in free.itertuples():
        look = {"color": style["color"], "linestyle": style["linestyle"]}
        ax.axhline(row.correlation, **look, linewidth=1, label=f"{row.method} (costs nothing)")
    if len(paid):
        below, above = paid.correlation - paid.low, paid.high - paid.correlation
        errors = np.maximum(0.0, [below, above])  # a bootstrap interval need not contain the estimate
        look = style if len(paid) > 1 else style | {"linestyle": "none"}
        ax.errorbar(
            paid.forwards, paid.correlation, yerr=errors, **look, capsize=2, elinewidth=1, label=label
        )


def _draw_ceiling(ax: Any, means: Any, across: bool = False) -> None:
    """Dotted in grey where known: a line over fractions, or one across for a single fraction."""
    if "ceiling" not in means or not means.ceiling.notna().any():
        return
    found = means.dropna(subset="ceiling").groupby("ablation_fraction").ceiling.median()
    if across:
        ax.axhline(float(found.iloc[0]), color=GREY, linestyle=":", label=CEILING)
    else:  # the marker shows a ceiling that is known at one fraction only
        ax.plot(found.index, found, color=GREY, linestyle=":", marker="_", markersize=12, label=CEILING)


def _at_fraction(frame: Any, fraction: float | None) -> tuple[float, Any]:
    """Rows of one fraction: the one given, or the first."""
    known = list(dict.fromkeys(frame.ablation_fraction))
    fraction = known[0] if fraction is None else fraction
    part = frame[np.isclose(frame.ablation_fraction, fraction)]
    if not len(part):
        raise SettingError(
            "nothing was evaluated at this fraction", expected=", ".join(map(str, known)), got=fraction
        )
    return fraction, part


def _with_cost(means: Any) -> Any:
    """Methods with a cost and a correlation; each is a family of its own where no families are given."""
    if "forwards" not in means or not means.forwards.notna().any():
        raise SettingError(
            "no method says what it cost",
            expected='a number of forward passes, "forwards", in the provenance of some attributions',
            got="none",
            todo="draw correlation_by_fraction instead",
        )
    known = means.dropna(subset=["forwards", "correlation"])
    families = known.family.fillna(known.method) if "family" in known else known.method
    return known.assign(family=families)


def _lowest(values: Any) -> float:
    """Lower end of an axis of correlations: 0, or what is below it."""
    finite = np.asarray(values, dtype=float)[np.isfinite(values)]
    return min(0.0, float(finite.min())) if len(finite) else 0.0
