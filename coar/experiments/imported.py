"""ImportedRows: stands in a study for an experiment that was run elsewhere. It knows its axes, no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from coar.axes import Axis
from coar.errors import StudyError


class ImportedRows:
    """An experiment whose rows came from elsewhere, and that cannot be run here.

    Args:
        store: digest of what was imported.
        components: axis of the masks as plain JSON, or their number: then their names are 0, 1, ...
        columns: the same for each output.

    >>> ImportedRows("5d2c", 3, {"margins": 2}).components.names
    ('0', '1', '2')
    """

    def __init__(
        self, store: str, components: int | dict[str, Any], columns: Mapping[str, int | dict[str, Any]]
    ) -> None:
        self.store = store
        self.components = _axis("components", components, store)
        self.columns = {name: _axis("columns", value, store) for name, value in columns.items()}
        self.accuracy_outputs: frozenset[str] = frozenset()
        self.device = torch.device("cpu")

    @classmethod
    def of_axes(cls, store: str, components: Axis, columns: Mapping[str, Axis]) -> ImportedRows:
        """From axes rather than JSON; numbered ones are written down as their length."""
        return cls(store, _json(components, store), {name: _json(a, store) for name, a in columns.items()})

    def fingerprint(self) -> dict[str, str]:
        """Digest of what was imported."""
        return {"store": self.store}

    def to_spec(self) -> dict[str, Any]:
        """Import string and arguments."""
        columns = {name: _json(axis, self.store) for name, axis in self.columns.items()}
        args = {"store": self.store, "components": _json(self.components, self.store), "columns": columns}
        return {"name": f"{__name__}:{type(self).__qualname__}", "args": args}

    def prepare(
        self, device: torch.device, batch_size: int | None = None, precision: str = "float32"
    ) -> NoReturn:
        """Refused: the model is not known.

        Raises:
            StudyError: always.
        """
        del device, batch_size, precision
        raise StudyError(
            "the rows of this study were imported: there is no model here to run",
            expected="an experiment with a model, such as coar.ComponentAblation(task, components)",
            got="rows without one",
            todo="fit and read attributions as usual; to evaluate or edit, pass the experiment of the model "
            "to coar.evaluate or coar.Edit (import with its axes: components=experiment.components); where a "
            "shard is lost, import again",
        )


def numbered(kind: str, count: int, store: str) -> Axis:
    """Axis of things without names: 0, 1, ..."""
    return Axis(kind, [str(i) for i in range(count)], {"store": store})


def _axis(kind: str, value: int | dict[str, Any], store: str) -> Axis:
    if isinstance(value, dict):
        return Axis.from_json(value, f"{kind} of an imported study")
    return numbered(kind, value, store)


def _json(axis: Axis, store: str) -> int | dict[str, Any]:
    plain = axis == numbered(axis.kind, len(axis), store) and not axis.fields
    return len(axis) if plain else axis.to_json()
