"""Ranked: components in the order in which to ablate them, and by what they were put in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from coar.attributions import Attributions

if TYPE_CHECKING:
    import pandas

Direction = Literal["raise", "lower"]
SCORES = ("welch", "difference", "contrast", "cautious")  # of attributions; other orders predict no output


@dataclass(frozen=True, repr=False)
class Ranked:
    """Components in the order in which to ablate them.

    Attributes:
        order: int64 [components that are not protected], first the one to ablate first.
        scores: float64 [components]; the lowest (to raise) or highest (to lower) come first.
        targets: positions of the target columns in the attributions.
        references: positions of the reference columns.
        attributions: what was ranked.
        direction: "raise" or "lower".
        score: "welch", "difference", "contrast" or "cautious", or what else orders them.
        protected: patterns of components that are never ablated.
    """

    order: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    references: np.ndarray
    attributions: Attributions
    direction: Direction
    score: str
    protected: tuple[str, ...] = ()

    def __repr__(self) -> str:
        first = self.attributions.components.names[self.order[0]]
        kept = len(self.scores) - len(self.order)
        said = [f"{len(self.order)} components by {self.score}"]
        said += [f"{self.spread} in the denominator"] if self.score == "welch" else []
        said += [f"{kept} protected"] if kept else []
        return f"{type(self).__name__}({', '.join(said)}, first {first})"

    @property
    def spread(self) -> str:
        """Whose spread is the yardstick of Welch's t: a single target, or reference, has none."""
        if self.score != "welch":
            return "none"
        if len(self.targets) == 1:
            return "reference spread"
        return "target spread" if len(self.references) == 1 else "target and reference spread"

    def table(self, count: int = 20) -> pandas.DataFrame:
        """The first components: component, group, score."""
        import pandas

        axis, first = self.attributions.components, self.order[:count]
        groups = axis.fields.get("group", np.array(["all"] * len(axis)))
        names = [axis.names[i] for i in first]
        return pandas.DataFrame({"component": names, "group": groups[first], "score": self.scores[first]})

    def mask(self, size: int) -> np.ndarray:
        """Keep mask, bool [components], with the first `size` components ablated."""
        keep = np.ones(len(self.scores), dtype=bool)
        keep[self.order[:size]] = False
        return keep
