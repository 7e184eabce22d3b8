"""What all figures share: size, colours and markers told apart in grey, where legends and notes go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3")  # told apart in grey as well
WRONG, RIGHT = "#d1495b", "#1b6ca8"
GREY = "#777777"
CEILING = "linear ceiling"
MARKERS = ("o", "s", "^", "D", "v")  # five against six colours: thirty methods before a pair comes again
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)))
INSIDE = 4  # longer legends cover data, and stand beside it
_POINTS = 9.0  # height of a line of tick labels that can be read
_WIDTH = 0.7  # of a letter and some air, in font sizes


def new_figure(columns: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure and its Axes side by side, outside pyplot; width and height of each in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return Path(path)


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method, in order; no two of thirty are the same.

    >>> method_styles(["ridge", "lasso"])["lasso"]
    {'color': '#d1495b', 'marker': 's', 'linestyle': '--'}
    """
    looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {
        method: {"color": colour, "marker": marker, "linestyle": dashes}
        for method, (colour, marker, dashes) in zip(dict.fromkeys(methods), looks, strict=False)
    }


def percent(fraction: float, _: Any = None) -> str:
    """A tick label.

    >>> percent(0.025)
    '2.5%'
    """
    return f"{100 * fraction:.4g}%"


def log_x(ax: Any) -> None:
    """A logarithmic x axis whose labels are numbers written out, such as 20, 50, 100, for what is drawn."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    steps = (1, 2, 3, 5) if high < 20 * low else (1, 2, 5) if high < 300 * low else (1,)
    ax.xaxis.set_major_locator(LogLocator(subs=steps))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1 else f"{value:,.0f}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def legend(ax: Any) -> None:
    """Inside where a few entries find room, else to the right of the Axes."""
    handles, names = ax.get_legend_handles_labels()
    many, beside = len(names) > INSIDE, {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 9}
    order = sorted(range(len(names)), key=lambda i: names[i] == CEILING)  # what bounds the others last
    look = beside if many else {"loc": "best"}
    ax.legend([handles[i] for i in order], [names[i] for i in order], frameon=False, **look)


def note(ax: Any, text: str) -> None:
    """What the figure leaves out, in small print under the axis."""
    place = {"xycoords": "axes fraction", "xytext": (0, -38), "textcoords": "offset points"}
    ax.annotate(text, (0, 0), **place, va="top", fontsize=8, color="#555555", annotation_clip=False)


def label_some(axis: Any, names: Sequence[str], inches: float) -> None:
    """Name positions 0, 1, ... of an axis: all of them, or every k-th where all cannot be read.

    Names along x that would run into each other stand upright.

    Args:
        axis: `ax.xaxis` or `ax.yaxis`.
        names: of all positions.
        inches: that the axis is long.
    """
    step = int(np.ceil(len(names) * _POINTS / max(72 * inches, _POINTS)))
    shown = range(0, len(names), step)
    size = float(np.clip(72 * inches * step / len(names), 6, 9))
    axis.set_ticks(list(shown), [names[i] for i in shown], fontsize=size)
    if axis.axis_name == "x" and _WIDTH * size * max(map(len, names)) > 72 * inches * step / len(names):
        axis.set_tick_params(labelrotation=90)


def plain(ax: Any) -> Any:
    """The Axes without a frame at its top."""
    ax.spines[["top"]].set_visible(False)
    return ax
