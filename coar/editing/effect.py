"""Effect: outputs before and after an edit, and what the linear models expect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, repr=False)
class Effect:
    """Outputs of some columns before and after an edit.

    Attributes:
        before: float32 [columns].
        after: float32 [columns].
        predicted: outputs after the edit that the linear models expect, float64 [columns]; None where
            no attributions were given.
    """

    before: np.ndarray
    after: np.ndarray
    predicted: np.ndarray | None = None

    def __repr__(self) -> str:
        change = f"{self.before.mean():+.2f} -> {self.after.mean():+.2f}"
        expected = "" if self.predicted is None else f" ({self.predicted.mean():+.2f} predicted)"
        return f"Effect(mean {change}{expected} over {len(self.before)} columns)"

    @property
    def accuracy_before(self) -> float:
        """Share of positive outputs (margins: of right predictions) before."""
        return float((self.before > 0).mean())

    @property
    def accuracy_after(self) -> float:
        """Share of positive outputs after."""
        return float((self.after > 0).mean())
