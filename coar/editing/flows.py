"""Flow: what a layer emits, for as long as its units can be told apart, and where its units lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

RESHAPING = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}
REPEATING = {"reflect", "replicate", "circular"}  # paddings that leave a constant image constant


@dataclass(eq=False)
class Source:
    """A layer, or layers whose units are multiplied one by one, and all that reads these units.

    Attributes:
        modules: Linears, convolutions or Conv1Ds of transformers.
        readers: layers that read its units.
        norms: BatchNorms in between.
        blocked: why units cannot be cut out of it; "" where they can.
    """

    modules: list[nn.Module]
    readers: list[Reader] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    blocked: str = ""

    def block(self, reason: str) -> None:
        """Keep the first reason."""
        self.blocked = self.blocked or reason

    def take_over(self, other: Source) -> None:
        """Become both: their units go together."""
        self.modules += other.modules
        self.readers += other.readers
        self.norms += other.norms
        self.block(other.blocked)


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads all units of another.

    Attributes:
        module: it.
        width: how many of its inputs belong to one unit (pixels of a flattened image); they are neighbours.
        values: what each unit is there, where that is known [units].
        known: which units are constant there: bool [units].
        padded: zeros stand beside the units, so that a constant is none at the border.
    """

    module: nn.Module
    width: int
    values: Tensor
    known: Tensor
    padded: bool


@dataclass(frozen=True, eq=False)
class Flow:
    """Where the units of a layer lie in a tensor.

    Attributes:
        source: the layer.
        channels: dimension of the units, from the front.
        width: how many neighbours along it belong to one unit.
        values: what each unit is here, where that is known [units].
        known: which units are constant here: bool [units].
    """

    source: Source
    channels: int
    width: int
    values: Tensor
    known: Tensor


def each_reader(sources: dict[nn.Module, Source]) -> Iterator[tuple[Source, Reader]]:
    """Every layer that reads another, with the one that it reads."""
    for source in sources.values():
        for reader in source.readers:
            yield source, reader


def pads_zeros(padding: Any) -> bool:
    """Whether a convolution with this argument reads zeros beside its input; "same" counts as padded."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def moved(
    flow: Flow, name: str, x: Tensor, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Flow | None:
    """The flow of a function that puts entries elsewhere or pools them, or None."""
    if name in RESHAPING and result.dtype == x.dtype:
        return _reshaped(flow, x, result)
    if flow.width > 1:
        return None
    if name in ("mean", "amax"):
        return _reduced(flow, x, result, args, kwargs)
    constant = _pools_constants(name, args, kwargs) and flow.channels == x.ndim - 1 - int(name[-2])
    repeated = name == "pad" and (kwargs.get("mode") or (args[2] if len(args) > 2 else "")) in REPEATING
    sides = kwargs.get("pad", args[1] if len(args) > 1 else ()) if repeated else ()
    constant = constant or (repeated and flow.channels < x.ndim - len(sides) // 2)
    return flow if constant else None


def _reshaped(flow: Flow, x: Tensor, result: Tensor) -> Flow | None:
    """Units where their entries lie after a change of dimensions, in the order of the numbers."""
    inner = prod(x.shape[flow.channels + 1 :])
    for dim, size in enumerate(result.shape):
        rest = prod(result.shape[dim + 1 :])
        if rest and inner % rest == 0 and size == x.shape[flow.channels] * (inner // rest):
            return Flow(flow.source, dim, flow.width * (inner // rest), flow.values, flow.known)
    return None


def _reduced(
    flow: Flow, x: Tensor, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Flow | None:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    given = [dims] if isinstance(dims, int) else list(dims or [])
    reduced = {dim % x.ndim for dim in given}
    if not reduced or flow.channels in reduced or kwargs.get("dtype") is not None:
        return None
    gone = 0 if result.ndim == x.ndim else sum(dim < flow.channels for dim in reduced)
    return Flow(flow.source, flow.channels - gone, flow.width, flow.values, flow.known)


def _pools_constants(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a pooling of a constant image is that constant, at the border as well."""
    if name.removeprefix("_").startswith(("max_pool", "adaptive_avg_pool", "adaptive_max_pool")):
        return name[-1] == "d"
    defaults = (0, False, True, None)  # padding, ceil_mode, count_include_pad, divisor_override
    given = dict(zip(("padding", "ceil_mode", "count", "divisor_override"), args[3:], strict=False)) | kwargs
    plain = not pads_zeros(given.get("padding", defaults[0])) and not given.get("ceil_mode")
    return name.startswith("avg_pool") and plain and given.get("divisor_override") is None
