"""compare_edits: the same edit by several methods, on the same examples, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from coar.editing.effect import Effect
from coar.editing.fine_tuning import CannotTrainError, FineTuned, fine_tune
from coar.editing.making import make_edit
from coar.editing.parts import EditParts
from coar.editing.ranked import Direction
from coar.editing.result import EditResult
from coar.errors import EditError, GuardError
from coar.experiments.ablation import ComponentAblation
from coar.rows import require_output

if TYPE_CHECKING:
    import pandas

METHODS = ("gate_gradients", "derivative", "weight_norm", "random", "fine_tuning")
GUARDS = ("max_accuracy_drop", "max_output_drop", "protect")  # what fine-tuning has in common with edits


@dataclass(frozen=True, repr=False)
class EditComparison:
    """What every method did, or why it did nothing.

    Attributes:
        results: per method; None where no size met the guard.
        notes: per method without a result, the best that it could have done.
        untouched: outputs before any edit of the examples like the targets, and of the others.
        has_accuracy: whether the output's sign says if a prediction is right.
    """

    results: Mapping[str, EditResult | FineTuned | None]
    notes: Mapping[str, str]
    untouched: tuple[np.ndarray, np.ndarray]
    has_accuracy: bool

    def __repr__(self) -> str:
        return f"EditComparison({', '.join(self.results)}; see .table)"

    @property
    def table(self) -> pandas.DataFrame:
        """A line a method: components ablated, seconds, targets and others before and after, note.

        Accuracies of the examples that judge; means of outputs where their sign says nothing. A method
        that met no guard changes nothing: its figures after are those before.
        """
        import pandas

        return pandas.DataFrame([self._line(name) for name in self.results])

    def summary(self) -> str:
        """The table as text: accuracies (or mean outputs), then what could not be done and why."""
        unit = "{:.1%}" if self.has_accuracy else "{:.3f}"
        lines = [("method", "components", "seconds", "targets", "others")]
        for row in self.table.to_dict("records"):
            targets, others = (
                " -> ".join(unit.format(row[f"{part}_{when}"]) for when in ("before", "after"))
                for part in ("targets", "others")
            )
            count = str(row["components"] or "-")
            told = (count, f"{row['seconds']:.1f}", targets, others)
            if self.results[row["method"]] is None:
                told = ("-", "-", "nothing within the guard", "")
            lines.append((row["method"], *told))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, *(f"{name}: {note}" for name, note in self.notes.items())])

    def _line(self, name: str) -> dict[str, Any]:
        found = self.results[name]
        targets, others = (Effect(values, values) for values in self.untouched)
        if found is not None:
            targets, others = found.judged, found.report
        components: Any = len(found.edit.names) if isinstance(found, EditResult) else 0
        steps = f"{found.steps} steps of the last layer" if isinstance(found, FineTuned) else ""
        return {
            "method": name,
            "components": components,
            "seconds": np.nan if found is None else round(found.seconds, 2),
            "targets_before": self._figure(targets.before),
            "targets_after": self._figure(targets.after),
            "others_before": self._figure(others.before),
            "others_after": self._figure(others.after),
            "note": self.notes.get(name, steps),
        }

    def _figure(self, outputs: np.ndarray) -> float:
        return float((outputs > 0).mean() if self.has_accuracy else outputs.mean(dtype=np.float64))


def compare_edits(
    experiment: ComponentAblation,
    parts: EditParts,
    direction: Direction = "raise",
    *,
    methods: Sequence[str] = METHODS,
    output: str | None = None,
    **options: Any,
) -> EditComparison:
    """Make the same edit with several methods; each chooses its size on the same holdout.

    Args:
        experiment: whose model; it stays as it is.
        parts: which examples play which part.
        direction: of the targets' outputs.
        methods: of `make_edit`, and "fine_tuning" of the last layer (see `fine_tune`).
        output: which output; needed where there are several.
        options: of `make_edit`, the same for all.

    Raises:
        EditError: as `make_edit`, but where nothing is within the guard, which is a line of the table.

    >>> from coar.testing import linear_experiment
    >>> experiment, _ = linear_experiment()
    >>> parts = EditParts(targets=[0], references=[1, 2, 3], holdout=[4, 5, 6], report=[7, 8, 9])
    >>> found = compare_edits(
    ...     experiment, parts, methods=["derivative", "random"], sizes=[1, 2], max_output_drop=9.0
    ... )
    >>> list(found.table.method)
    ['derivative', 'random']
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise EditError("unknown method of an edit", expected=", ".join(METHODS), got=list(methods))
    name = require_output(output, list(experiment.columns))
    located = parts.located(experiment.columns[name])
    results: dict[str, EditResult | FineTuned | None] = {}
    notes: dict[str, str] = {}
    for method in methods:
        try:
            if method == "fine_tuning":
                guards = {key: options[key] for key in GUARDS if key in options}
                results[method] = fine_tune(experiment, parts, direction, output=name, **guards)
            else:
                results[method] = make_edit(
                    experiment,
                    parts,
                    direction,
                    method=method,  # type: ignore[arg-type]  # checked above
                    output=name,
                    **options,
                )
        except GuardError as error:
            results[method], notes[method] = None, f"nothing within the guard: {error.got}"
        except CannotTrainError as error:
            results[method], notes[method] = None, str(error.what)
    untouched = _untouched(experiment, name)
    accurate = name in experiment.accuracy_outputs
    before = untouched[located.judging], untouched[located.report]
    return EditComparison(results, notes, before, accurate)


def _untouched(experiment: ComponentAblation, output: str) -> np.ndarray:
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    return experiment.prepare(experiment.device)(everything)[output][0]
