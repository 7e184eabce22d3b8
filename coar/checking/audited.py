"""What an audit found, component by component."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HIDDEN = 0.5  # of an effect: where rounding is more, the audit does not see what is missing


@dataclass(frozen=True)
class Audited:
    """One component.

    Attributes:
        name: of the component.
        group: that it is in.
        exact: output with it minus output without it, from real ablations, [columns].
        integral: of the derivative by its gate, [columns].
        nodes: of the integral.
        rounding: that comparing allows for, in the units of `effect`.
        missed: what the integral lacks, as a share of the effect (root of sums of squares over columns).
        agrees: whether that is within tolerance, rounding and the error of the integral.
    """

    name: str
    group: str
    exact: np.ndarray
    integral: np.ndarray
    nodes: int
    rounding: float
    missed: float
    agrees: bool

    @property
    def still(self) -> bool:
        """Whether the derivative is 0 although the component has an effect."""
        return not self.integral.any() and bool(self.exact.any())

    @property
    def hidden(self) -> bool:
        """Whether a component with an effect could lose half of it unseen, for rounding of the outputs."""
        effect = max(float(np.linalg.norm(self.exact)), float(np.linalg.norm(self.integral)))
        return effect > 0 and self.rounding > HIDDEN * effect


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        components: those that were audited.
        columns: names of the columns that were looked at.
        ends: largest difference between literal ablation and gates of 0 and 1, in output units.
        ends_agree: whether that is rounding.
        placements: where each group's gates act.
        fallen: groups whose gates stay at their layer, and why.
        rows: real ablations that were run.
        passes: forward and backward passes of single examples.
        examples: how many were looked at.
        num_groups: of the experiment, audited or not.
    """

    components: tuple[Audited, ...]
    columns: tuple[str, ...]
    ends: float
    ends_agree: bool
    placements: dict[str, str]
    fallen: dict[str, str]
    rows: int
    passes: int
    examples: int
    num_groups: int

    @property
    def unaudited_groups(self) -> int:
        """Groups none of whose components was looked at."""
        return self.num_groups - len({one.group for one in self.components})

    @property
    def disagreeing(self) -> list[Audited]:
        """Components whose derivatives do not add up to their effects."""
        return [one for one in self.components if not one.agrees]

    @property
    def missed(self) -> float:
        """Share of all audited effects that derivatives lack: root of the ratio of sums of squares."""
        lacking = sum(float(((one.exact - one.integral) ** 2).sum()) for one in self.components)
        effects = sum(float((one.exact**2).sum()) for one in self.components)
        return float(np.sqrt(lacking / effects)) if effects else 0.0
