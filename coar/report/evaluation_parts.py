"""What figures of evaluations share: rows of their tables, the ceiling, and how far an axis reaches."""

from __future__ import annotations

from typing import Any

import numpy as np

from coar.errors import SettingError
from coar.report.style import CEILING, GREY, INSIDE, new_figure

CORRELATION = "correlation of predicted and true output"


def means_of(given: Any) -> Any:
    """`Evaluation.means()`: as given, or of an Evaluation that is given.

    Raises:
        SettingError: something else.
    """
    found = given.means() if _is_evaluation(given) else given
    return _require(found, "correlation", "an Evaluation, or its means()", given)


def table_of(given: Any) -> Any:
    """`Evaluation.table`: as given, or of an Evaluation that is given.

    Raises:
        SettingError: something else.
    """
    found = given.table if _is_evaluation(given) else given
    return _require(found, "pearson", "an Evaluation, or its table", given)


def at_fraction(frame: Any, fraction: float | None) -> tuple[float, Any]:
    """Rows of one fraction: the one given, or the first.

    Raises:
        SettingError: no such fraction.
    """
    known = list(dict.fromkeys(frame.ablation_fraction))
    fraction = known[0] if fraction is None else fraction
    part = frame[np.isclose(frame.ablation_fraction, fraction)]
    if not len(part):
        raise SettingError(
            "nothing was evaluated at this fraction", expected=", ".join(map(str, known)), got=fraction
        )
    return fraction, part


def ceilings(means: Any) -> Any:
    """Medians of ceiling, ceiling_low and ceiling_high by fraction where it is known; ends may be NaN."""
    columns = ["ceiling", "ceiling_low", "ceiling_high"]
    known = means.reindex(columns=["ablation_fraction", *columns]).dropna(subset="ceiling")
    return known.astype(float).groupby("ablation_fraction")[columns].median()


def draw_ceiling_across(ax: Any, means: Any, upright: bool = False) -> float | None:
    """The ceiling at the one fraction of `means` as a dotted line with its interval, and where it lies.

    Args:
        ax: drawn on.
        means: of one fraction.
        upright: along y, for correlations along x.
    """
    found = ceilings(means)
    if not len(found):
        return None
    line, span = (ax.axvline, ax.axvspan) if upright else (ax.axhline, ax.axhspan)
    value, low, high = map(float, found.iloc[0])
    line(value, color=GREY, linestyle=":", label=CEILING, zorder=1)
    if np.isfinite([low, high]).all():
        span(low, high, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    return value


def axes_for(methods: Any) -> Any:
    """Axes of a figure that has room for a legend of so many methods and the ceiling."""
    return new_figure(width=5.0 if methods.nunique() < INSIDE else 8.0)[1][0]


def lowest(values: Any) -> float:
    """Lower end of an axis of correlations: 0, or what is below it."""
    finite = np.asarray(values, dtype=float)[np.isfinite(values)]
    return min(0.0, float(finite.min())) if len(finite) else 0.0


def _is_evaluation(given: Any) -> bool:
    return hasattr(given, "table") and callable(getattr(given, "means", None))


def _require(frame: Any, column: str, expected: str, given: Any) -> Any:
    if column not in getattr(frame, "columns", ()) or "ablation_fraction" not in frame:
        raise SettingError("this is not what is drawn", expected=expected, got=type(given).__name__)
    return frame
