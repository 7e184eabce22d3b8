"""Correlation against ablation fraction: lines over several, points for one."""

from __future__ import annotations

from typing import Any

import numpy as np

from coar.report.evaluation_parts import (
    CORRELATION,
    axes_for,
    ceilings,
    draw_ceiling_across,
    lowest,
    means_of,
)
from coar.report.style import CEILING, GREY, legend, method_styles, new_figure, percent, plain

_WIDE = 5  # times the smallest fraction: beyond, labels on a linear axis run into each other
_AIR = 0.02  # beside the smallest and the largest correlation


def correlation_by_fraction(means: Any, ax: Any = None) -> Any:
    """Mean correlation against ablation fraction: one line with a 95 % band per method.

    At a single fraction: a row for each method, a point with its 95 % interval, and its share of the ceiling.

    Args:
        means: an Evaluation, or its `means()`. Where it has a `ceiling`, the best that any linear model could
            reach, it is dotted, with its interval (`ceiling_low`, `ceiling_high`) where that is given.
        ax: drawn on; None makes a figure.

    Returns:
        The matplotlib Axes.

    Raises:
        SettingError: neither an Evaluation nor a table of means.
    """
    means = means_of(means)
    draw = _draw_rows if means.ablation_fraction.nunique() == 1 else _draw_lines
    return plain(draw(means, ax))


def _draw_lines(means: Any, ax: Any) -> Any:
    """Fractions along x."""
    ax = ax or axes_for(means.method)
    fractions = sorted(set(means.ablation_fraction))
    styles = method_styles(means.method)
    for method, part in means.groupby("method", sort=False):
        part, style = part.sort_values("ablation_fraction"), styles[method]
        ax.plot(part.ablation_fraction, part.correlation, **style, label=method)
        ax.fill_between(part.ablation_fraction, part.low, part.high, color=style["color"], alpha=0.2, lw=0)
    _draw_ceiling(ax, ceilings(means))
    ax.set(xlabel="fraction of components ablated", ylabel=CORRELATION)
    if fractions[-1] > _WIDE * fractions[0] > 0:
        ax.set_xscale("log")
    ax.set_xticks(fractions)
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(percent)
    ax.set_ylim(lowest(means.low), 1.0)
    legend(ax)
    return ax


def _draw_ceiling(ax: Any, found: Any) -> None:
    """Dotted, with its interval; at a fraction of its own a dash, wide enough to be seen beside a marker."""
    if not len(found):
        return
    look = {"color": GREY, "linestyle": ":", "label": CEILING, "zorder": 4}
    if len(found) > 1:
        ax.fill_between(found.index, found.ceiling_low, found.ceiling_high, color=GREY, alpha=0.15, lw=0)
        ax.plot(found.index, found.ceiling, **look)
        return
    errors = np.maximum(0.0, [found.ceiling - found.ceiling_low, found.ceiling_high - found.ceiling])
    ax.plot(found.index, found.ceiling, **look, marker="_", markersize=12, markeredgewidth=2)
    ax.scatter(found.index, found.ceiling, s=30**2, marker="_", color=GREY)  # too wide for the legend
    ax.errorbar(found.index, found.ceiling, yerr=errors, fmt="none", ecolor=GREY, capsize=4, elinewidth=1)


def _draw_rows(means: Any, ax: Any) -> Any:
    """A row for each method, the first on top; correlations along x."""
    ax = ax or new_figure(width=6.5, height=float(np.clip(1.4 + 0.32 * len(means), 2.4, 12.0)))[1][0]
    ax.axvline(0.0, color="#cccccc", linewidth=1, zorder=0)
    ceiling = draw_ceiling_across(ax, means, upright=True)
    for place, (row, style) in enumerate(zip(means.itertuples(), _styles(means), strict=True)):
        _draw_row(ax, place, row, style, ceiling)
    top = -0.6
    if ceiling is not None:
        top = -1.3  # a row for what the dotted line and the numbers are
        ax.text(ceiling - 0.01, -0.85, CEILING, ha="right", va="center", fontsize=9, color="#555555")
        _beside(ax, -0.85, "share of it")
    ax.set_yticks(range(len(means)), means.method.tolist())
    ax.set(xlabel=CORRELATION, ylim=(len(means) - 0.4, top))
    ax.set_xlim(lowest(means.low) - _AIR, 1.0 + _AIR)
    ax.set_title(f"{percent(means.ablation_fraction.iloc[0])} ablated", fontsize=10)
    ax.spines["right"].set_visible(False)
    return ax


def _styles(means: Any) -> list[dict[str, Any]]:
    """Of each row; a method has the colour and the marker that it has in other figures."""
    styles = method_styles(means.method)
    return [styles[method] | {"linestyle": "none"} for method in means.method]


def _draw_row(ax: Any, place: int, row: Any, style: dict[str, Any], ceiling: float | None) -> None:
    if not np.isfinite(row.correlation):
        ax.text(0.01, place, "not defined (constant)", va="center", fontsize=9, color="#555555")
        return
    # A bootstrap interval need not contain the estimate.
    ends = np.maximum(0.0, [[row.correlation - row.low], [row.high - row.correlation]])
    ax.errorbar([row.correlation], [place], xerr=ends, **style, capsize=3, elinewidth=1.2, label=row.method)
    if ceiling:
        _beside(ax, place, f"{100 * row.correlation / ceiling:.0f}%")


def _beside(ax: Any, place: float, text: str) -> None:
    """Small print to the right of a row."""
    ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color="#555555")
