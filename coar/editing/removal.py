"""removed: an edited model without the filters and neurons that the edit ablates.

An ablated unit is a constant. Where every layer that reads it makes a constant of it in turn, that goes
into the reader's bias, and the unit's weights, its entry in a BatchNorm and the readers' columns
are cut: a smaller dense model with the same outputs. Where a unit cannot be cut it stays as
`Edit.apply` leaves it, and the report says why.

A convolution that pads with zeros does not make a constant of a constant: its border sees less of it.
There a unit goes if it is 0 after its activation. Of the others of that layer one stays and
stands for all, since constants differ only in size: the readers' weights for it take on theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from coar.component_group import ComponentGroup
from coar.editing.constants import plain_layer, read_sources, unit_dimension
from coar.editing.cutting import Cut, cut_units, plan_cut, restored_on_failure
from coar.editing.edit import Edit
from coar.editing.flows import Reader, Source, each_reader
from coar.errors import EditError
from coar.gates.layers import tensors_in

if TYPE_CHECKING:
    import pandas

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
State = Literal["removed", "zeroed"]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the largest output, if that is above 1
LOW_PRECISION = 2e-2  # of bfloat16 and float16
RANDOM_BATCHES = 2
_BROKEN = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)
_FIXED = "the forward pass counts on the layer's size"


@dataclass(frozen=True)
class Outcome:
    """What became of one component.

    Attributes:
        component: its name.
        state: "removed" where it is gone, "zeroed" where it stays ablated in place.
        reason: why.
    """

    component: str
    state: State
    reason: str


@dataclass(frozen=True)
class RemovedModel:
    """A smaller model with the outputs of the edited one.

    Attributes:
        model: the smaller model, in eval mode.
        outcomes: one per component of the edit, in its order.
        parameters_before: number of parameters of the model that was given.
        parameters_after: of the smaller one.
        difference: largest difference of outputs from those of `edit.apply(model)` that was seen.
    """

    model: nn.Module
    outcomes: tuple[Outcome, ...]
    parameters_before: int
    parameters_after: int
    difference: float

    def __repr__(self) -> str:
        gone = sum(outcome.state == "removed" for outcome in self.outcomes)
        sizes = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"RemovedModel({gone} of {len(self.outcomes)} components removed, {sizes})"

    @property
    def report(self) -> pandas.DataFrame:
        """A row per component of the edit: component, state, reason."""
        import pandas

        rows = [(o.component, o.state, o.reason) for o in self.outcomes]
        return pandas.DataFrame(rows, columns=["component", "state", "reason"])


def removed(model: nn.Module, edit: Edit, example_inputs: Inputs) -> RemovedModel:
    """Copy a model with an edit's filters and neurons removed rather than zeroed.

    Units of Linears, convolutions and transformers' Conv1Ds are removed, those named by what emits them
    as well as those named by the columns of what reads them (hidden units of an MLP). Outputs of the
    copy are compared with those of `edit.apply(model)` on the example and on random inputs.

    Args:
        model: in eval mode; left untouched.
        edit: made for this model.
        example_inputs: what the model is called with: a tensor, a list or tuple of positional arguments,
            or a dictionary of named ones. One forward pass on it says which layer reads which; a model
            whose passes differ (other branches, other lengths) needs an example that shows them.

    Raises:
        EditError: the edit is of another model, the model is not in eval mode, or the smaller model's
            outputs differ by more than 1e-5 (float64: 1e-10) of the largest output, or of 1.

    >>> import coar, numpy as np
    >>> from coar.fingerprints import model_fingerprint
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    >>> hidden = coar.find_components(model, kinds=["neuron"], include=["0"])
    >>> source = {"model": model_fingerprint(model)}
    >>> edit = Edit(("0[1]", "0[3]"), hidden.pick([1, 3]), "keep", "zero", source)
    >>> removed(model, edit, torch.ones(1, 2))
    RemovedModel(2 of 2 components removed, 17 -> 9 parameters)
    """
    _require_eval(model)
    ablated = edit.apply(model)
    groups = list(edit.components or ())
    smaller = copy.deepcopy(ablated)
    sources = read_sources(smaller, lambda: run_model(smaller, example_inputs))
    places = [_place_of(smaller, sources, group) for group in groups]
    cuts = _cut_all(_planned(places), smaller, ablated, example_inputs)
    difference = _require_equal(smaller, ablated, example_inputs)
    outcomes = tuple(_outcome(*pair, cuts) for pair in zip(groups, places, strict=True))
    return RemovedModel(smaller, outcomes, _parameters(model), _parameters(smaller), difference)


@dataclass(frozen=True, eq=False)
class _Place:
    """Units of one layer that make up a component, or why there are none."""

    source: Source | None
    units: tuple[int, ...] = ()
    reason: str = ""


def _place_of(model: nn.Module, sources: dict[nn.Module, Source], group: ComponentGroup) -> _Place:
    module = dict(model.named_modules(remove_duplicate=False))[group.module]
    if group.parameter != "weight" or not plain_layer(module):
        return _Place(None, reason=f"{group.kind}: no units of a plain Linear or convolution")
    dimension = unit_dimension(module)
    if group.side == "output" and group.dimension == dimension and group.blocks == 1:
        return _emitted(sources.get(module), group)
    if group.side == "input" and group.dimension == 1 - dimension:
        for source, reader in each_reader(sources):
            if reader.module is module:
                return _read(source, reader, group)
    return _Place(None, reason="no single layer emits it: heads, a LayerNorm or a residual sum are before it")


def _emitted(source: Source | None, group: ComponentGroup) -> _Place:
    if source is None:
        return _Place(None, reason="nothing calls its layer in the example's pass, or not by itself")
    return _Place(source, tuple(range(group.offset, group.stop)))


def _read(source: Source, reader: Reader, group: ComponentGroup) -> _Place:
    if group.offset % reader.width or group.stop % reader.width:
        return _Place(None, reason="it is a part of a unit")
    return _Place(source, tuple(range(group.offset // reader.width, group.stop // reader.width)))


def _planned(places: Sequence[_Place]) -> list[Cut]:
    wanted: dict[Source, set[int]] = {}
    for place in places:
        if place.source is not None:
            wanted.setdefault(place.source, set()).update(place.units)
    return [plan_cut(source, sorted(units)) for source, units in wanted.items()]


def _cut_all(cuts: Sequence[Cut], smaller: nn.Module, ablated: nn.Module, example: Inputs) -> list[Cut]:
    """Cut all that leaves a model that runs; the others stay, each with the reason."""
    shapes = [tensor.shape for tensor in run_model(ablated, example)]

    def runs(some: Sequence[Cut]) -> bool:
        try:
            with restored_on_failure(some):
                for cut in some:
                    cut_units(cut)
                if [tensor.shape for tensor in run_model(smaller, example)] != shapes:
                    raise ValueError
        except _BROKEN:
            return False
        return True

    real = [cut for cut in cuts if cut.units]
    idle = [cut for cut in cuts if not cut.units]
    if runs(real):
        return list(cuts)
    return [*idle, *(cut if runs([cut]) else _given_up(cut) for cut in real)]


def _given_up(cut: Cut) -> Cut:
    return Cut(cut.source, (), None, cut.reasons | dict.fromkeys(cut.units, _FIXED))


def _outcome(group: ComponentGroup, place: _Place, cuts: Sequence[Cut]) -> Outcome:
    name = group.component_name(0) if group.count > 1 else group.name
    if place.source is None:
        return Outcome(name, "zeroed", place.reason)
    cut = next(cut for cut in cuts if cut.source is place.source)
    staying = [unit for unit in place.units if unit not in cut.units]
    deciding = (staying or place.units)[0]
    return Outcome(name, "zeroed" if staying else "removed", cut.reasons[deciding])


def run_model(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that a model returns."""
    with torch.no_grad():
        if isinstance(inputs, Tensor):
            return tensors_in(model(inputs))
        if isinstance(inputs, Mapping):
            return tensors_in(model(**inputs))
        return tensors_in(model(*inputs))


def _require_eval(model: nn.Module) -> None:
    training = [name or "(model)" for name, module in model.named_modules() if module.training]
    if training:
        raise EditError(
            "units are removed from a model in eval mode",
            expected="no module in training mode: dropout and BatchNorm are constant only then",
            got=", ".join(training[:3]),
            todo="model.eval()",
        )


def _require_equal(smaller: nn.Module, ablated: nn.Module, example: Inputs) -> float:
    """Largest difference on the example and on random inputs; an error where it is too large."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for inputs in (example, *(_random_like(example, generator) for _ in range(RANDOM_BATCHES))):
        wanted = run_model(ablated, inputs)
        try:
            found = run_model(smaller, inputs)
        except _BROKEN as error:
            raise _unequal(f"{type(error).__name__}: {error}"[:200]) from error
        if len(found) != len(wanted):
            raise _unequal(f"{len(found)} tensors in place of {len(wanted)}")
        for pair in zip(found, wanted, strict=True):
            difference, allowed = _difference(*pair)
            worst = max(worst, difference)
            if not difference <= allowed:
                raise _unequal(f"a difference of {difference:.1e}", allowed)
    return worst


def _difference(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    if found.shape != wanted.shape:
        return float("inf"), 0.0
    allowed = TOLERANCES.get(wanted.dtype, LOW_PRECISION)
    if not wanted.numel():
        return 0.0, allowed
    found, wanted = found.double(), wanted.double()
    equal = (found == wanted) | (found.isnan() & wanted.isnan())
    gap = torch.where(equal, 0.0, found - wanted).abs().max()
    finite = wanted[wanted.isfinite()].abs()
    return float(gap), allowed * max(1.0, float(finite.max()) if len(finite) else 0.0)


def _unequal(got: str, allowed: float = 0.0) -> EditError:
    return EditError(
        "the model with units removed does not do what the ablated one does",
        expected=f"equal outputs, up to {allowed:.1e}" if allowed else "equal outputs",
        got=got,
        todo="use edit.apply(model): the forward pass does more with the units than one example shows",
    )


def _random_like(value: Any, generator: torch.Generator) -> Any:
    """Inputs of the same form: random numbers of the same mean and spread, whole numbers in another order."""
    if isinstance(value, Mapping):
        return {key: _random_like(entry, generator) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_random_like(entry, generator) for entry in value]
    if not isinstance(value, Tensor) or value.dtype == torch.bool or not value.numel():
        return value
    if not value.is_floating_point():
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.flatten()[order].view(value.shape)
    spread = float(value.std()) if value.numel() > 1 else 0.0
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return noise * (spread or 1.0) + value.mean()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
