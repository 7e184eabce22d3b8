"""An evaluation as files: a figure, and tables for other programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from coar.errors import SettingError
from coar.report.evaluation_figures import correlation_histogram
from coar.report.fraction_figures import correlation_by_fraction
from coar.report.style import new_figure, save_figure


def evaluation_figure(evaluation: Any, title: str = "") -> Any:
    """Mean correlation over fractions, and its histogram over columns at the last fraction.

    Args:
        evaluation: a `coar.Evaluation`.
        title: over both.

    Returns:
        A matplotlib Figure.
    """
    figure, (left, right) = new_figure(columns=2, width=6.5)
    correlation_by_fraction(evaluation, ax=left)
    correlation_histogram(evaluation, ax=right, fraction=list(evaluation.truth)[-1])
    if title:
        figure.suptitle(title)
    return figure


def save_evaluations(
    evaluations: list[Any], figure: str | Path | None = None, table: str | Path | None = None
) -> list[Path]:
    """Write a PNG and two CSVs of each evaluation: every column, and the means.

    found.png, found.csv, found-means.csv                 of the first
    found-loss.png, found-loss.csv, found-loss-means.csv  of a second one, of the output "loss"
    found-2.png, found-2.csv, found-2-means.csv           of a second one of the same output (other columns)

    Args:
        evaluations: of one study, one for each set of columns. Where there are several, the figures' titles
            say which output each is of.
        figure: a .png file; None writes none.
        table: a .csv file of `Evaluation.table`, a line per method, fraction and column; beside it, under
            the same name and "-means", `Evaluation.means()`. None writes neither.

    Returns:
        What was written; older files of these names are replaced.

    Raises:
        SettingError: a file name with another ending.
    """
    require_endings(figure, table)
    written = []
    for evaluation, ending in zip(evaluations, _endings(evaluations), strict=True):
        if figure is not None:
            title = f"{evaluation.output}, {len(evaluation.columns)} columns" if len(evaluations) > 1 else ""
            written.append(save_figure(evaluation_figure(evaluation, title), _longer(figure, ending)))
        if table is not None:
            path = _longer(table, ending)
            path.parent.mkdir(parents=True, exist_ok=True)
            evaluation.table.to_csv(path, index=False)
            evaluation.means().to_csv(_longer(path, "-means"), index=False)
            written += [path, _longer(path, "-means")]
    return written


def require_endings(figure: str | Path | None, table: str | Path | None) -> None:
    """Raise unless a figure ends in .png and a table in .csv."""
    for path, ending in ((figure, ".png"), (table, ".csv")):
        if path is not None and Path(path).suffix != ending:
            raise SettingError(
                "another kind of file is written", expected=f"a name that ends in {ending}", got=str(path)
            )


def _endings(evaluations: list[Any]) -> list[str]:
    """What the names of each evaluation's files end in; no two are the same."""
    found: list[str] = []
    for number, evaluation in enumerate(evaluations, start=1):
        again = evaluation.output in [other.output for other in evaluations[: number - 1]]
        ending = f"-{number}" if again else "-" + re.sub(r"[^\w.-]", "_", evaluation.output)
        while ending in [*found, "-means"]:  # the means of the first
            ending += f"-{number}"
        found.append(ending if number > 1 else "")
    return found


def _longer(path: str | Path, ending: str) -> Path:
    return Path(path).with_stem(f"{Path(path).stem}{ending}")
