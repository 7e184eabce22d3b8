"""Edits in place: ablate components of the very model, and put every bit back.

What an edit overwrites is kept beside the model for as long as the model lives; one edit at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from coar.component_group import ComponentGroup
from coar.components import ComponentSet
from coar.errors import EditError
from coar.fingerprints import digest_value
from coar.gates import Bias, Means, ScaledWeights, Value


class Place(NamedTuple):
    """Entries of a parameter along a dimension; all of it where the dimension is None."""

    module: str
    parameter: str
    dimension: int | None = None
    start: int = 0
    length: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """View of the entries."""
        tensor = tensor.detach()
        return tensor if self.dimension is None else tensor.narrow(self.dimension, self.start, self.length)


@dataclass(frozen=True)
class Applied:
    """An edit that is in a model.

    Attributes:
        components: that are ablated.
        convention: bias and value of the ablation.
        kept: what was there before; None for a bias that was not there at all.
        digests: of the parameters as the edit left them.
    """

    components: ComponentSet
    convention: tuple[Bias, Value]
    kept: dict[Place, Tensor | None]
    digests: dict[Place, str]

    @property
    def names(self) -> str:
        """Of the components."""
        return ", ".join(group.name for group in self.components)


_APPLIED: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()


def applied_to(model: nn.Module) -> Applied | None:
    """The edit that is in a model, if one is."""
    return _APPLIED.get(model)


def ablate_in_place(
    model: nn.Module, components: ComponentSet, bias: Bias, value: Value, means: Means | None
) -> None:
    """Ablate components and keep what was there; parameters stay the same objects.

    Args:
        model: whose weights are overwritten.
        components: to ablate, all of them.
        bias: see `coar.gates.convention`.
        value: likewise.
        means: likewise.
    """
    kept = {place: _read(model, place) for group in components for place in _places(model, group)}
    try:
        ScaledWeights(model, components, bias, value, means).set(np.zeros(len(components), dtype=bool))
    except BaseException:
        _put_back(model, kept)
        raise
    _APPLIED[model] = Applied(components, (bias, value), kept, _digests(model, kept))


def restore_in_place(model: nn.Module, components: ComponentSet, bias: Bias, value: Value) -> None:
    """Put back, bit for bit, what `ablate_in_place` with the same arguments overwrote.

    Raises:
        EditError: no edit or another one is in this model, or its edited weights have changed since.
    """
    applied = _APPLIED.get(model)
    if applied is None or (applied.components, applied.convention) != (components, (bias, value)):
        raise EditError(
            "this edit is not applied to this model",
            expected="the model that apply_ was called with",
            got="a model without an edit" if applied is None else f"a model with {applied.names} ablated",
            todo=None if applied is None else "undo the edit that is applied",
        )
    changed = [
        place for place, digest in _digests(model, applied.kept).items() if digest != applied.digests[place]
    ]
    if changed:
        raise EditError(
            "the edited weights have changed since the edit was applied; nothing was restored",
            expected="the weights as the edit left them",
            got=f"{changed[0].module}.{changed[0].parameter} differs",
            todo="load the model again",
        )
    _put_back(model, applied.kept)
    del _APPLIED[model]


def _places(model: nn.Module, group: ComponentGroup) -> list[Place]:
    """Where ablating a group may write: its slice of the weight, and the layer's bias."""
    if group.blocks == 1:
        cut = (group.dimension, group.offset, group.count * group.width)
        weight = Place(group.module, group.parameter, *cut)
    else:  # columns of their own block of rows only: no one slice
        weight = Place(group.module, group.parameter)
    names = {group.bias, group.parameter.replace("weight", "bias")} - {None, group.parameter}
    biases = sorted(str(name) for name in names)
    there = model.get_submodule(group.module)._parameters
    return [weight, *(Place(group.module, name) for name in biases if name in there)]


def _read(model: nn.Module, place: Place) -> Tensor | None:
    found = model.get_submodule(place.module)._parameters[place.parameter]
    return None if found is None else place.of(found).clone()


def _put_back(model: nn.Module, kept: dict[Place, Tensor | None]) -> None:
    for place, values in kept.items():
        parameters = model.get_submodule(place.module)._parameters
        found = parameters[place.parameter]
        if values is None:  # a layer that had no bias
            parameters[place.parameter] = None
        elif found is not None:
            with torch.no_grad():
                place.of(found).copy_(values)


def _digests(model: nn.Module, kept: dict[Place, Tensor | None]) -> dict[Place, str]:
    """Of the entries that an edit wrote; the rest of the model may be trained meanwhile."""
    return {place: digest_value(_read(model, place)) for place in kept}
