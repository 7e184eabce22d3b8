"""EditResult: an edit, how it was chosen, and what it does."""

from __future__ import annotations

from dataclasses import dataclass

from coar.editing.curve import Curve
from coar.editing.edit import Edit, listed
from coar.editing.effect import Effect


@dataclass(frozen=True, repr=False)
class EditResult:
    """An edit, how it was chosen, and what it does.

    Attributes:
        edit: what to ablate.
        curve: the sweep that chose its size.
        targets: effect on the targets.
        report: effect on examples that chose nothing.
        target_report: effect on examples like the targets that chose nothing, where there are some.
        seconds: from the examples to the edit.
    """

    edit: Edit
    curve: Curve
    targets: Effect
    report: Effect
    target_report: Effect | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"EditResult({self.edit!r}; see .summary())"

    @property
    def judged(self) -> Effect:
        """Effect on examples like the targets that chose nothing; on the targets where there are none."""
        return self.targets if self.target_report is None else self.target_report

    def summary(self) -> str:
        """Components, outputs before and after, accuracy before and after, protected groups."""
        provenance = self.edit.provenance
        drops = provenance["protected_accuracy_drops"]
        lines = [
            f"ablating {len(self.edit.names)} of {len(self.curve.ranking.scores)} components: "
            f"{listed(self.edit.names)}",
            self._line(provenance["output"], self.targets),
        ]
        if self.target_report is not None:
            lines.append(self._judged("targets", self.target_report, "examples like the targets"))
        lines.append(self._judged("accuracy", self.report, "examples that chose nothing"))
        lines.append(self._guard())
        lines += [
            f"protected {name}: {0 - 100 * drop:+.1f} points on the holdout" for name, drop in drops.items()
        ]
        return "\n  ".join(lines)

    def _guard(self) -> str:
        provenance, count = self.edit.provenance, len(self.curve.holdout)
        lost = provenance["holdout_accuracy_drop"]
        if lost is None:
            return f"guard     {-provenance['holdout_output_drop']:+.3f} on the {count} that chose the size"
        return f"guard     {0 - 100 * lost:+.1f} points on the {count} that chose the size"

    def _line(self, output: str, effect: Effect) -> str:
        expected = self.edit.provenance["target_output_predicted"]
        told = "" if expected is None else f" (the linear models expected {expected:+.2f})"
        means = f"{effect.before.mean():+.2f} before, {effect.after.mean():+.2f} after"
        return f"{output:<9} {means}{told}"

    def _judged(self, what: str, effect: Effect, whose: str) -> str:
        if not self.curve.has_accuracy:
            change = effect.after.mean() - effect.before.mean()
            means = f"{effect.before.mean():+.3f} before, {effect.after.mean():+.3f} after ({change:+.3f})"
            return f"{'others' if what == 'accuracy' else what:<9} {means} on {len(effect.before)} {whose}"
        points = 100 * (effect.accuracy_after - effect.accuracy_before)
        return (
            f"{what:<9} {effect.accuracy_before:.1%} before, {effect.accuracy_after:.1%} after "
            f"({points:+.1f} points) on {len(effect.before)} {whose}"
        )
