"""Correlation against what attributions cost."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np

from coar.errors import SettingError
from coar.report.evaluation_parts import (
    CORRELATION,
    at_fraction,
    axes_for,
    draw_ceiling_across,
    lowest,
    means_of,
)
from coar.report.style import legend, log_x, method_styles, note, percent, plain

_ALONE = ("", "by hand")  # what says no more than that attributions do not know what made them
_SHORT = 14  # letters of a name that is written at its point
_LETTER = 0.016  # width of a letter, in widths of an Axes
_APART = 1.5  # times the cost of the point before, for names that can be read
_FEW = 6  # points of a line that can be named


def correlation_by_compute(means: Any, fraction: float | None = None, ax: Any = None) -> Any:
    """Mean correlation at one fraction against what the attributions cost, with 95 % intervals.

    Args:
        means: an Evaluation, or its `means()`. `forwards` is the cost in forward passes over all examples;
            methods of one `family`, made for the same fraction (`made_for`), differ in what was spent and
            are joined by a line. Their names are at the points where short, else in the legend. Those that
            cost nothing are lines across; those whose cost is not known are named under the axis.
        fraction: ablated; None takes the first.
        ax: drawn on; None makes a figure.

    Returns:
        The matplotlib Axes.

    Raises:
        SettingError: no such fraction, no cost of any method is known, or no table of means.
    """
    fraction, means = at_fraction(means_of(means), fraction)
    known = _with_cost(means)
    ax = ax or axes_for(known.line)
    styles = method_styles(known.line)
    for line, part in known.groupby("line", sort=False):
        _draw_family(ax, part.sort_values("forwards", kind="stable"), styles[line])
    draw_ceiling_across(ax, means)
    log_x(ax)
    _make_room(ax)
    ax.set(xlabel="cost, in forward passes over all examples", ylabel=CORRELATION)
    ax.set_ylim(lowest(known.low), 1.0)
    ax.set_title(f"{percent(fraction)} ablated", fontsize=10)
    left_out = [method for method in means.method if method not in set(known.method)]
    if left_out:
        note(ax, f"left out, cost or correlation not known: {', '.join(left_out)}")
    legend(ax)
    return plain(ax)


def _with_cost(means: Any) -> Any:
    """Methods with a cost and a correlation, and for each its `line`, a key, and the line's `label`."""
    if "forwards" not in means or not means.forwards.notna().any():
        raise SettingError(
            "no method says what it cost",
            expected='a number of forward passes, "forwards", in the provenance of some attributions',
            got="none",
            todo="draw correlation_by_fraction instead",
        )
    known = means.dropna(subset=["forwards", "correlation"])
    nothing = [float("nan")] * len(known)
    families = known.family.fillna("").tolist() if "family" in known else [""] * len(known)
    made_for = known.made_for.astype(float).tolist() if "made_for" in known else nothing
    lines, labels = [], []
    for method, family, made in zip(known.method, families, made_for, strict=True):
        others = {str(m) for f, m in zip(families, made_for, strict=True) if f == family}
        own = f", made for {percent(made)}" if np.isfinite(made) and len(others) > 1 else ""
        lines.append(f"method {method}" if family in _ALONE else f"family {family} {made}")
        labels.append(method if family in _ALONE else family.replace("_", " ") + own)
    return known.assign(line=lines, label=labels)


def _draw_family(ax: Any, part: Any, style: dict[str, Any]) -> None:
    """Points of one family in order of cost, joined where there are several."""
    free, paid = part[part.forwards == 0], part[part.forwards > 0]
    for row in free.itertuples():
        look = {"color": style["color"], "linestyle": style["linestyle"]}
        ax.axhline(row.correlation, **look, linewidth=1, label=f"{row.method} (costs nothing)")
    if not len(paid):
        return
    below, above = paid.correlation - paid.low, paid.high - paid.correlation
    errors = np.maximum(0.0, [below, above])  # a bootstrap interval need not contain the estimate
    look = style if len(paid) > 1 else style | {"linestyle": "none"}
    ax.errorbar(
        paid.forwards,
        paid.correlation,
        yerr=errors,
        **look,
        capsize=2,
        elinewidth=1,
        label=_name(ax, paid, look),
    )


def _name(ax: Any, paid: Any, look: dict[str, Any]) -> str:
    """What the legend says of a line; names of its points are written there where they are short."""
    if len(paid) == 1:
        return str(paid.method.iloc[0])
    family = str(paid.label.iloc[0])
    names = [_without(name, str(paid.family.iloc[0])) for name in paid.method]
    costs = paid.forwards.to_numpy()
    close = (costs[1:] < _APART * costs[:-1]).any()  # names would run into each other
    if close or len(names) > _FEW or max(map(len, names)) > _SHORT:
        return fill(f"{family}: {'; '.join(names)}", 40)
    below = {"xytext": (5, -4), "textcoords": "offset points", "va": "top"}  # a curve that rises is over it
    for x, y, name in zip(paid.forwards, paid.correlation, names, strict=True):
        ax.annotate(name, (x, y), **below, fontsize=8, color=look["color"])
    return family


def _make_room(ax: Any) -> None:
    """Move the right end of a logarithmic axis to where names at points end."""
    for text in [text for text in ax.texts if getattr(text, "xycoords", "") == "data"]:
        low, high = np.log(ax.get_xlim())
        share = _LETTER * len(text.get_text()) + _LETTER  # of the axis
        ax.set_xlim(right=np.exp(max(high, (np.log(text.xy[0]) - share * low) / (1 - share))))


def _without(name: str, family: str) -> str:
    """A method's name without that of its family before a comma, which the legend says.

    >>> _without("gate gradients, 8 passes", "gate_gradients"), _without("ridge", "ridge")
    ('8 passes', 'ridge')
    """
    for head in (family, family.replace("_", " "), family.replace("_", "-")):
        if name.startswith(f"{head}, "):
            return name[len(head) + 2 :]
    return name
