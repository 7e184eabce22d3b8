"""Who reads what a layer emits, and what becomes of a constant unit on the way there.

One forward pass is followed function by function. What a layer emits stays its *flow* for as long as
units can be told apart: through BatchNorm, functions that work entry by entry, pooling and reshaping.
A flow carries one number per unit: what a unit that emits nothing but its bias is at that place.
Anything else that reads a flow blocks its layer, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from coar.editing.flows import Flow, Reader, Source, moved, pads_zeros
from coar.gates.elementwise import ADDING, Step, step_of
from coar.gates.layers import ASKING, LAYERS, bound, tensors_in
from coar.kinds.layers import CONV1D, is_conv1d

NORMS = {"layer_norm", "group_norm", "instance_norm", "rms_norm", "batch_norm", "normalize"}
_MULTIPLYING = {"mul", "multiply"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def read_sources(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Source]:
    """Follow one forward pass of a model in eval mode: layer -> who reads its units."""
    trace = _Trace(model)
    with torch.no_grad(), trace:
        found = run()
    trace.close(tensors_in(found))
    return trace.sources


def plain_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear, a convolution or a Conv1D as its library made it."""
    known = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_conv1d(module)
    return known and _untouched(module) and module._parameters.get("weight") is not None


def unit_dimension(module: nn.Module) -> int:
    """Along which dimension of the weight the units that a layer emits are."""
    return 1 if is_conv1d(module) else 0


def _untouched(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and _own_forward(type(module))


def _own_forward(kind: Any) -> bool:
    """Whether a class computes as torch's (or transformers') class does that it inherits from."""
    known = (nn.Linear, *_CONVOLUTIONS, _BatchNorm)
    bases = [b for b in kind.__mro__ if b in known or f"{b.__module__}.{b.__qualname__}" == CONV1D]
    return any(kind.forward is base.forward for base in bases)


class _Trace(TorchFunctionMode):
    """Flows of one forward pass; see the module's text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sources: dict[nn.Module, Source] = {}
        self._model = model
        modules = list(model.modules())
        layers = [m for m in modules if plain_layer(m)]
        # Of those that share a weight the first stands for all; their uses say that there are several.
        self._layers = {id(m._parameters["weight"]): m for m in reversed(layers)}
        norms = [m for m in modules if isinstance(m, _BatchNorm) and _untouched(m)]
        self._norms = {id(m.running_mean): m for m in norms if m.running_mean is not None}
        self._watched = {id(tensor) for m in modules for tensor in own_tensors(m)}
        self._uses: Counter[int] = Counter()
        self._flows: dict[int, Flow] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def close(self, emitted: list[Tensor]) -> None:
        """Block what the model itself emits, and layers with parameters that something else uses, too."""
        for tensor in emitted:
            if id(tensor) in self._flows:
                self._flows[id(tensor)].source.block("the model returns it")
        owners = Counter(_place(tensor) for m in self._model.modules() for tensor in own_tensors(m))
        for source in self.sources.values():
            for module in (*source.modules, *source.norms, *(reader.module for reader in source.readers)):
                if any(self._uses[id(t)] > 1 or owners[_place(t)] > 1 for t in own_tensors(module)):
                    source.block(f"{type(module).__name__} with parameters that are used several times")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        step = step_of(func, args, kwargs)
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ASKING and not tensors_in(result):
            return result
        given = tensors_in((args, kwargs))
        self._uses.update(id(tensor) for tensor in given if id(tensor) in self._watched)
        made = self._layer(func, args, kwargs) if func in LAYERS else None
        if func not in LAYERS and any(id(tensor) in self._flows for tensor in given):
            made = self._followed(step, func, args, kwargs, result)
        for tensor in tensors_in(result):
            self._alive.append(tensor)
            self._flows.pop(id(tensor), None)  # written in place
        if made is not None:
            self._flows[id(result)] = made
        return result

    def _block(self, given: Any, reason: str) -> None:
        for tensor in tensors_in(given):
            if id(tensor) in self._flows:
                self._flows[id(tensor)].source.block(reason)

    def _layer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow | None:
        arguments = bound(func, args, kwargs)
        x = arguments.pop("input")
        flow = self._flows.get(id(x))
        self._block(arguments, "its numbers are parameters of another layer")
        if func is functional.batch_norm:
            return None if flow is None else self._normed(flow, x, arguments)
        module = self._layers.get(id(arguments.get("weight")))
        channels = LAYERS[func].channels(x) + x.ndim
        if flow is not None:
            self._read(flow, module, channels, arguments, func)
        if module is None or module in self.sources:
            return None  # a second call is found by its parameters' uses
        source = self.sources[module] = Source([module])
        if getattr(module, "groups", 1) != 1:
            source.block("a grouped convolution")
        return Flow(source, channels, 1, emitted_constants(module), _silent(module))

    def _read(
        self,
        flow: Flow,
        module: nn.Module | None,
        channels: int,
        arguments: dict[str, Any],
        func: Callable[..., Any],
    ) -> None:
        linear = isinstance(module, nn.Linear) or (module is not None and is_conv1d(module))
        if module is None:
            flow.source.block(_reason(func, []))
        elif getattr(module, "groups", 1) != 1:
            flow.source.block("a grouped convolution reads it")
        elif channels != flow.channels or (flow.width > 1 and not linear):
            flow.source.block("another layer reads it along other dimensions")
        else:
            padded = pads_zeros(arguments.get("padding", 0))
            flow.source.readers.append(Reader(module, flow.width, flow.values, flow.known, padded))

    def _normed(self, flow: Flow, x: Tensor, arguments: dict[str, Any]) -> Flow | None:
        module = self._norms.get(id(arguments.get("running_mean")))
        if module is None or arguments.get("training") or flow.channels != 1 or flow.width > 1 or x.ndim < 2:
            flow.source.block("a BatchNorm that uses its batch, or other units than the layer's, reads it")
            return None
        flow.source.norms.append(module)
        values = functional.batch_norm(flow.values[None], **arguments)[0]
        return Flow(flow.source, 1, 1, values, flow.known)

    def _followed(
        self,
        step: Step | None,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Flow | None:
        """The flow of a result, or None (and the layers blocked) where units cannot be followed."""
        given = tensors_in((args, kwargs))
        flows = [self._flows[id(tensor)] for tensor in given if id(tensor) in self._flows]
        others = [tensor for tensor in given if id(tensor) not in self._flows]
        flow, x = flows[0], next(tensor for tensor in given if id(tensor) in self._flows)
        alike = len({f.source for f in flows}) == 1
        made = None
        if step is not None and self._works_unit_by_unit(step, flows, others, x, result):
            made = self._stepped(step, flows)
        elif len(given) == 1 and isinstance(result, Tensor):
            made = moved(flow, getattr(func, "__name__", ""), x, result, args, kwargs)
        if made is None:
            self._block((args, kwargs), _reason(func, others if alike else given))
        return made

    def _works_unit_by_unit(
        self, step: Step, flows: list[Flow], others: list[Tensor], x: Tensor, result: Any
    ) -> bool:
        same = len({(flow.channels, flow.width, len(flow.values)) for flow in flows}) == 1
        same = same and isinstance(result, Tensor) and result.shape == x.shape
        alike = len({flow.source for flow in flows}) == 1 or step.name in _MULTIPLYING
        return same and alike and all(self._is_setting(tensor) for tensor in others)

    def _is_setting(self, tensor: Tensor) -> bool:
        """Whether it is one number of the model itself: one that is computed may differ between inputs."""
        return tensor.numel() == 1 and id(tensor) in self._watched

    def _stepped(self, step: Step, flows: list[Flow]) -> Flow | None:
        values = step.function(*self._constants(step.args), **self._constants(step.options))
        known = torch.stack([flow.known for flow in flows]).all(dim=0)
        if values.ndim != 1:
            return None
        if step.name in _MULTIPLYING:  # 0 times anything
            zero = torch.stack([flow.known & (flow.values == 0) for flow in flows]).any(dim=0)
            values, known = torch.where(zero, 0.0, values), known | zero
        source = flows[0].source
        for flow in flows[1:]:
            self._join(source, flow.source)
        return Flow(source, flows[0].channels, flows[0].width, values, known)

    def _join(self, source: Source, other: Source) -> None:
        """Make one of two layers whose units are multiplied one by one (the two halves of a gated MLP)."""
        if other is source:
            return
        source.take_over(other)
        self.sources = {m: source if s is other else s for m, s in self.sources.items()}
        ours = {key: flow for key, flow in self._flows.items() if flow.source is other}
        self._flows |= {key: replace(flow, source=source) for key, flow in ours.items()}

    def _constants(self, value: Any) -> Any:
        """Arguments with numbers of units in place of tensors."""
        if isinstance(value, dict):
            return {key: self._constants(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._constants(entry) for entry in value)
        if isinstance(value, Tensor):
            return self._flows[id(value)].values if id(value) in self._flows else value.flatten()
        return value


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Tensors that a layer or a BatchNorm computes with."""
    named = {**module._parameters, **module._buffers}
    return [value for name, value in named.items() if value is not None and name != "num_batches_tracked"]


def emitted_constants(module: nn.Module) -> Tensor:
    """What units emit whose weights are 0: their bias [units]."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None  # plain_layer has looked
    return weight.new_zeros(weight.shape[unit_dimension(module)]) if bias is None else bias.detach().clone()


def _silent(module: nn.Module) -> Tensor:
    """Which units emit nothing but their bias: bool [units]."""
    weight = module._parameters["weight"]
    assert weight is not None  # plain_layer has looked
    return (weight.detach() == 0).movedim(unit_dimension(module), 0).flatten(1).all(dim=1)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _reason(func: Callable[..., Any], others: list[Tensor]) -> str:
    name = getattr(func, "__name__", str(func)).strip("_")
    if name.removeprefix("i") in ADDING and others:
        return "it is added to what other layers emit (a residual sum)"
    if "attention" in name:
        return "attention reads it: heads"
    if name in NORMS:
        return f"{name} computes with all units together"
    return f"{name} reads it, behind which units are not followed"
