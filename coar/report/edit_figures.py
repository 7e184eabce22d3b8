"""Figures of edits: what ablating chosen components does to targets and to everything else."""

from __future__ import annotations

from typing import Any

from coar.report.style import COLOURS, new_figure, plain


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
    return plain(ax)
