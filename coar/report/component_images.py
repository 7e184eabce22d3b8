"""A column's top components in pictures: the images that need them most, or activate them most."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.errors import AxisError, TaskError
from coar.report.style import RIGHT, WRONG, new_figure
from coar.task import Task

# Widths in units of an image's: the example, the bars, and a gap before each run of images.
_EXAMPLE, _BARS, _GAP = 1.6, 2.4, 0.35
_ROW, _HEAD = 1.22, 0.3  # heights: a row with what is written over and under its images, the headings
_INCHES = 0.9


def top_component_images(
    attributions: Attributions,
    column: int | str,
    task: Task,
    components: int = 4,
    images: int = 6,
    activations: np.ndarray | None = None,
    ax: Any = None,
) -> Any:
    """The example, its most important components, and for each the images it matters for most.

    A row per component: its weight for this column; the images whose outputs need it most (of all
    columns, those with the largest weights of this component, which are written under them); and, where
    activations are given, the images that activate it most.

    Args:
        attributions: of the task's outputs.
        column: by position or name.
        task: whose `show` draws an example.
        components: how many.
        images: how many of each sort.
        activations: [examples, components], from `coar.report.activations.measure_activations`.
        ax: drawn on (inside it, each image has Axes of its own); None makes a figure.

    Returns:
        The matplotlib Axes.

    Raises:
        TaskError: the task has no `show`.
        AxisError: no such column, or activations of another shape.
    """
    _require_shown(task, attributions, activations)
    table = attributions.top(column, components)
    chosen = np.array([attributions.components.positions[name] for name in table.component])
    runs = 1 if activations is None else 2
    width, height = _EXAMPLE + _BARS + runs * (_GAP + images), _HEAD + _ROW * len(table)
    ax = ax or new_figure(width=_INCHES * width, height=_INCHES * height)[1][0]
    ax.set_axis_off()
    sheet = _Sheet(ax, width, height, task)
    examples = attributions.columns.fields.get("example", np.arange(len(attributions.columns)))
    position = attributions.columns.positions[column] if isinstance(column, str) else int(column)
    sheet.heading(0.0, shorten(f"column {attributions.columns.names[position]}", 20, placeholder="..."))
    sheet.image(0.0, height - _HEAD - 1.1 * _EXAMPLE, _EXAMPLE, int(examples[position]))
    sheet.bars(table, attributions.output)
    start = _EXAMPLE + _BARS + _GAP
    weights = np.concatenate([block.weights[:, chosen] for block in attributions.blocks()])
    sheet.rows(start, "images that need it most (effect)", weights, examples, images)
    if activations is not None:
        heading = "images that activate it most (mean output)"
        sheet.rows(start + images + _GAP, heading, activations[:, chosen], np.arange(len(task)), images)
    return ax


class _Sheet:
    """An Axes divided into squares the size of an image; y runs up, the heading is on top."""

    def __init__(self, ax: Any, width: float, height: float, task: Task) -> None:
        self.ax, self.width, self.height, self.task = ax, width, height, task

    def inset(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes on a part of the sheet."""
        return self.ax.inset_axes([x / self.width, y / self.height, width / self.width, height / self.height])

    def image(self, x: float, y: float, size: float, example: int, below: str = "") -> None:
        """An example as its task shows it, with room for its title."""
        own = self.inset(x + 0.05 * size, y + 0.17, 0.9 * size, size - 0.2)
        assert self.task.show is not None  # _require_shown has looked
        self.task.show(self.task.dataset[example], own)
        own.title.set_fontsize(8)
        own.text(0.5, -0.04, below, transform=own.transAxes, ha="center", va="top", fontsize=7)

    def heading(self, x: float, text: str) -> None:
        """Over a run of images."""
        self.ax.text(
            x / self.width, 1.0, text, transform=self.ax.transAxes, va="top", fontsize=9, weight="bold"
        )

    def bars(self, table: Any, output: str) -> None:
        """Weights, each with the component's name over it."""
        count = len(table)
        own = self.inset(_EXAMPLE + 0.15, 0.0, _BARS - 0.15, _ROW * count)
        places = np.arange(count)[::-1] + 0.38
        own.barh(places, table.weight, 0.3, color=[RIGHT if weight > 0 else WRONG for weight in table.weight])
        own.set(ylim=(0, count))
        own.vlines(np.zeros(count), places - 0.2, places + 0.2, color="#555555", linewidth=0.8)
        for place, name, weight in zip(places, table.component, table.weight, strict=True):
            text = f"{name}  {weight:+.3g}"
            own.text(0.0, place + 0.2, text, transform=own.get_yaxis_transform(), va="bottom", fontsize=8)
        own.set_axis_off()
        self.heading(_EXAMPLE + 0.15, f"effect on the {output}")

    def rows(self, x: float, heading: str, values: Any, examples: Any, count: int) -> None:
        """For each component [..., component] of `values`, the examples with the largest."""
        self.heading(x, heading)
        for row, own in enumerate(values.T):
            for place, best in enumerate(np.argsort(-own, kind="stable")[:count]):
                y = _ROW * (values.shape[1] - 1 - row)
                self.image(x + place, y, 1.0, int(examples[best]), f"{own[best]:.3g}")


def _require_shown(task: Task, attributions: Attributions, activations: Any) -> None:
    if task.show is None:
        raise TaskError(
            "the task does not say how an example is drawn",
            expected="coar.Task(..., show=show) with show(item, ax)",
            got="none",
        )
    shape = len(task), len(attributions.components)
    if activations is not None and np.shape(activations) != shape:
        raise AxisError(
            "activations of another shape",
            expected=f"[{shape[0]} examples, {shape[1]} components]",
            got=np.shape(activations),
            todo="measure_activations(experiment) of this task and these components",
        )
