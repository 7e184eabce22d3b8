"""Edit: named components to ablate in one model, and what that does."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from coar.axes import Axis
from coar.components import ComponentSet
from coar.errors import EditError, StoreError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.files import read_json, require_format, require_keys, write_json_once
from coar.fingerprints import model_fingerprint
from coar.gates import Bias, Means, Value, ablated_copy, pick_means
from coar.rows import require_output
from coar.work import require_storable

FORMAT = 1
Columns = Sequence[int | str] | np.ndarray
_KEYS: dict[str, type | tuple[type, ...]] = {
    "names": list,
    "components": list,
    "bias": str,
    "value": (str, int, float),
    "source": dict,
    "scores": list,
    "provenance": dict,
}


@dataclass(frozen=True, repr=False)
class Effect:
    """Outputs of some columns before and after an edit, float32 [columns]."""

    before: np.ndarray
    after: np.ndarray

    def __repr__(self) -> str:
        change = f"{self.before.mean():+.2f} -> {self.after.mean():+.2f}"
        return f"Effect(mean {change} over {len(self.before)} columns)"

    @property
    def accuracy_before(self) -> float:
        """Share of positive outputs (margins: of right predictions) before."""
        return float((self.before > 0).mean())

    @property
    def accuracy_after(self) -> float:
        """Share of positive outputs after."""
        return float((self.after > 0).mean())


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
        return f"Edit(ablates {len(self.names)}: {', '.join(self.names)})"

    def apply(self, model: nn.Module) -> nn.Module:
        """Copy a model with the components ablated for good; the model itself is untouched.

        Raises:
            EditError: another model than the one that the edit was made for.
        """
        components = self._require_components()
        found = model_fingerprint(model)
        if found != self.source.get("model"):
            raise EditError(
                "the edit was made for another model",
                expected=f"model {str(self.source.get('model'))[:12]}",
                got=f"model {found[:12]}",
                todo="make the edit from this model's own attributions",
            )
        keep = np.zeros(len(components), dtype=bool)
        return ablated_copy(model, components, keep, self.bias, self.value, self.means)

    def effect(self, experiment: Experiment, columns: Columns, output: str) -> Effect:
        """Outputs of some columns of the experiment before and after.

        Raises:
            EditError: an experiment with another model, other components or another way of ablating.
        """
        self._require_experiment(experiment)
        keep = np.ones((2, len(experiment.components)), dtype=bool)
        keep[1, [experiment.components.positions[name] for name in self.names]] = False
        axis = experiment.columns[require_output(output, list(experiment.columns))]
        chosen = positions_of(axis, columns, "columns")
        values = experiment.prepare(experiment.device)(keep)[output]
        for number, row in enumerate(values):
            require_storable(row, number, output, axis.names)
        return Effect(*values[:, chosen])

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; an equal one may be there already."""
        value = {
            "format": FORMAT,
            "names": list(self.names),
            "components": [] if self.components is None else self.components.to_json(),
            "bias": self.bias,
            "value": self.value,
            "source": dict(self.source),
            "scores": [score if np.isfinite(score) else str(score) for score in self.scores],
            "provenance": dict(self.provenance),
        }
        if self.means is not None:
            value["means"] = {name: entries.tolist() for name, entries in self.means.items()}
        write_json_once(Path(path), value)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file written by `save`."""
        value = require_keys(read_json(Path(path), "saved edit"), {"format": int}, Path(path))
        require_format(value["format"], FORMAT, path)
        require_keys(value, _KEYS, Path(path))
        components = ComponentSet.from_json(value["components"], str(path)) if value["components"] else None
        found = tuple(group.name for group in components) if components else tuple(value["names"])
        if found != tuple(value["names"]):
            raise StoreError(f"{path} is damaged: names and components differ", got=value["names"])
        try:
            scores = tuple(float(score) for score in value["scores"])
        except (TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged: scores are not numbers", got=str(error)[:200]) from None
        means = {name: np.array(entries) for name, entries in value.get("means", {}).items()} or None
        convention = value["bias"], value["value"]
        return cls(found, components, *convention, value["source"], scores, value["provenance"], means)

    def _require_experiment(self, experiment: Experiment) -> None:
        found = experiment.components.source
        unlike = [key for key in self.source if key != "slices" and self.source[key] != found.get(key)]
        missing = [name for name in self.names if name not in experiment.components.positions]
        if unlike or missing:
            key = unlike[0] if unlike else "component"
            raise EditError(
                f"the edit was made for another experiment: {key} differs",
                expected=f"{key} {str(self.source[key])[:60] if unlike else missing[0]}",
                got=f"{key} {str(found.get(key))[:60]}" if unlike else "no component of this name",
                todo="use the experiment that the edit was made with",
            )

    def _require_components(self) -> ComponentSet:
        if self.components is None:
            raise EditError(
                "this edit names components of an experiment that does not ablate a model",
                expected="an edit made with a ComponentAblation",
                got=", ".join(self.names[:3]),
            )
        return self.components


def positions_of(axis: Axis, columns: Columns, what: str) -> np.ndarray:
    """Positions, int64, of columns given by position or name; each once, at least one."""
    if isinstance(columns, str | int):  # a text would be read letter by letter
        raise EditError(f"{what} are a list", expected=f"[{columns!r}]", got=repr(columns))
    found = [_position(axis, column) for column in columns]
    bad = [c for c, position in zip(columns, found, strict=True) if not 0 <= position < len(axis)]
    if bad or not found or len(set(found)) != len(found):
        known = f"0 .. {len(axis) - 1}, or names such as {axis.names[0]!r}"
        got = f"unknown: {bad[0]!r}" if bad else "none" if not found else "one of them twice"
        raise EditError(
            f"{what} are not columns of the attributions", expected=f"one or more of {known}", got=got
        )
    return np.array(found, dtype=np.int64)


def _position(axis: Axis, column: Any) -> int:
    if isinstance(column, str):
        return axis.positions.get(column, -1)
    try:
        return operator.index(column)
    except TypeError:  # 1.9 is no column
        return -1
