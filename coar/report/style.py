"""What all figures share: size, colours and markers told apart in grey, where legends and notes go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from coar.errors import SettingError

COLOURS = (  # told apart in grey as well: neighbours differ in lightness
    *("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#2e4057"),
    *("#6cc5e8", "#7a4419", "#f08fb8", "#8a55b5", "#a8b820"),
)
WRONG, RIGHT = "#d1495b", "#1b6ca8"
GREY = "#777777"
CEILING = "linear ceiling"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", "p", ">")  # eleven against ten colours: 110 methods
DASHES = (  # seven against ten colours; none like the dots of the ceiling
    *("-", "--", "-.", (0, (2, 1)), (0, (5, 1, 1, 1))),
    *((0, (10, 3)), (0, (3, 1, 1, 1, 1, 1))),
)
INSIDE = 4  # longer legends cover data, and stand beside it
_POINTS = 9.0  # height of a line of tick labels that can be read
_WIDTH = 0.7  # of a letter and some air, in font sizes
_LETTER = 6.0  # points, the width of a letter of a tick label
_STEPS = ((1, 2, 3, 5), (1, 3), (1,))  # labels in each decade of a logarithmic axis


def new_figure(columns: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure and its Axes side by side, outside pyplot; width and height of each in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def save_figure(drawn: Any, path: str | Path) -> Path:
    """Write a PNG of a matplotlib Figure, or of the one that an Axes is in; missing folders are made.

    Raises:
        SettingError: neither a Figure nor an Axes.
    """
    figure = drawn
    while not hasattr(figure, "savefig"):  # an Axes, perhaps in a part of a figure
        if not hasattr(figure, "figure"):
            raise SettingError(
                "nothing to save", expected="a matplotlib Axes or Figure", got=type(drawn).__name__
            )
        figure = figure.figure
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return Path(path)


def method_styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each method, in order; no two of a hundred are the same.

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
    """A logarithmic x axis whose labels are numbers written out, such as 1, 3, 10, as many as find room."""
    from matplotlib.ticker import LogLocator, NullFormatter

    class Fitting(LogLocator):
        """Looks at the room when drawn: what stands beside the Axes is known only then."""

        def __call__(self) -> Any:
            low, high = ax.get_xlim()
            self.set_params(subs=log_steps(low, high, 72 * ax.bbox.width / ax.figure.dpi))
            return super().__call__()

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(Fitting(numticks=100))
    ax.xaxis.set_major_formatter(number)
    ax.xaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=100))
    ax.xaxis.set_minor_formatter(NullFormatter())


def log_steps(low: float, high: float, points: float) -> tuple[int, ...]:
    """Where each decade has labels that do not run into each other on an axis of so many points.

    >>> log_steps(2, 4_000, 300), log_steps(2, 4_000, 150), log_steps(2, 90, 300)
    ((1, 3), (1,), (1, 2, 3, 5))
    """
    first, last = np.log10([low, high])
    decades = 10.0 ** np.arange(np.floor(first), np.ceil(last))
    for steps in _STEPS:
        values = np.sort(np.outer(decades, steps).ravel())
        shown = values[(values >= low) & (values <= high)]
        widths = np.array([_LETTER * len(number(value)) for value in shown])
        distances = np.diff(np.log10(shown)) * points / (last - first)
        if (distances > (widths[1:] + widths[:-1]) / 2 + _LETTER).all():
            return steps
    return _STEPS[-1]


def number(value: float, _: Any = None) -> str:
    """A tick label.

    >>> number(3000), number(0.5), number(2e6)
    ('3,000', '0.5', '2M')
    """
    if value >= 1e6:
        return f"{value / 1e6:,.4g}M"
    return f"{value:,.4g}" if value < 1 else f"{value:,.0f}"


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
