"""An evaluation as files: a figure, and a table for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coar.errors import SettingError
from coar.report.evaluation_figures import correlation_by_fraction, correlation_histogram
from coar.report.style import new_figure, save_figure


def evaluation_figure(evaluation: Any) -> Any:
    """Mean correlation over fractions, and its histogram over columns at the last fraction.

    Args:
        evaluation: a `coar.Evaluation`.

    Returns:
        A matplotlib Figure.
    """
    figure, (left, right) = new_figure(columns=2, width=6.5)
    correlation_by_fraction(evaluation.means(), ax=left)
    correlation_histogram(evaluation.table, ax=right, fraction=list(evaluation.truth)[-1])
    return figure


def save_evaluations(
    evaluations: list[Any], figure: str | Path | None = None, table: str | Path | None = None
) -> list[Path]:
    """Write a PNG and a CSV of each evaluation; a second one gets the number 2 in its files' names.

    Args:
        evaluations: of one study, one for each set of columns.
        figure: a .png file; None writes none.
        table: a .csv file of `Evaluation.table`, a line per method, fraction and column; None writes none.

    Returns:
        What was written; older files of these names are replaced.

    Raises:
        SettingError: a file name with another ending.
    """
    require_endings(figure, table)
    written = []
    for number, evaluation in enumerate(evaluations, start=1):
        if figure is not None:
            written.append(save_figure(evaluation_figure(evaluation), _numbered(figure, number)))
        if table is not None:
            path = _numbered(table, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            evaluation.table.to_csv(path, index=False)
            written.append(path)
    return written


def require_endings(figure: str | Path | None, table: str | Path | None) -> None:
    """Raise unless a figure ends in .png and a table in .csv."""
    for path, ending in ((figure, ".png"), (table, ".csv")):
        if path is not None and Path(path).suffix != ending:
            raise SettingError(
                "another kind of file is written", expected=f"a name that ends in {ending}", got=str(path)
            )


def _numbered(path: str | Path, number: int) -> Path:
    path = Path(path)
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")
