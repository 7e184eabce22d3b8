"""Figures of evaluations: how well each column (example) is predicted, and one column's rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from coar.metrics import pearson
from coar.report.evaluation_parts import CORRELATION, at_fraction, axes_for, lowest, table_of
from coar.report.style import COLOURS, legend, method_styles, new_figure, note, percent, plain

BIN = 0.05


def correlation_histogram(table: Any, ax: Any = None, fraction: float | None = None) -> Any:
    """How many columns (examples) a method predicts how well, at one fraction; medians are marked.

    Args:
        table: an Evaluation, or its `table`. Columns whose correlation is not defined are counted under
            the axis.
        ax: drawn on; None makes a figure.
        fraction: ablated; None takes the first.

    Returns:
        The matplotlib Axes.

    Raises:
        SettingError: no such fraction, or no such table.
    """
    fraction, table = at_fraction(table_of(table), fraction)
    ax = ax or axes_for(table.method)
    bins = round(1 / BIN) - int(np.floor(lowest(table.pearson) / BIN + 1e-9))
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
    ax.yaxis.get_major_locator().set_params(integer=True)
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
    said = f"{correlation:.2f}" if np.isfinite(correlation) else "not defined (constant)"
    ax.text(0.04, 0.94, f"correlation {said}", transform=ax.transAxes, va="top")
    return plain(ax)
