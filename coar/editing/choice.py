"""Choice: which size of an edit does most for its targets within its guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from coar.errors import EditError, GuardError

OVERALL = "holdout"
_EXACT = 1e-12  # a drop of exactly the limit is allowed, however its digits end


@dataclass(frozen=True)
class Sizes:
    """What every size of an edit does.

    Attributes:
        sizes: int [sizes], increasing, starting with 0.
        gain: change of the targets' mean output in the wanted direction, [sizes].
        done: share of targets on the wanted side of 0, [sizes].
        drops: accuracy lost, [sizes], of the whole holdout and of every protected group of it; NaN where
            the output's sign says nothing.
        output_drops: mean output lost, likewise.
    """

    sizes: np.ndarray
    gain: np.ndarray
    done: np.ndarray
    drops: Mapping[str, np.ndarray]
    output_drops: Mapping[str, np.ndarray] = field(default_factory=dict)

    def best(
        self, max_accuracy_drop: float, max_size: int | None = None, max_output_drop: float | None = None
    ) -> int:
        """Position of the size to choose.

        Most targets on the wanted side of 0 come first, then the smallest size; where no target crosses
        0, the largest change of the targets' mean output.

        Args:
            max_accuracy_drop: of the whole holdout and of every group, as a fraction.
            max_size: at most so many components.
            max_output_drop: of the mean output of the whole holdout and of every group; None asks nothing.

        Raises:
            GuardError: no size meets the guard and changes the targets; says the best that could be done.
        """
        if not 0 <= max_accuracy_drop <= 1:
            raise EditError(
                "max_accuracy_drop is a fraction",
                expected="0 to 1; 0.005 is half a point",
                got=max_accuracy_drop,
            )
        largest = self.sizes[-1] if max_size is None else max_size
        if self.sizes[1] > largest:
            raise EditError(
                "no size is within max_size",
                expected=f"max_size of at least {self.sizes[1]}, the smallest that was swept",
                got=max_size,
            )
        within = self.sizes <= largest
        limits = max_accuracy_drop, None if max_output_drop is None else _positive(max_output_drop)
        moved = (self.gain > 0) | (self.done > self.done[0])
        candidates = np.flatnonzero(within & (self._excess(*limits) <= _EXACT) & moved)
        if not len(candidates):
            raise self._cannot(*limits, max_size, np.flatnonzero(within))
        best = candidates[np.lexsort((self.sizes[candidates], -self.done[candidates]))[0]]
        if self.done[best] <= self.done[0]:  # no target crosses 0: take the largest change instead
            best = candidates[np.argmax(self.gain[candidates])]
        return int(best)

    def _excess(self, limit: float, most_lost: float | None) -> np.ndarray:
        """By how much each size breaks its guards, the worst of all groups, [sizes]; 0 or less keeps them."""
        accuracy = np.max(list(self.drops.values()), axis=0) - limit
        found = np.full(len(self.sizes), -np.inf) if self._blind else accuracy
        if most_lost is None:
            return found
        return np.maximum(found, np.max(list(self.output_drops.values()), axis=0) - most_lost)

    def _cannot(
        self, limit: float, most_lost: float | None, max_size: int | None, within: np.ndarray
    ) -> GuardError:
        groups = [name for name in self.drops if name != OVERALL]
        within = within[within > 0]  # size 0 is no edit
        strongest = int(within[np.argmax(self.gain[within])])
        got = f"best for the targets: {self._described(strongest, most_lost)}"
        helping = within[self.gain[within] > 0]
        if len(helping):
            gentlest = int(helping[np.argmin(self._excess(limit, most_lost)[helping])])
            got += "" if gentlest == strongest else f"; least harm: {self._described(gentlest, most_lost)}"
        return GuardError(
            "no size of this edit moves the targets within the guard; nothing was applied",
            expected=self._guard(limit, most_lost)
            + (f", also of {', '.join(groups)}" if groups else "")
            + ("" if max_size is None else f", size <= {max_size}"),
            got=got,
            todo="allow a larger drop, try smaller sizes, or give more references"
            + (", also of the protected groups" if groups else ""),
        )

    def _guard(self, limit: float, most_lost: float | None) -> str:
        parts = [] if self._blind else [f"holdout accuracy down by at most {limit:.2%}"]
        parts += [] if most_lost is None else [f"holdout output down by at most {most_lost:.4g}"]
        return ", ".join(parts)

    @property
    def _blind(self) -> bool:
        return bool(np.isnan(self.drops[OVERALL]).any())

    def _described(self, step: int, most_lost: float | None) -> str:
        """A size, what it does for the targets, and what it costs: the holdout and the worst group."""
        lost = [] if self._blind else [f"holdout accuracy down {self.drops[OVERALL][step]:.2%}"]
        if most_lost is not None:
            lost.append(f"holdout output down {self.output_drops[OVERALL][step]:.4g}")
        text = f"{self.sizes[step]} components, outputs moved by {self.gain[step]:+.2f}, {', '.join(lost)}"
        groups = {name: drop[step] for name, drop in self.drops.items() if name != OVERALL}
        if not groups or self._blind:
            return text
        worst = max(groups, key=lambda name: groups[name])
        return f"{text}, of {worst} {groups[worst]:.2%}"


def _positive(drop: float) -> float:
    if not drop >= 0:
        raise EditError("max_output_drop is a loss in output units", expected="a number, 0 or more", got=drop)
    return drop
