"""Sweep: ablate the first components of a ranking really, more and more of them, and choose how many.

Four sets of examples play four parts and must not overlap: targets (whose outputs are to change), references
(whose outputs are not), a holdout (which chooses the size), and whatever the caller reports on afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.editing.edit import Columns, Edit, positions_of
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
        order: int64 [components], first the one to ablate first.
        scores: float64 [components]; the lowest (to raise) or highest (to lower) come first.
        targets: positions of the target columns in the attributions.
        references: positions of the reference columns.
        attributions: what was ranked.
    """

    order: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    references: np.ndarray
    attributions: Attributions
    direction: Direction
    score: str

    def __repr__(self) -> str:
        first = self.attributions.components.names[self.order[0]]
        return f"Ranking({len(self.order)} components by {self.score}, first {first})"

    def table(self, count: int = 20) -> pandas.DataFrame:
        """The first components: component, group, score."""
        import pandas

        axis, first = self.attributions.components, self.order[:count]
        groups = axis.fields.get("group", np.array(["all"] * len(axis)))
        names = [axis.names[i] for i in first]
        return pandas.DataFrame({"component": names, "group": groups[first], "score": self.scores[first]})

    def sweep(
        self, experiment: Experiment, sizes: Sequence[int], holdout: Columns, *, progress: bool = True
    ) -> Curve:
        """Really ablate the first `size` components, for each size, and read all outputs.

        Args:
            experiment: the one that the attributions are of.
            sizes: numbers of components; 0 is always included.
            holdout: columns that choose the size; neither targets nor references.
            progress: show a bar.

        Raises:
            EditError: the holdout overlaps targets or references, or a size is out of range.
        """
        self.attributions.components.require_same(experiment.components, "attributions", "experiment")
        chosen = positions_of(self.attributions.columns, holdout, "holdout")
        require_disjoint(self.attributions.columns, chosen, "holdout", self.targets, "targets")
        require_disjoint(self.attributions.columns, chosen, "holdout", self.references, "references")
        steps = _sizes(sizes, len(self.order))
        output = self.attributions.output
        where = self.attributions.columns.locate(experiment.columns[output], "attributions", "experiment")
        runner = experiment.prepare(experiment.device)
        outputs = []
        with progress_bar(len(steps), "sweep over edit sizes", progress) as bar:
            for size in steps:
                values = runner(self.mask(size)[None])[output][0]
                require_storable(values, size, output, experiment.columns[output].names)
                outputs.append(values[where])
                bar.update(1)
        return Curve(self, experiment, steps, chosen, np.stack(outputs))

    def mask(self, size: int) -> np.ndarray:
        """Keep mask, bool [components], with the first `size` components ablated."""
        keep = np.ones(len(self.order), dtype=bool)
        keep[self.order[:size]] = False
        return keep


@dataclass(frozen=True, repr=False)
class Curve:
    """Outputs against the number of ablated components.

    Attributes:
        sizes: increasing, starting with 0.
        holdout: positions of the columns that choose.
        outputs: float32 [sizes, columns].
    """

    ranking: Ranking
    experiment: Experiment
    sizes: tuple[int, ...]
    holdout: np.ndarray
    outputs: np.ndarray

    def __repr__(self) -> str:
        return f"Curve(sizes {', '.join(map(str, self.sizes))}; see .table)"

    @property
    def has_accuracy(self) -> bool:
        """Whether the sign of the output says if a prediction is right."""
        return self.ranking.attributions.output in self.experiment.accuracy_outputs

    def accuracy(self, columns: np.ndarray) -> np.ndarray:
        """Share of columns with a positive output, per size; NaN where the sign has no meaning."""
        share = (self.outputs[:, columns] > 0).mean(axis=1)
        return share if self.has_accuracy else np.full(len(self.sizes), np.nan)

    @property
    def table(self) -> pandas.DataFrame:
        """Per size: mean output and accuracy of targets, references and holdout, and the predicted effect."""
        import pandas

        columns: dict[str, Any] = {"size": list(self.sizes)}
        parts = {
            "target": self.ranking.targets,
            "reference": self.ranking.references,
            "holdout": self.holdout,
        }
        for name, part in parts.items():
            columns[f"{name}_output"] = self.outputs[:, part].mean(axis=1)
            columns[f"{name}_accuracy"] = self.accuracy(part)
        columns["target_predicted"] = self._predicted()
        return pandas.DataFrame(columns)

    def _predicted(self) -> np.ndarray:
        """Mean target output that the linear models expect, starting from the untouched output."""
        weights = self.ranking.attributions.rows(self.ranking.targets).mean(axis=0)
        removed = np.stack([~self.ranking.mask(size) for size in self.sizes])
        return self.outputs[0, self.ranking.targets].mean() - removed @ weights.astype(np.float64)

    def choose(self, max_accuracy_drop: float = 0.005, max_size: int | None = None) -> Edit:
        """The size that does most for the targets while the holdout keeps its accuracy.

        Most targets moved to the wanted side of 0 come first, then the smallest size; where no target
        crosses 0, the largest change of the targets' mean output.

        Args:
            max_accuracy_drop: on the holdout, as a fraction (0.005 = half a point).
            max_size: at most so many components.

        Raises:
            EditError: no size meets the guard and changes the targets; says the best that could be done.
                Or the output's sign does not say whether a prediction is right.
        """
        if not 0 <= max_accuracy_drop <= 1:
            raise EditError(
                "max_accuracy_drop is a fraction",
                expected="0 to 1; 0.005 is half a point",
                got=max_accuracy_drop,
            )
        if not self.has_accuracy:
            raise EditError(
                f"output {self.ranking.attributions.output!r} does not say whether a prediction is right",
                expected="an output whose sign does, such as coar.outputs.margin",
                todo="make attributions of the margin",
            )
        accuracy = self.accuracy(self.holdout)
        drop = accuracy[0] - accuracy
        gain = self._gain()
        largest = self.sizes[-1] if max_size is None else max_size
        allowed = (drop <= max_accuracy_drop + 1e-12) & (np.array(self.sizes) <= largest)
        useful = allowed & (gain > gain[0])
        if not useful.any():
            raise self._cannot(gain, drop, max_accuracy_drop, max_size)
        candidates = np.flatnonzero(useful)
        done = self._done()
        best = candidates[np.lexsort((np.array(self.sizes)[candidates], -done[candidates]))[0]]
        if done[best] <= done[0]:  # no target crosses 0: take the largest change instead
            best = candidates[np.argmax(gain[candidates])]
        return self._edit(int(best), float(drop[best]))

    def _gain(self) -> np.ndarray:
        """Mean change of the target outputs in the wanted direction, per size."""
        change = (
            self.outputs[:, self.ranking.targets].mean(axis=1) - self.outputs[0, self.ranking.targets].mean()
        )
        return change if self.ranking.direction == "raise" else -change

    def _done(self) -> np.ndarray:
        """Share of targets on the wanted side of 0, per size."""
        positive = self.outputs[:, self.ranking.targets] > 0
        return (positive if self.ranking.direction == "raise" else ~positive).mean(axis=1)

    def _cannot(self, gain: np.ndarray, drop: np.ndarray, limit: float, max_size: int | None) -> EditError:
        best = 1 + int(np.argmax(gain[1:]))  # size 0 is no edit
        return EditError(
            "no size of this edit moves the targets within the guard; nothing was applied",
            expected=f"holdout accuracy down by at most {limit:.2%}"
            + ("" if max_size is None else f", size <= {max_size}"),
            got=f"best for the targets: {self.sizes[best]} components, outputs {gain[best]:+.2f}, "
            f"holdout accuracy down {drop[best]:.2%}",
            todo="allow a larger drop, try smaller sizes, or give more references",
        )

    def _edit(self, step: int, drop: float) -> Edit:
        ranking, size = self.ranking, self.sizes[step]
        indices = [int(i) for i in ranking.order[:size]]
        row = self.table.iloc[step]
        return Edit.of(
            self.experiment,
            indices,
            scores=[float(ranking.scores[i]) for i in indices],
            provenance={
                "direction": ranking.direction,
                "score": ranking.score,
                "output": ranking.attributions.output,
                "attributions": ranking.attributions.provenance,
                "targets": [ranking.attributions.columns.names[i] for i in ranking.targets],
                "references": [ranking.attributions.columns.names[i] for i in ranking.references],
                "target_output_before": float(self.outputs[0, ranking.targets].mean()),
                "target_output_after": float(row.target_output),
                "target_output_predicted": float(row.target_predicted),
                "holdout_accuracy_drop": drop,
            },
        )


def _sizes(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    steps = sorted({0, *(int(size) for size in sizes)})
    if steps[0] < 0 or steps[-1] > limit or len(steps) < 2:
        raise EditError("sizes out of range", expected=f"at least one in 1 .. {limit}", got=list(sizes))
    return tuple(steps)


def require_disjoint(axis: Axis, first: np.ndarray, one: str, second: np.ndarray, other: str) -> None:
    """Raise if two sets of columns share an example."""
    # By example, not by column: two tokens of one text do not make two examples.
    example = axis.fields.get("example", np.arange(len(axis)))
    both = first[np.isin(example[first], example[second])]
    if len(both):
        raise EditError(
            f"{one} and {other} overlap",
            expected="disjoint examples, so that nothing is chosen and judged on the same ones",
            got=f"{len(both)} in both, first {axis.names[both[0]]!r}",
            todo=f"take them out of the {other}",
        )
