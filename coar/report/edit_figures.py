"""Figures of edits: what ablating chosen components does to targets and to everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coar.errors import SettingError, TaskError
from coar.report.style import COLOURS, MARKERS, new_figure, percent, plain

_FAINT = "#999999"
_ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
_INCHES = 1.25  # of an example in a grid


def edit_curve(curve: Any, chosen: int | None = None, ax: Any = None) -> Any:
    """Outputs of the targets, and accuracies, against the number of ablated components.

    Targets are those that choose the size where the curve has such: `target_holdout` in its table. What
    the linear models predict is of the targets that the edit was made from, so it is drawn where both are
    the same and there is a prediction. The accuracy of targets is drawn where they are several. An output
    whose sign means nothing has no accuracy: its mean over the holdout is drawn instead.

    Args:
        curve: of a sweep; read is `curve.table`.
        chosen: number of components to mark.
        ax: a matplotlib Axes (it gets a twin with an axis of its own); None makes a figure.

    Returns:
        The Axes.
    """
    ax = ax or new_figure()[1][0]
    table, output = curve.table, curve.ranking.attributions.output
    which = "target_holdout" if "target_holdout_output" in table else "target"
    predicted = which == "target" and not table.target_predicted.isna().any()
    ax.axhline(0, color=_FAINT, linewidth=1)
    ax.plot(table["size"], table[f"{which}_output"], "o-", color=COLOURS[0], label=f"target {output}")
    if predicted:
        name = f"target {output}, predicted"
        ax.plot(table["size"], table.target_predicted, ":", color=COLOURS[0], label=name)
    ax.set(xlabel="components ablated", ylabel=f"{output} of the target{'s' if _several(curve) else ''}")
    ax.yaxis.label.set_color(COLOURS[0])
    other = _others(curve, which, ax.twinx())
    if chosen is not None:
        ax.axvline(chosen, color="#555555", linewidth=1, linestyle="--")
        side = "right" if chosen > 0.8 * table["size"].max() else "left"
        where = {"transform": ax.get_xaxis_transform(), "horizontalalignment": side}
        ax.text(chosen, 0.03, " chosen ", color="#555555", **where)
    _keyed(ax, other, [*ax.get_lines()[1 : 3 if predicted else 2], *other.get_lines()])
    return plain(ax)


def _several(curve: Any) -> bool:
    """Whether an accuracy of the targets says more than their output: it is 0 or 1 where there is one."""
    return len(curve.targets) > 1 or "target_holdout_accuracy" in curve.table


def _keyed(ax: Any, other: Any, handles: list[Any]) -> None:
    """A legend: three entries below the curves, where room is made for them; more above the Axes."""
    if len(handles) > 3 or other.get_ylabel() == "accuracy":
        other.legend(handles=handles, frameon=False, ncols=2, fontsize=9, **_ABOVE)
        return
    for axes in (ax, other):
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.4 * (high - low), high)
    other.legend(handles=handles, frameon=False, loc="lower right")


def _others(curve: Any, which: str, ax: Any) -> Any:
    """Accuracies of holdout and targets, or the holdout's mean output, on the twin."""
    table = curve.table
    accuracy = not table.holdout_accuracy.isna().any()
    shown = table.holdout_accuracy if accuracy else table.holdout_output
    name = "holdout accuracy" if accuracy else f"holdout {curve.ranking.attributions.output}"
    ax.plot(table["size"], shown, "s--", color=COLOURS[1], label=name)
    if accuracy and _several(curve):
        shown = table[f"{which}_accuracy"]
        ax.plot(table["size"], shown, "^-.", color=COLOURS[1], label="target accuracy")
        ax.set(ylabel="accuracy", ylim=(-0.02, 1.02))
        ax.yaxis.set_major_formatter(percent)
    else:
        ax.set(ylabel=name)
    if accuracy and not _several(curve):
        ax.set(ylim=(min(0.8, table.holdout_accuracy.min() - 0.02), 1.005))
    ax.yaxis.label.set_color(COLOURS[1])
    ax.spines[["top"]].set_visible(False)
    return ax


def margins_before_after(
    effect: Any, ax: Any = None, *, output: str = "margin", accuracy: bool = True
) -> Any:
    """The output of each example after an edit against that before it.

    On the diagonal nothing has changed. Where signs say what is right, the upper left quarter holds what
    the edit has corrected, the lower right what it has broken.

    Args:
        effect: an `Effect`, or several by name, such as `{"targets": ..., "others": ...}`.
        ax: a matplotlib Axes; None makes a figure.
        output: its name, for the axes.
        accuracy: whether the sign of the output says if a prediction is right; then the legend has
            accuracies before and after, else mean outputs.

    Returns:
        The Axes.
    """
    ax = ax or new_figure()[1][0]
    effects = effect if isinstance(effect, Mapping) else {"": effect}
    for line in (ax.axhline, ax.axvline) if accuracy else ():
        line(0, color=_FAINT, linewidth=1)
    largest = max(effects, key=lambda name: len(effects[name].before))
    for number, name in enumerate(sorted(effects, key=lambda name: name != largest)):  # the many below
        found = effects[name]
        look: dict[str, Any] = {"s": 8, "alpha": 0.5} if len(found.before) > 200 else {"s": 26, "alpha": 0.8}
        place = list(effects).index(name)
        look |= {"color": COLOURS[place], "marker": MARKERS[place], "zorder": 2 + number, "linewidths": 0}
        ax.scatter(found.before, found.after, label=_described(name, found, accuracy), **look)
    ax.axline((0, 0), slope=1, color=_FAINT, linewidth=1, linestyle=":")
    ax.set(xlabel=f"{output} before the edit", ylabel=f"{output} after")
    marks = ax.legend(frameon=False, fontsize=9, **_ABOVE)
    for handle in marks.legend_handles:  # as easily told apart where the points are small
        handle.set(sizes=[26], alpha=0.8)
    return plain(ax)


def _described(name: str, effect: Any, accuracy: bool) -> str:
    start = f"{name}: " if name else ""
    if accuracy:
        return f"{start}{effect.accuracy_before:.1%} right, then {effect.accuracy_after:.1%}"
    return f"{start}mean {effect.before.mean():.3g}, then {effect.after.mean():.3g}"


def example_grid(
    task: Any,
    positions: Sequence[int] | np.ndarray,
    titles: Sequence[str] | np.ndarray | None = None,
    columns: int = 6,
) -> list[Any]:
    """Examples side by side, as their task shows them.

    Args:
        task: a `Task` with `show`.
        positions: of the examples.
        titles: over each; None leaves those of `show`.
        columns: examples in a row.

    Returns:
        One Axes per example, all in one figure: `axes[0].figure`.

    Raises:
        TaskError: the task does not say how an example is drawn.
        SettingError: no examples, unknown ones, or another number of titles.
    """
    chosen = _require_drawable(task, positions, titles)
    columns = max(1, min(columns, len(chosen)))
    rows = -(-len(chosen) // columns)
    figure, (whole,) = new_figure(width=_INCHES * columns, height=1.15 * _INCHES * rows)
    whole.remove()
    drawn = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, position in zip(drawn, chosen, strict=False):
        task.show(task.dataset[position], ax)
        ax.title.set_fontsize(8)
    for ax, title in zip(drawn, [] if titles is None else titles, strict=False):
        ax.set_title(title, fontsize=8)
    for ax in drawn[len(chosen) :]:
        ax.set_axis_off()
    return list(drawn[: len(chosen)])


def _require_drawable(task: Any, positions: Any, titles: Any) -> list[int]:
    if task.show is None:
        raise TaskError(
            "the task does not say how an example is drawn",
            expected="coar.Task(..., show=show) with show(item, ax)",
            got="none",
        )
    chosen = [int(position) for position in positions]
    if not chosen or not all(0 <= position < len(task) for position in chosen):
        raise SettingError(
            "no such examples to draw", expected=f"one or more of 0 .. {len(task) - 1}", got=chosen
        )
    if titles is not None and len(titles) != len(chosen):
        raise SettingError("a title for each example", expected=f"{len(chosen)} titles", got=len(titles))
    return chosen


def edit_comparison(comparison: Any, ax: Any = None) -> Any:
    """What each way of editing leaves of the targets' accuracy and of the others', beside that before.

    Args:
        comparison: of `compare_edits`; read is `comparison.table`. Accuracies, or mean outputs where
            signs mean nothing. A method that met no guard has changed nothing.
        ax: a matplotlib Axes; None makes a figure.

    Returns:
        The Axes.
    """
    table = comparison.table.iloc[::-1]  # the first one on top
    ax = ax or new_figure(width=6.0, height=1.5 + 0.45 * len(table))[1][0]
    places = np.arange(len(table))
    for number, (name, marker) in enumerate([("targets", "o"), ("others", "s")]):
        colour, before = COLOURS[number], float(table[f"{name}_before"].mean())
        ax.axvline(before, color=colour, linewidth=1, linestyle="--", label=f"{name} before")
        after = table[f"{name}_after"].to_numpy(float)
        shifted = places + (0.5 - number) * 0.2  # two that fall on one spot are both seen
        ax.plot(after, shifted, marker, color=colour, label=f"{name} after", markersize=7, alpha=0.85)
    ax.set_yticks(places, [_counted(line) for line in table.itertuples()])
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.grid(axis="y", color="#eeeeee")
    _scale(ax, table)
    ax.legend(frameon=False, ncols=2, fontsize=8, **_ABOVE)
    return plain(ax)


def _counted(line: Any) -> str:
    """A method and how many components it ablates: fine-tuning none, and one that met no guard none."""
    name = str(line.method).replace("_", " ")
    if np.isnan(line.seconds):  # there is no edit to have taken any
        return f"{name} (guard not met)"
    return f"{name} ({int(line.components)})" if line.components else name


def _scale(ax: Any, table: Any) -> None:
    """Accuracies in percent from 0 to 100, mean outputs as they are."""
    numbers = table[["targets_before", "targets_after", "others_before", "others_after"]].to_numpy(float)
    numbers = numbers[~np.isnan(numbers)]
    if ((numbers >= 0) & (numbers <= 1)).all():
        ax.set(xlim=(-0.02, 1.02), xlabel="accuracy (components ablated after each name)")
        ax.xaxis.set_major_formatter(percent)
    else:
        ax.set(xlabel="mean output (components ablated after each name)")
