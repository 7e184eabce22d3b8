"""Placing: one forward pass under gates of which some act later than at their layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coar.errors import ComponentError
from coar.gates.activations import GatedActivations, Gating
from coar.gates.elementwise import (
    ACTIVATIONS,
    Step,
    among,
    keeps_rows,
    keeps_units,
    parted_along,
    passable,
    step_of,
)
from coar.gates.layers import ASKING, Layer, call, tensors_in
from coar.gates.pending import Pending, Register
from coar.gates.placed_gate import gate_between
from coar.gates.sites import Site

LEAVES = "plain: it leaves the forward pass"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Findings:
    """Where gates acted in one pass or several.

    Attributes:
        failed: id of the site whose gates could not act.
    """

    def __init__(self) -> None:
        self.failed: int | None = None
        self._labels: dict[int, set[str]] = {}

    def note(self, site: Site, label: str) -> None:
        """Say that gates of a site acted somewhere."""
        self._labels.setdefault(id(site), set()).add(label)

    def label(self, site: Site, otherwise: str) -> str:
        """All that was noted of a site; what starts with "after" comes first."""
        labels = self._labels.get(id(site), {otherwise})
        return LEAVES if LEAVES in labels else "; ".join(sorted(labels))


class Placing(Gating):
    """The gates of one forward pass; see `coar.gates.placement`.

    Args:
        gated: whose gates.
        gates: [components] or [batch, components].
        deferred: ids of the sites whose gates may act later.
        findings: notes where they did, where somebody wants to know.
    """

    def __init__(
        self,
        gated: GatedActivations,
        gates: Tensor,
        deferred: frozenset[int],
        findings: Findings | None = None,
    ) -> None:
        super().__init__(gated, gates)
        self._deferred, self._findings = deferred, findings
        self._register = Register()
        self._depth = 0

    def __enter__(self) -> Any:
        """Gates on; may be nested in itself."""
        self._depth += 1
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Gates off; whoever reads what is still pending after that reads it ungated."""
        self._depth -= 1
        super().__exit__(kind, error, trace)
        if self._depth == 0:
            left = list(self._register.alive())
            self._register.clear()
            if kind is None:
                self._require_read(left)

    def _require_read(self, left: list[Pending]) -> None:
        for state in left:
            if self._findings is not None:
                if not torch.is_grad_enabled():  # else the graph keeps what it needs
                    self._findings.note(state.site, LEAVES)
            elif state.became is None and not state.reads:
                group = state.site.gates[0].group
                raise ComponentError(
                    f"what {group.module} emits leaves the forward pass before its gates have acted",
                    expected="the functions that were seen when the gates were placed",
                    got="a forward pass that takes another way",
                    todo="settle on batches for which the model takes all its ways, or use plain gates",
                )

    # ------------------------------------------------------------------------------------------- layers

    def run_layer(self, func: Callable[..., Any], layer: Layer, site: Site, arguments: Any) -> Tensor:
        """Run one call of a site's layer; what it emits may stay pending."""
        if id(site) not in self._deferred:
            return super().run_layer(func, layer, site, arguments)
        channels = layer.channels(arguments[layer.input])
        arguments[layer.input] = self.on_input(site, arguments[layer.input], channels)
        y = call(func, arguments)
        rest = self._whole_rest(site, y, channels, arguments.get(layer.bias))
        size = y.shape[channels]
        self._register.put(y, Pending(site, channels, (0, size), size, rest))
        return y

    def _whole_rest(self, site: Site, y: Tensor, channels: int, bias: Tensor | None) -> Tensor:
        """Rest of all units that a layer emits, 0 where none is gated, in a shape that broadcasts."""
        size, parts, at = y.shape[channels], [], 0
        for entry in site.outputs:
            parts += [y.new_zeros(entry.entries.start - at), self._rest(entry, size, bias).detach()]
            at = entry.entries.stop
        parts.append(y.new_zeros(size - at))
        shape = [1] * y.ndim
        shape[channels] = size
        return torch.cat(parts).to(y.dtype).view(shape)

    # ---------------------------------------------------------------------------------------- functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if not len(self._register) or not self._concerned(args, kwargs):
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in ASKING:
            result = func(*args, **kwargs)
            if not tensors_in(result):
                return result
        args, kwargs = _mapped((args, kwargs), self._register.latest)
        result = self._through(func, args, kwargs)
        if result is not None:
            return result
        args, kwargs = _mapped((args, kwargs), lambda tensor: self._gated_now(tensor, f"read by {name}"))
        return super().__torch_function__(func, types, args, kwargs)

    def _concerned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(self._register.get(tensor) is not None for tensor in tensors_in((args, kwargs)))

    def _through(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result, pending itself; None if the gates have to act before the function."""
        given = tensors_in((args, kwargs))
        found = [tensor for tensor in given if self._register.pending(tensor) is not None]
        if not found or any(self._is_known(tensor) for tensor in given):
            return None
        if self._with_gradients and not torch.is_grad_enabled():
            return None  # the lower end would lose its gradients, and nobody would notice
        step = step_of(func, args, kwargs)
        if step is not None:
            return self._stepped(step, found)
        return self._rearranged(func, args, kwargs, found[0]) if len(given) == 1 else None

    def _stepped(self, step: Step, found: list[Tensor]) -> Tensor | None:
        main, state = self._main(found)
        own = [tensor for tensor in found if self._shares_gates(tensor, state)]
        others = [tensor for tensor in tensors_in((step.args, step.options)) if not among(tensor, own)]
        through = dict.fromkeys(name for tensor in own for name in self._known(tensor).through)
        if not passable(step, own, others, bool(through), state.channels, main.ndim):
            return None
        given = _mapped(
            (step.args, step.options),
            lambda t: t if among(t, own) else self._gated_now(t, f"read by {step.name} beside another gate"),
        )
        upper = step.function(*given[0], **given[1])
        given = _mapped(given, lambda t: self._known(t).rest if among(t, own) else t)
        lower = step.function(*given[0], **given[1])
        if step.in_place:
            upper, lower = upper.to(main.dtype), lower.to(main.dtype)
        if not keeps_units(upper, lower, main, state.channels):
            return None
        for tensor in own:
            self._known(tensor).reads += 1
        if step.is_curved(len(own)):
            through[step.name] = None
        if step.in_place and upper is not step.args[0]:
            self._known(step.args[0]).became = upper
        self._register.put(upper, state.followed(lower, tuple(through)))
        return upper

    def _main(self, found: list[Tensor]) -> tuple[Tensor, Pending]:
        """Whose gates act later where several meet: the first that nobody has read yet, else the first."""
        states = [self._known(tensor) for tensor in found]
        unread = [i for i, state in enumerate(states) if not state.reads]
        chosen = unread[0] if unread else 0
        return found[chosen], states[chosen]

    def _known(self, tensor: Tensor) -> Pending:
        state = self._register.pending(tensor)
        assert state is not None  # it was found as such
        return state

    def _shares_gates(self, tensor: Tensor, state: Pending) -> bool:
        own = self._known(tensor)
        return own is state or own.has_gates_of(state)

    def _rearranged(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
    ) -> Any:
        """Parts along the units, or other dimensions around them: `chunk` and `split`, `view`."""
        state = self._known(tensor)
        if parted_along(func, args, kwargs, tensor.ndim) == state.channels:
            parts, start = func(*args, **kwargs), 0
            for part in parts:
                self._register.put(part, state.part(start, part.shape[state.channels]))
                start += part.shape[state.channels]
            state.reads += 1
            return parts
        if state.channels != -1 or not keeps_rows(func):
            return None
        after = func(*args, **kwargs)
        if not self._is_by_units(after, tensor):
            return None
        state.reads += 1
        rest, units = state.rest, tensor.shape[-1]
        full = rest.numel() != units
        rest = (
            rest.expand_as(tensor).reshape(after.shape) if full else rest.view([1] * (after.ndim - 1) + [-1])
        )
        self._register.put(after, state.followed(rest, state.through))
        return after

    def _is_by_units(self, after: Tensor, before: Tensor) -> bool:
        examples = 1 if self._gates.ndim == 1 else len(self._gates)
        same = after.dtype == before.dtype and after.shape[-1] == before.shape[-1]
        return same and after.ndim > 1 and after.shape[0] % examples == 0

    # -------------------------------------------------------------------------------------------- gates

    def _gated_now(self, tensor: Tensor, reason: str) -> Tensor:
        """The tensor under its gates, if it is pending."""
        state = self._register.pending(tensor)
        if state is None:
            return tensor
        state.reads += 1
        if self._findings is not None:
            self._findings.note(state.site, _label(state.through, reason))
        gates = self._gates_of(state, tensor)
        if gates.ndim == tensor.ndim:
            gated = gate_between(tensor, state.rest, gates)
        else:  # the rows of each example in a dimension of their own
            rest = state.rest.expand(len(tensor), *state.rest.shape[1:])
            upper, lower = (end.unflatten(0, (len(gates), -1)) for end in (tensor, rest))
            gated = gate_between(upper, lower, gates).flatten(0, 1)
        state.became = gated
        return gated

    def _gates_of(self, state: Pending, tensor: Tensor) -> Tensor:
        """Gates of all units in a tensor, 1 where a unit has none, in a shape that broadcasts."""
        parts, at = [], 0
        for entry in state.site.outputs:
            try:
                own = self._broadcastable(entry, tensor, state.channels, state.site)
            except ComponentError:
                if self._findings is not None:
                    self._findings.failed = id(state.site)
                raise
            parts += [_ones(own, state.channels, entry.entries.start - at), own]
            at = entry.entries.stop
        parts.append(_ones(own, state.channels, state.size - at))
        parts = [part for part in parts if part.shape[state.channels]]
        gates = parts[0] if len(parts) == 1 else torch.cat(parts, dim=state.channels)
        first, stop = state.span
        return gates if stop - first == state.size else gates.narrow(state.channels, first, stop - first)


def _label(through: tuple[str, ...], reason: str) -> str:
    if any(name in ACTIVATIONS for name in through):
        return f"after {', '.join(through)}"
    return f"plain: read by {through[0]}" if through else f"plain: {reason}"


def _ones(like: Tensor, dimension: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dimension] = size
    return like.new_ones(shape)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with their tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if type(value) in (list, tuple):
        return type(value)([_mapped(entry, change) for entry in value])
    return value
