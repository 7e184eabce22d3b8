"""Pending: what a layer has emitted and no gate has acted on yet."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coar.gates.sites import Site


@dataclass
class Pending:
    """What is known of a tensor whose gates come later.

    Attributes:
        site: whose gates are to come.
        channels: dimension of the units, from the end.
        span: first unit of the layer that is in the tensor, and one after the last.
        size: how many units the layer emits.
        rest: what the tensor is at gates of 0; as many dimensions, broadcasts against it.
        through: names of the functions, not affine, that both ends have gone through.
        reads: how many functions have read it.
        became: what is to be read in its place, once a gate has acted or something was written to it.
    """

    site: Site
    channels: int
    span: tuple[int, int]
    size: int
    rest: Tensor
    through: tuple[str, ...] = ()
    reads: int = 0
    became: Tensor | None = None

    def has_gates_of(self, other: Pending) -> bool:
        """Whether the same gates belong to both, at the same places."""
        return (
            self.site is other.site
            and self.span == other.span
            and self.channels == other.channels
            and self.rest.ndim == other.rest.ndim
        )

    def followed(self, rest: Tensor, through: tuple[str, ...]) -> Pending:
        """The same after a function: of both ends, and of all the units."""
        return Pending(self.site, self.channels, self.span, self.size, rest, through)

    def part(self, start: int, length: int) -> Pending:
        """The same for some of the units, counted from the first that is in the tensor."""
        first = self.span[0] + start
        rest = self.rest.narrow(self.channels, start, length)
        return Pending(self.site, self.channels, (first, first + length), self.size, rest, self.through)


class Register:
    """Which tensors are pending, as long as they are alive.

    Keyed by the object. Only while torch.compile traces are tensors held: there they cost nothing, and
    no weak reference can be made of them.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Pending]] = {}
        self._traced: dict[Tensor, Pending] = {}

    def __len__(self) -> int:
        return len(self._entries) + len(self._traced)

    def put(self, tensor: Tensor, state: Pending) -> None:
        """Say what is known of a tensor."""
        if torch.compiler.is_compiling():
            self._traced[tensor] = state
        else:
            key, entries = id(tensor), self._entries
            entries[key] = weakref.ref(tensor, lambda _: entries.pop(key, None)), state

    def get(self, tensor: Tensor) -> Pending | None:
        """What is known of a tensor, None for most."""
        if torch.compiler.is_compiling():
            return self._traced.get(tensor)
        entry = self._entries.get(id(tensor))
        return None if entry is None else entry[1]

    def pending(self, tensor: Tensor) -> Pending | None:
        """The same, None also for a tensor that has become another."""
        state = self.get(tensor)
        return state if state is not None and state.became is None else None

    def latest(self, tensor: Tensor) -> Tensor:
        """What a tensor has become."""
        state = self.get(tensor)
        while state is not None and state.became is not None:
            tensor = state.became
            state = self.get(tensor)
        return tensor

    def alive(self) -> Iterator[Pending]:
        """What is known of tensors that somebody still holds."""
        return (state for reference, state in list(self._entries.values()) if reference() is not None)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self._traced.clear()
