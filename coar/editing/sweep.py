"""Sweep: ablate the first components of a ranking really, more and more of them, and choose how many.

Four sets of examples play four parts and must not overlap: targets (whose outputs are to change), references
(whose outputs are not), a holdout (which chooses the size), and whatever the caller reports on afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.editing.choice import OVERALL, Sizes
from coar.editing.columns import Columns, positions_in, require_disjoint
from coar.editing.edit import Edit
from coar.editing.protection import Protect, protected_groups
from coar.errors import EditError
from coar.experiments.base import Experiment
from coar.progress import progress_bar
from coar.work import require_storable

if TYPE_CHECKING:
    import pandas

Direction = Literal["raise", "lower"]


@dataclass(frozen=True, repr=False)
class Ranking:
    """Components in the order in which to ablate them.

    Attributes:
        order: int64 [components that are not protected], first the one to ablate first.
        scores: float64 [components]; the lowest (to raise) or highest (to lower) come first.
        targets: positions of the target columns in the attributions.
        references: positions of the reference columns.
        attributions: what was ranked.
        direction: "raise" or "lower".
        score: "welch" or "difference".
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
        return f"Ranking({', '.join(said)}, first {first})"

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

    def sweep(
        self,
        experiment: Experiment,
        sizes: Sequence[int],
        holdout: Columns,
        *,
        protect: Protect | None = None,
        progress: bool = True,
    ) -> Curve:
        """Really ablate the first `size` components, for each size, and read all outputs.

        Args:
            experiment: the one that the attributions are of.
            sizes: numbers of components; 0 is always included.
            holdout: columns that choose the size; neither targets nor references. By name, any of the
                experiment's; by position, those of the attributions.
            protect: subpopulations that the choice must not harm, see `Curve.protecting`.
            progress: show a bar.

        Raises:
            EditError: the holdout overlaps targets or references, or a size is out of range.
        """
        ours, output = self.attributions, self.attributions.output
        ours.components.require_same(experiment.components, "attributions", "experiment")
        axis = experiment.columns[output]
        where = ours.columns.locate(axis, "attributions", "experiment")
        chosen = positions_in(axis, ours.columns, where, holdout, "holdout")
        require_disjoint(axis, chosen, "holdout", where[self.targets], "targets")
        require_disjoint(axis, chosen, "holdout", where[self.references], "references")
        steps = _sizes(sizes, len(self.order))
        groups = protected_groups(experiment, axis, chosen, protect)
        outputs = self._outputs(experiment, steps, axis, progress)
        return Curve(self, experiment, steps, chosen, outputs, where, groups)

    def _outputs(
        self, experiment: Experiment, steps: Sequence[int], axis: Axis, progress: bool
    ) -> np.ndarray:
        """All outputs of the experiment per size, [sizes, columns]."""
        output = self.attributions.output
        runner = experiment.prepare(experiment.device)
        outputs = []
        with progress_bar(len(steps), "sweep over edit sizes", progress) as bar:
            for size in steps:
                values = runner(self.mask(size)[None])[output][0]
                require_storable(values, size, output, axis.names)
                outputs.append(values)
                bar.update(1)
        return np.stack(outputs)

    def mask(self, size: int) -> np.ndarray:
        """Keep mask, bool [components], with the first `size` components ablated."""
        keep = np.ones(len(self.scores), dtype=bool)
        keep[self.order[:size]] = False
        return keep


@dataclass(frozen=True, repr=False)
class Curve:
    """Outputs against the number of ablated components.

    Attributes:
        sizes: increasing, starting with 0.
        holdout: positions, in the experiment's columns, of those that choose.
        outputs: float32 [sizes, columns of the experiment].
        where: positions in the experiment's columns of all columns of the attributions.
        groups: holdout columns of every protected subpopulation, by name.
    """

    ranking: Ranking
    experiment: Experiment
    sizes: tuple[int, ...]
    holdout: np.ndarray
    outputs: np.ndarray
    where: np.ndarray
    groups: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        protected = f"; protects {', '.join(self.groups)}" if self.groups else ""
        return f"Curve(sizes {', '.join(map(str, self.sizes))}{protected}; see .table)"

    @property
    def targets(self) -> np.ndarray:
        """Positions of the targets in the experiment's columns."""
        return self.where[self.ranking.targets]

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

        "overall" is every column of the experiment. Each protected group has the accuracy of its holdout
        columns beside them, under a name such as "label=3_accuracy".
        """
        import pandas

        columns: dict[str, Any] = {"size": list(self.sizes)}
        parts: dict[str, Any] = {
            "target": self.targets,
            "reference": self.where[self.ranking.references],
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
        """Mean target output that the linear models expect, starting from the untouched output."""
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
    ) -> Edit:
        """The size that does most for the targets while the holdout keeps its accuracy.

        Most targets moved to the wanted side of 0 come first, then the smallest size; where no target
        crosses 0, the largest change of the targets' mean output.

        Args:
            max_accuracy_drop: on the holdout, as a fraction (0.005 = half a point).
            max_size: at most so many components.
            protect: subpopulations for which the guard holds as well, each by itself; see `protecting`.

        Raises:
            EditError: no size meets the guard and changes the targets; says the best that could be done.
                Or the output's sign does not say whether a prediction is right.
        """
        if not self.has_accuracy:
            raise EditError(
                f"output {self.ranking.attributions.output!r} does not say whether a prediction is right",
                expected="an output whose sign does, such as coar.outputs.margin",
                todo="make attributions of the margin",
            )
        curve = self.protecting(protect)
        sizes = curve._effects()
        step = sizes.best(max_accuracy_drop, max_size)
        return curve._edit(step, {name: float(drop[step]) for name, drop in sizes.drops.items()})

    def _effects(self) -> Sizes:
        outputs = self.outputs[:, self.targets]
        change, right = outputs.mean(axis=1) - outputs[0].mean(), outputs > 0
        raised = self.ranking.direction == "raise"
        accuracy = {
            name: self.accuracy(part) for name, part in {OVERALL: self.holdout, **self.groups}.items()
        }
        drops = {name: share[0] - share for name, share in accuracy.items()}
        done = (right if raised else ~right).mean(axis=1)
        return Sizes(np.array(self.sizes), change if raised else -change, done, drops)

    def _edit(self, step: int, drops: Mapping[str, float]) -> Edit:
        ranking, size = self.ranking, self.sizes[step]
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
            "target_output_predicted": float(self._predicted()[step]),
            "holdout_accuracy_drop": drops[OVERALL],
            "protected_components": list(ranking.protected),
            "protected_accuracy_drops": {name: drop for name, drop in drops.items() if name != OVERALL},
        }
        return Edit.of(self.experiment, indices, [float(ranking.scores[i]) for i in indices], provenance)


def _sizes(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    steps = sorted({0, *(int(size) for size in sizes)})
    if steps[0] < 0 or steps[-1] > limit or len(steps) < 2:
        raise EditError("sizes out of range", expected=f"at least one in 1 .. {limit}", got=list(sizes))
    return tuple(steps)
