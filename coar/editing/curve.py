"""Curve: outputs against the number of ablated components, and the size that is chosen from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from coar.editing.choice import OVERALL, Sizes
from coar.editing.edit import Edit
from coar.editing.protection import Protect, protected_groups
from coar.editing.ranked import SCORES, Ranked
from coar.errors import EditError
from coar.experiments.base import Experiment

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Curve:
    """Outputs against the number of ablated components.

    Attributes:
        sizes: increasing, starting with 0.
        holdout: positions, in the experiment's columns, of those that choose.
        outputs: float32 [sizes, columns of the experiment].
        where: positions in the experiment's columns of all columns of the attributions.
        groups: holdout columns of every protected subpopulation, by name.
        target_holdout: positions of further examples like the targets, which sizes are compared by.
    """

    ranking: Ranked
    experiment: Experiment
    sizes: tuple[int, ...]
    holdout: np.ndarray
    outputs: np.ndarray
    where: np.ndarray
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)
    target_holdout: np.ndarray | None = None

    def __repr__(self) -> str:
        protected = f"; protects {', '.join(self.groups)}" if self.groups else ""
        return f"Curve(sizes {', '.join(map(str, self.sizes))}{protected}; see .table)"

    @property
    def targets(self) -> np.ndarray:
        """Positions of the targets in the experiment's columns."""
        return self.where[self.ranking.targets]

    @property
    def compared(self) -> np.ndarray:
        """Positions of the columns that sizes are compared by."""
        return self.targets if self.target_holdout is None else self.target_holdout

    @property
    def has_accuracy(self) -> bool:
        """Whether the sign of the output says if a prediction is right."""
        return self.ranking.attributions.output in self.experiment.accuracy_outputs

    def accuracy(self, columns: np.ndarray | slice) -> np.ndarray:
        """Share of columns with a positive output, per size; NaN where the sign has no meaning."""
        share = (self.outputs[:, columns] > 0).mean(axis=1)
        return share if self.has_accuracy else np.full(len(self.sizes), np.nan)

    @property
    def table(self) -> pandas.DataFrame:
        """Per size: mean output and accuracy of targets, references, holdout and overall, predicted effect.

        "target_holdout" is there where one was given; "overall" is every column of the experiment. Each
        protected group has the accuracy of its holdout columns beside them, under a name such as
        "label=3_accuracy".
        """
        import pandas

        columns: dict[str, Any] = {"size": list(self.sizes)}
        parts: dict[str, Any] = {
            "target": self.targets,
            "reference": self.where[self.ranking.references],
            **({} if self.target_holdout is None else {"target_holdout": self.target_holdout}),
            "holdout": self.holdout,
            "overall": slice(None),
        }
        for name, part in parts.items():
            columns[f"{name}_output"] = self.outputs[:, part].mean(axis=1)
            columns[f"{name}_accuracy"] = self.accuracy(part)
        columns["target_predicted"] = self._predicted()
        groups = {f"{name}_accuracy": self.accuracy(part) for name, part in self.groups.items()}
        return pandas.DataFrame(columns | groups)

    def _predicted(self) -> np.ndarray:
        """Mean target output that the linear models expect, starting from the untouched output.

        NaN where components were ordered by something that predicts no output.
        """
        if self.ranking.score not in SCORES:
            return np.full(len(self.sizes), np.nan)
        weights = self.ranking.attributions.rows(self.ranking.targets).mean(axis=0)
        removed = np.stack([~self.ranking.mask(size) for size in self.sizes])
        return self.outputs[0, self.targets].mean() - removed @ weights.astype(np.float64)

    def protecting(self, protect: Protect | None) -> Curve:
        """The same curve with more protected subpopulations: columns of the table, and guards of the choice.

        Args:
            protect: a column of the task's metadata, or a list of them: every value that it has; or
                `{"label": [3, 5]}`: these values.

        Raises:
            EditError: no such column or value, or no holdout example of a group.
        """
        axis = self.experiment.columns[self.ranking.attributions.output]
        groups = protected_groups(self.experiment, axis, self.holdout, protect)
        return replace(self, groups={**self.groups, **groups})

    def choose(
        self,
        max_accuracy_drop: float = 0.005,
        max_size: int | None = None,
        protect: Protect | None = None,
        max_output_drop: float | None = None,
    ) -> Edit:
        """The size that does most for the targets while the holdout keeps its accuracy.

        Most targets moved to the wanted side of 0 come first, then the smallest size; where no target
        crosses 0, or the sign means nothing, the largest change of the mean output. "Targets" are those
        of `target_holdout` where there is one.

        Args:
            max_accuracy_drop: on the holdout, as a fraction (0.005 = half a point).
            max_size: at most so many components.
            protect: subpopulations for which the guard holds as well, each by itself; see `protecting`.
            max_output_drop: of the holdout's mean output, in output units; needed where the sign of the
                output does not say whether a prediction is right (a log-probability, say).

        Raises:
            GuardError: no size meets the guard and changes the targets; says the best that could be done.
            EditError: there is nothing to guard by.
        """
        if not self.has_accuracy and max_output_drop is None:
            raise EditError(
                f"output {self.ranking.attributions.output!r} does not say whether a prediction is right",
                expected="an output whose sign does, such as coar.outputs.margin; or max_output_drop",
                todo="take the margin, or say how far the mean output of the holdout may fall",
            )
        curve = self.protecting(protect)
        sizes = curve.effects()
        return curve.edit(sizes.best(max_accuracy_drop, max_size, max_output_drop))

    def effects(self) -> Sizes:
        """What every size does for what is compared, and what it costs."""
        outputs = self.outputs[:, self.compared].astype(np.float64)
        change, right = outputs.mean(axis=1) - outputs[0].mean(), outputs > 0
        raised = self.ranking.direction == "raise"
        parts = {OVERALL: self.holdout, **self.groups}
        accuracy = {name: self.accuracy(part) for name, part in parts.items()}
        means = {name: self.outputs[:, part].mean(axis=1, dtype=np.float64) for name, part in parts.items()}
        done = (right if raised else ~right).mean(axis=1) * self.has_accuracy
        drops, output_drops = (
            {name: values[0] - values for name, values in measured.items()} for measured in (accuracy, means)
        )
        return Sizes(np.array(self.sizes), change if raised else -change, done, drops, output_drops)

    def edit(self, step: int) -> Edit:
        """The edit of one of the sizes, by its position."""
        ranking, size = self.ranking, self.sizes[step]
        effects = self.effects()
        drops = {name: float(drop[step]) for name, drop in effects.drops.items()}
        names = ranking.attributions.columns.names
        indices = [int(i) for i in ranking.order[:size]]
        provenance = {
            "direction": ranking.direction,
            "score": ranking.score,
            "spread": ranking.spread,
            "output": ranking.attributions.output,
            "attributions": ranking.attributions.provenance,
            "targets": [names[i] for i in ranking.targets],
            "references": [names[i] for i in ranking.references],
            "target_output_before": float(self.outputs[0, self.targets].mean()),
            "target_output_after": float(self.outputs[step, self.targets].mean()),
            "target_output_predicted": _number(self._predicted()[step]),
            "holdout_accuracy_drop": drops[OVERALL] if self.has_accuracy else None,
            "holdout_output_drop": float(effects.output_drops[OVERALL][step]),
            "protected_components": list(ranking.protected),
            "protected_accuracy_drops": {
                name: _number(drop) for name, drop in drops.items() if name != OVERALL
            },
        }
        return Edit.of(self.experiment, indices, [float(ranking.scores[i]) for i in indices], provenance)


def _number(value: float) -> float | None:
    """As JSON knows it: no NaN."""
    return None if np.isnan(value) else float(value)
