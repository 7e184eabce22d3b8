"""Edit: named components to ablate in one model, and what that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from coar.attributions import Attributions
from coar.axes import Axis
from coar.components import ComponentSet
from coar.editing.columns import Columns, positions_of
from coar.editing.edit_files import plain_scores, read_edit, write_edit
from coar.editing.effect import Effect
from coar.editing.in_place import ablate_in_place, applied_to, restore_in_place
from coar.errors import EditError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.fingerprints import model_fingerprint
from coar.gates import Bias, Means, Value, ablated_copy, pick_means
from coar.rows import require_output
from coar.work import require_storable


@dataclass(frozen=True)
class Edit:
    """Components to ablate, by name, in the model with a given fingerprint.

    Attributes:
        names: of the components.
        components: where they lie, or None for an experiment that does not ablate a model.
        bias: convention of the ablation.
        value: convention of the ablation.
        source: source of the components axis; `source["model"]` is the model's fingerprint.
        scores: by which they were chosen.
        provenance: from which attributions, targets and references; effects on the targets.
        means: what takes the place of each component where value is "mean".
    """

    names: tuple[str, ...]
    components: ComponentSet | None
    bias: Bias
    value: Value
    source: Mapping[str, str]
    scores: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    means: Means | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        indices: Sequence[int],
        scores: Sequence[float] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> Edit:
        """An edit that ablates some components of an experiment, by flat index."""
        names = tuple(experiment.components.names[i] for i in indices)
        source = experiment.components.source
        if isinstance(experiment, ComponentAblation):
            picked = experiment.component_set.pick(indices)
            means = pick_means(experiment.means, experiment.component_set, indices)
            convention = experiment.bias, experiment.value
            return cls(names, picked, *convention, source, tuple(scores), provenance or {}, means)
        return cls(names, None, "keep", "zero", source, tuple(scores), provenance or {})

    def __repr__(self) -> str:
        return f"Edit(ablates {len(self.names)}: {listed(self.names)})"

    def apply(self, model: nn.Module) -> nn.Module:
        """Copy a model with the components ablated for good; the model itself is untouched.

        Raises:
            EditError: another model than the one that the edit was made for.
        """
        components = self._require_model(model)
        keep = np.zeros(len(components), dtype=bool)
        return ablated_copy(model, components, keep, self.bias, self.value, self.means)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Ablate the components in the model itself; `undo_` restores every bit.

        What is overwritten is kept in this process for as long as the model lives. Parameters stay the
        same objects. One edit at a time: two are joined with `+`.

        Returns:
            The model.

        Raises:
            EditError: another model than the one that the edit was made for, or an edited one.
        """
        components = self._require_model(model)
        ablate_in_place(model, components, self.bias, self.value, self.means)
        return model

    def undo_(self, model: nn.Module) -> nn.Module:
        """Restore what `apply_` overwrote in this very model, bit for bit.

        Returns:
            The model.

        Raises:
            EditError: this edit is not applied to this model, or its edited weights have changed since.
        """
        restore_in_place(model, self._require_components(), self.bias, self.value)
        return model

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """`with edit.applied(model):` applies in place, and undoes at the end, also after an error."""
        self.apply_(model)
        try:
            yield model
        finally:
            self.undo_(model)

    def compose(self, other: Edit) -> Edit:
        """One edit that ablates the components of both, also written `edit + other`.

        The other's components come after this one's; one that is in both keeps this one's score.
        `provenance["parts"]` has names, scores and provenance of each.

        Raises:
            EditError: edits of different models, sets of components or ways of ablating.
        """
        return compose(self, other)

    def __add__(self, other: Edit) -> Edit:
        return compose(self, other) if isinstance(other, Edit) else NotImplemented

    def predicted(self, attributions: Attributions, columns: Columns) -> np.ndarray:
        """Change of outputs that the linear models expect of this edit; no model is run.

        Args:
            attributions: of the same model, ablated in the same way.
            columns: of the attributions, by position or name.

        Returns:
            float64 [columns], in output units: minus the sum of the components' weights.

        Raises:
            EditError: attributions of another model, other components or another way of ablating.
        """
        self._require_axis(attributions.components, "attributions")
        where = [attributions.components.positions[name] for name in self.names]
        chosen = positions_of(attributions.columns, columns, "columns")
        return -attributions.rows(chosen)[:, where].astype(np.float64).sum(axis=1)

    def effect(
        self,
        experiment: Experiment,
        columns: Columns,
        output: str,
        attributions: Attributions | None = None,
    ) -> Effect:
        """Outputs of some columns of the experiment before and after.

        Args:
            experiment: the one that the edit was made with.
            columns: of the experiment, by position or name.
            output: which one.
            attributions: of that output and these columns; they give the predicted outputs.

        Raises:
            EditError: an experiment with another model, other components or another way of ablating.
        """
        self._require_axis(experiment.components, "experiment")
        keep = np.ones((2, len(experiment.components)), dtype=bool)
        keep[1, [experiment.components.positions[name] for name in self.names]] = False
        axis = experiment.columns[require_output(output, list(experiment.columns))]
        chosen = positions_of(axis, columns, "columns")
        change = None if attributions is None else self._change(attributions, axis.subset(chosen), output)
        values = experiment.prepare(experiment.device)(keep)[output]
        for number, row in enumerate(values):
            require_storable(row, number, output, axis.names)
        before, after = values[:, chosen]
        return Effect(before, after, None if change is None else before + change)

    def _change(self, attributions: Attributions, axis: Axis, output: str) -> np.ndarray:
        if attributions.output != output:
            raise EditError(
                "the attributions are of another output", expected=output, got=attributions.output
            )
        return self.predicted(attributions, axis.locate(attributions.columns, "effect", "attributions"))

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; an equal one may be there already."""
        write_edit(
            Path(path),
            {
                "names": list(self.names),
                "components": [] if self.components is None else self.components.to_json(),
                "bias": self.bias,
                "value": self.value,
                "source": dict(self.source),
                "scores": plain_scores(self.scores),
                "provenance": dict(self.provenance),
            },
            self.means,
        )
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file written by `save`."""
        return cls(**read_edit(Path(path)))

    def _require_model(self, model: nn.Module) -> ComponentSet:
        """Components of this edit; `EditError` unless the model is the untouched one it was made for."""
        components = self._require_components()
        found = model_fingerprint(model)
        if found == self.source.get("model"):
            return components
        before = applied_to(model)
        if before is not None:
            raise EditError(
                "an edit is applied to this model already",
                expected="an untouched model",
                got=f"a model with {before.names} ablated",
                todo="undo_ that one first, or apply the sum of both edits",
            )
        raise EditError(
            "the edit was made for another model",
            expected=f"model {str(self.source.get('model'))[:12]}",
            got=f"model {found[:12]}",
            todo="make the edit from this model's own attributions",
        )

    def _require_axis(self, axis: Axis, what: str) -> None:
        """`EditError` unless an experiment's or attributions' components are those of this edit's source."""
        unlike = [key for key in self.source if key != "slices" and self.source[key] != axis.source.get(key)]
        missing = [name for name in self.names if name not in axis.positions]
        if unlike or missing:
            key = unlike[0] if unlike else "component"
            raise EditError(
                f"the edit was made for {'other' if what.endswith('s') else 'another'} {what}: {key} differs",
                expected=f"{key} {str(self.source[key])[:60] if unlike else missing[0]}",
                got=f"{key} {str(axis.source.get(key))[:60]}" if unlike else "no component of this name",
                todo=f"use the {what} that the edit was made with",
            )

    def _require_components(self) -> ComponentSet:
        if self.components is None:
            raise EditError(
                "this edit names components of an experiment that does not ablate a model",
                expected="an edit made with a ComponentAblation",
                got=", ".join(self.names[:3]),
            )
        return self.components


def listed(names: Sequence[str], most: int = 30) -> str:
    """Names in a line, which has an end; all of them are in `names`.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def compose(first: Edit, second: Edit) -> Edit:
    """See `Edit.compose`."""
    _require_alike(first, second)
    new = [i for i, name in enumerate(second.names) if name not in first.names]
    components = None
    if first.components is not None and second.components is not None:
        groups = (*first.components.groups, *(second.components.groups[i] for i in new))
        components = ComponentSet(groups, overlap=first.components.overlap or second.components.overlap)
    scored = len(first.scores) == len(first.names) and len(second.scores) == len(second.names)
    return replace(
        first,
        names=(*first.names, *(second.names[i] for i in new)),
        components=components,
        scores=(*first.scores, *(second.scores[i] for i in new)) if scored else (),
        provenance={"parts": [*_parts(first), *_parts(second)]},
        means=None if first.means is None else {**(second.means or {}), **first.means},
    )


def _parts(edit: Edit) -> list[dict[str, Any]]:
    """What an edit was composed of; itself if of nothing."""
    itself = {
        "names": list(edit.names),
        "scores": plain_scores(edit.scores),
        "provenance": dict(edit.provenance),
    }
    return list(edit.provenance.get("parts", [itself]))


def _require_alike(first: Edit, second: Edit) -> None:
    ours, theirs = (dict(e.source) | {"bias": e.bias, "value": str(e.value)} for e in (first, second))
    unlike = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if unlike:
        key = unlike[0]
        raise EditError(
            f"two edits of different things cannot be one: {key} differs",
            expected=f"{key} {str(ours.get(key))[:60]}",
            got=f"{key} {str(theirs.get(key))[:60]}",
            todo="make both from one experiment; sets of components are joined with +",
        )
