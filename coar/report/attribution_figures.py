"""Figures of attributions: the components of one column, and the layers of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coar.attributions import Attributions
from coar.errors import SettingError
from coar.report.style import RIGHT, WRONG, label_some, new_figure, plain

VALUES = {
    "mean": "mean effect on the {output}\nof keeping a component",
    "sum": "summed effect on the {output}\nof keeping a layer's components",
    "magnitude": "mean size of the effect on the\n{output} of keeping a component",
}
_EXTREME = 99.0  # percentile that the colours reach: one outlier must not make the rest white


def top_components(attributions: Any, column: int | str, count: int = 10, ax: Any = None) -> Any:
    """Bars with error bars: the most important components of one column."""
    ax = ax or new_figure()[1][0]
    table = attributions.top(column, count).iloc[::-1]
    colours = [RIGHT if weight > 0 else WRONG for weight in table.weight]
    errors = 1.96 * table.error if "error" in table else None
    ax.barh(table.component, table.weight, xerr=errors, color=colours, ecolor="#555555")
    ax.set(xlabel=f"effect on the {attributions.output} of keeping it")
    return plain(ax)


def layer_heat_map(
    attributions: Attributions,
    columns: Sequence[int | str] | np.ndarray | None = None,
    ax: Any = None,
    *,
    by: Sequence[Any] | np.ndarray | None = None,
    value: str = "mean",
) -> Any:
    """Which layers matter for which examples: layers (groups of components) from top to bottom.

    Args:
        attributions: whose weights.
        columns: by position or name; None takes all.
        ax: drawn on; None makes a figure as high as its layers need.
        by: a label for each of these columns, [columns]; columns with the same label are averaged.
        value: "mean" of the weights of a layer's components, which does not depend on how many it has;
            their "sum", that is, the predicted effect of the whole layer; or "magnitude", the mean of
            the weights' sizes. Signed values are red below 0, white at 0, blue above. Colours end where
            99 % of the values do: an arrow at an end of the colour bar says that some are beyond.

    Returns:
        The matplotlib Axes; its image holds the values, [layers, columns or labels].

    Raises:
        SettingError: an unknown value, or labels of another length than the columns.
        AxisError: no such column.
    """
    if value not in VALUES:
        raise SettingError("unknown value of a layer", expected=", ".join(VALUES), got=repr(value))
    layers, names, values = _layer_values(attributions, columns, value)
    if by is not None:
        names, values = _averaged(values, by)
    ax = ax or new_figure(width=7.0, height=float(np.clip(1.6 + 0.16 * len(layers), 3.2, 10.0)))[1][0]
    _draw_heat_map(ax, values.T, VALUES[value].format(output=attributions.output), value != "magnitude")
    width, height = ax.get_position().size * ax.figure.get_size_inches()
    label_some(ax.yaxis, layers, height)
    label_some(ax.xaxis, names, width)
    ax.set(xlabel="column (example)" if by is None else "label; mean over its columns")
    return ax


def _layer_values(attributions: Attributions, columns: Any, value: str) -> tuple[list[str], list[str], Any]:
    """Names of layers and of columns, and values [columns, layers]; from disk, one block at a time."""
    chosen = attributions if columns is None else attributions.subset(columns)
    axis = chosen.components
    groups = axis.fields.get("group", np.array(["all"] * len(axis)))
    layers = list(dict.fromkeys(groups.tolist()))
    member = (groups[:, None] == np.array(layers)[None, :]).astype(np.float64)
    if value != "sum":
        member /= member.sum(axis=0)
    parts = [(abs(b.weights) if value == "magnitude" else b.weights) @ member for b in chosen.blocks()]
    return _short(layers), list(chosen.columns.names), np.concatenate(parts)


def _short(layers: list[str]) -> list[str]:
    """Layers without what all their names begin with.

    >>> _short(["model.layers.0.mlp", "model.layers.1.mlp"])
    ['0.mlp', '1.mlp']
    """
    parts = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(own) > shared + 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return [".".join(own[shared:]) for own in parts]


def _averaged(values: np.ndarray, by: Any) -> tuple[list[str], np.ndarray]:
    """Labels in sorted order, and the means of their columns."""
    labels, group = np.unique(np.asarray(by), return_inverse=True)
    if group.shape != (len(values),):
        raise SettingError("labels of another length", expected=f"{len(values)} columns", got=group.shape)
    means = np.stack([values[group == i].mean(axis=0) for i in range(len(labels))])
    return [str(label) for label in labels], means


def _draw_heat_map(ax: Any, values: np.ndarray, label: str, signed: bool) -> None:
    top = float(np.percentile(abs(values), _EXTREME)) or float(abs(values).max()) or 1.0
    colours = {"cmap": "RdBu", "vmin": -top} if signed else {"cmap": "Blues", "vmin": 0.0}
    image = ax.imshow(values, aspect="auto", interpolation="nearest", vmax=top, **colours)
    beyond = float(abs(values).max()) > top
    extend = ("both" if signed else "max") if beyond else "neither"
    ax.figure.colorbar(image, ax=ax, label=label, extend=extend)
