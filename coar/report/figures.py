"""Figures. Each function draws on one matplotlib Axes and returns it; none touches pyplot's state."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from coar.metrics import pearson

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3")  # told apart in grey as well
WRONG, RIGHT = "#d1495b", "#1b6ca8"


def new_figure(columns: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure and its Axes side by side, outside pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return Path(path)


def correlation_by_fraction(means: Any, ax: Any = None) -> Any:
    """Mean correlation against ablation fraction, one line with a 95 % band per method.

    Args:
        means: from `Evaluation.means()`.
        ax: drawn on; None makes a figure.
    """
    ax = ax or new_figure()[1][0]
    for colour, (method, part) in zip(cycle(COLOURS), means.groupby("method", sort=False), strict=False):
        ax.plot(part.ablation_fraction, part.correlation, "o-", color=colour, label=method)
        ax.fill_between(part.ablation_fraction, part.low, part.high, color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="fraction of components ablated", ylabel="correlation of predicted and true output")
    ax.set_xticks(sorted(set(means.ablation_fraction)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    ax.set_ylim(min(0.0, float(means.low.min())), 1.0)
    ax.legend(frameon=False)
    return _plain(ax)


def predictions(truth: np.ndarray, predicted: np.ndarray, ax: Any = None, title: str = "") -> Any:
    """Predicted against true output of one column under held-out ablations, each [rows]."""
    ax = ax or new_figure()[1][0]
    ax.scatter(predicted, truth, s=14, color=COLOURS[0], alpha=0.7, linewidth=0)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    ax.plot([low, high], [low, high], color="#999999", linewidth=1, zorder=0)
    correlation = pearson(truth[:, None], predicted[:, None])[0]  # NaN, not a warning, where constant
    ax.set(xlabel="predicted output", ylabel="output of the ablated model", title=title)
    ax.text(0.04, 0.94, f"correlation {correlation:.2f}", transform=ax.transAxes, va="top")
    return _plain(ax)


def edit_curve(curve: Any, chosen: int | None = None, ax: Any = None) -> Any:
    """Target output and holdout accuracy against the number of ablated components."""
    ax = ax or new_figure()[1][0]
    table = curve.table
    ax.axhline(0, color="#999999", linewidth=1)
    ax.plot(table["size"], table.target_output, "o-", color=COLOURS[0], label="target margin")
    ax.plot(table["size"], table.target_predicted, ":", color=COLOURS[0], label="target margin, predicted")
    ax.set(xlabel="components ablated", ylabel="margin of the target")
    ax.yaxis.label.set_color(COLOURS[0])
    other = ax.twinx()
    other.plot(table["size"], table.holdout_accuracy, "s--", color=COLOURS[1], label="holdout accuracy")
    other.set(ylabel="holdout accuracy", ylim=(min(0.8, table.holdout_accuracy.min() - 0.02), 1.005))
    other.yaxis.label.set_color(COLOURS[1])
    other.spines[["top"]].set_visible(False)
    if chosen is not None:
        ax.axvline(chosen, color="#555555", linewidth=1, linestyle="--")
        ax.text(chosen, 0.03, " chosen", color="#555555", transform=ax.get_xaxis_transform())
    for axes in (ax, other):  # room below the curves for the legend
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.4 * (high - low), high)
    handles = [*ax.get_lines()[1:3], other.get_lines()[0]]
    other.legend(handles=handles, frameon=False, loc="lower right")
    return _plain(ax)


def top_components(attributions: Any, column: int | str, count: int = 10, ax: Any = None) -> Any:
    """Bars with error bars: the most important components of one column."""
    ax = ax or new_figure()[1][0]
    table = attributions.top(column, count).iloc[::-1]
    colours = [RIGHT if weight > 0 else WRONG for weight in table.weight]
    errors = 1.96 * table.error if "error" in table else None
    ax.barh(table.component, table.weight, xerr=errors, color=colours, ecolor="#555555")
    ax.set(xlabel=f"effect on the {attributions.output} of keeping it")
    return _plain(ax)


def _plain(ax: Any) -> Any:
    ax.spines[["top"]].set_visible(False)
    return ax
