"""What a user should be told about a fit: designs that leave weights open, penalties at the edge."""

from __future__ import annotations

import warnings

import numpy as np

from coar.errors import CoarWarning
from coar.regression.statistics import MaskCounts


def warn_design(masks: MaskCounts, rank: int | None) -> None:
    """Warn of components that never vary, of few rows, of masks that vary in fewer directions."""
    constant, num_components = int(masks.constant.sum()), len(masks.counts)
    if constant:
        say(
            f"{constant} of {num_components} components were kept, or ablated, in every one of {masks.rows} "
            "rows: their weight is 0 and its error infinite; add rows"
        )
    if masks.rows <= num_components:
        say(
            f"{masks.rows} rows for {num_components} components: with fewer rows than unknowns the weights "
            "lean on the penalty and are shrunk; 5 to 20 rows per component is usual"
        )
    determined = num_components - constant
    if rank is not None and rank < determined < masks.rows:
        say(
            f"the masks vary in {rank} directions, not {determined}: in sets of one size, for "
            "example, nothing tells the common level of the weights from the intercept. Predictions hold for "
            "masks of this design; "
            "Bernoulli masks determine every weight"
        )


def warn_edges(chosen: np.ndarray, grid: np.ndarray) -> None:
    """Warn where many columns chose the smallest or the largest of three or more penalties."""
    if len(grid) < 3 or not len(chosen):
        return
    # A smallest penalty that shrinks by a thousandth or less is as good as none: nothing lies beyond it.
    at_edge = float(np.mean((chosen == grid.max()) | ((chosen == grid.min()) & (chosen > 1e-3))))
    if at_edge > 0.2:
        say(
            f"{at_edge:.0%} of the columns chose the smallest or largest penalty ({grid.min():g}, "
            f"{grid.max():g}): widen Ridge(penalties=...)"
        )


def say(text: str) -> None:
    """Warn."""
    warnings.warn(text, CoarWarning, stacklevel=2)
