"""Cut units out of a layer, out of the BatchNorms behind it and out of the layers that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coar.editing.constants import emitted_constants, unit_dimension
from coar.editing.flows import Reader, Source
from coar.kinds.layers import is_conv1d

# Where layers say how large they are; Conv1D of transformers computes with `nf`.
_EMITTED = ("out_features", "out_channels", "nf", "num_features")
_READ = ("in_features", "in_channels", "nx")
SIZES = (*_EMITTED, *_READ)
_MOVED = "its constant is in the layers that read it"
_CHANGING = "it is no constant where it is read"


_BORDER = "zero padding: its constant is none at the border"


@dataclass(frozen=True, eq=False)
class Cut:
    """Units of one layer that go.

    Attributes:
        source: the layer (or two whose units are multiplied one by one).
        units: numbers of the units that go, ascending.
        carrier: a unit that stays and takes on what others are beside a padded border, or None.
        reasons: why a unit goes or stays, by its number.
    """

    source: Source
    units: tuple[int, ...]
    carrier: int | None
    reasons: dict[int, str]


def plan_cut(source: Source, wanted: Sequence[int]) -> Cut:
    """Which of the wanted units of a layer can go without a change of what its readers emit."""
    if source.blocked:
        return Cut(source, (), None, dict.fromkeys(wanted, source.blocked))
    reasons = {unit: _reason(source.readers, unit) for unit in wanted}
    gone = [unit for unit in wanted if reasons[unit] == _MOVED]
    beside = [unit for unit in wanted if reasons[unit] == _BORDER]
    carrier = _carrier(source.readers, beside)
    if carrier is not None:
        others = [unit for unit in beside if unit != carrier]
        reasons |= dict.fromkeys(others, f"unit {carrier} of its layer stands for it as well")
        gone += others
    if len(gone) == len(emitted_constants(source.modules[0])):
        reasons[gone.pop()] = "a layer has at least one unit"
    return Cut(source, tuple(sorted(gone)), carrier, reasons)


def _reason(readers: Sequence[Reader], unit: int) -> str:
    """What becomes of a unit as far as all readers go: the worst of them decides."""
    found = {_need(reader, unit) for reader in readers}
    return next((reason for reason in (_CHANGING, _BORDER) if reason in found), _MOVED)


def _need(reader: Reader, unit: int) -> str:
    if not _columns(reader, [unit]).any():
        return _MOVED
    if not bool(reader.known[unit]) or not bool(reader.values[unit].isfinite()):
        return _CHANGING
    return _BORDER if reader.padded and bool(reader.values[unit]) else _MOVED


def _carrier(readers: Sequence[Reader], units: Sequence[int]) -> int | None:
    """The one of several constant units that can stand for all of them where zeros are padded."""
    if len(units) < 2:
        return None
    padded = [reader.values.abs() for reader in readers if reader.padded]
    sizes = {unit: min(float(values[unit]) for values in padded) for unit in units}
    best = max(units, key=lambda unit: sizes[unit])
    return best if sizes[best] > 0 else None


def _entries(reader: Reader, units: Sequence[int]) -> list[int]:
    return [unit * reader.width + i for unit in units for i in range(reader.width)]


def _columns(reader: Reader, units: Sequence[int]) -> Tensor:
    """What a reader's weights make of its inputs of some units: [units of the reader, entries]."""
    weight = reader.module._parameters["weight"]
    assert weight is not None
    index = torch.tensor(_entries(reader, units), device=weight.device)
    columns = weight.detach().index_select(1 - unit_dimension(reader.module), index)
    return columns.T if is_conv1d(reader.module) else columns


def cut_units(cut: Cut) -> None:
    """Cut units for good; constants go into the readers' biases, or to the carrier."""
    source = cut.source
    for reader in source.readers:
        _hand_on(reader, cut)
    keep = _complement(cut.units, len(emitted_constants(source.modules[0])))
    for module in source.modules:
        _shorten(module, "weight", unit_dimension(module), keep, _EMITTED)
        _shorten(module, "bias", 0, keep, _EMITTED)
    for norm in dict.fromkeys(source.norms):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _shorten(norm, name, 0, keep, _EMITTED)
    for reader in source.readers:
        entries = _entries(reader, keep)
        _shorten(reader.module, "weight", 1 - unit_dimension(reader.module), entries, _READ)


def _complement(units: Sequence[int], count: int) -> list[int]:
    gone = set(units)
    return [unit for unit in range(count) if unit not in gone]


def _hand_on(reader: Reader, cut: Cut) -> None:
    """Give what a reader makes of the constants of units that go to its bias, or to the carrier."""
    columns = _columns(reader, cut.units).double()
    live = columns.movedim(1, 0).flatten(1).any(dim=1)
    values = reader.values.double()[list(cut.units)].repeat_interleave(reader.width)
    values = torch.where(live, values, 0.0)  # one that nobody reads may be anything
    if not values.any():
        return
    if reader.padded:
        assert cut.carrier is not None  # plan_cut has one for what a border sees
        share = values / float(reader.values[cut.carrier])
        _add_column(reader.module, cut.carrier, torch.tensordot(columns, share, dims=([1], [0])))
    else:
        added = torch.tensordot(columns, values, dims=([1], [0]))
        _add_bias(reader.module, added.flatten(1).sum(dim=1) if added.ndim > 1 else added)


def _add_column(module: nn.Module, unit: int, added: Tensor) -> None:
    weight = module._parameters["weight"]
    assert weight is not None
    new = weight.detach().clone()
    new[:, unit] += added.to(new.dtype)  # only convolutions are padded
    module._parameters["weight"] = nn.Parameter(new, requires_grad=weight.requires_grad)


def _add_bias(module: nn.Module, added: Tensor) -> None:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    flag = weight.requires_grad if bias is None else bias.requires_grad
    total = added if bias is None else bias.detach().double() + added
    module._parameters["bias"] = nn.Parameter(total.to(weight.dtype), requires_grad=flag)


def _shorten(
    module: nn.Module, name: str, dimension: int, keep: Sequence[int], sizes: tuple[str, ...]
) -> None:
    home: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    old = home.get(name)
    if old is None:
        return
    new = old.detach().index_select(dimension, torch.tensor(list(keep), device=old.device))
    home[name] = nn.Parameter(new, requires_grad=old.requires_grad) if home is module._parameters else new
    for attribute in sizes:
        if attribute in vars(module):
            setattr(module, attribute, len(keep))


@contextmanager
def restored_on_failure(cuts: Sequence[Cut]) -> Iterator[None]:
    """Put all layers back as they were if the block raises."""
    touched = [m for cut in cuts for m in (*cut.source.modules, *cut.source.norms)]
    touched += [reader.module for cut in cuts for reader in cut.source.readers]
    before = [(m, dict(m._parameters), dict(m._buffers), _sizes(m)) for m in touched]
    try:
        yield
    except BaseException:
        for module, parameters, buffers, sizes in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            vars(module).update(sizes)
        raise


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in SIZES if name in vars(module)}
