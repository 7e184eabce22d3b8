"""Interception: act on what gated layers read and emit, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coar.errors import ComponentError
from coar.gates.attention import attention, bind_attention
from coar.gates.layers import LAYERS, Layer, bound, call, tensors_in
from coar.gates.sites import Site


class Interception(TorchFunctionMode):
    """Context manager; subclasses say what happens to inputs and outputs of the sites' layers.

    Attributes:
        third: which third of what a layer emits is used: queries, keys or values; None for all of it.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self._sites = {id(site.module._parameters[site.parameter]): site for site in sites}
        with_bias = [site for site in sites if site.bias_now() is not None]
        self._biases = {id(site.module._parameters[str(site.bias)]): site for site in with_bias}
        self.third: int | None = None
        self._plain: set[int] = set()  # ids of sites whose weight was read by no known layer

    def on_input(self, site: Site, x: Tensor, channels: int) -> Tensor:
        """What the layer reads instead of x."""
        del site, channels
        return x

    def on_output(self, site: Site, y: Tensor, channels: int, bias: Tensor | None) -> Tensor:
        """What the layer emits instead of y; `bias` is the one that it has just added."""
        del site, channels, bias
        return y

    def on_parameter(self, site: Site, parameter: Tensor) -> Tensor:
        """What a function that is no known layer reads instead of a site's weight or bias."""
        del site
        return parameter

    def run_layer(self, func: Callable[..., Any], layer: Layer, site: Site, arguments: Any) -> Tensor:
        """Run one call of a site's layer."""
        channels = layer.channels(arguments[layer.input])
        arguments[layer.input] = self.on_input(site, arguments[layer.input], channels)
        return self.on_output(site, call(func, arguments), channels, arguments.get(layer.bias))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        layer = LAYERS.get(func)
        if layer is not None:
            arguments = bound(func, args, kwargs)
            site = self._sites.get(id(arguments.get(layer.weight)))
            if site is not None:
                return self.run_layer(func, layer, site, arguments)
        if func is functional.multi_head_attention_forward:
            arguments = bind_attention(args, kwargs)
            if {id(arguments["in_proj_weight"]), id(arguments["out_proj_weight"])} & self._sites.keys():
                with self:  # the calls inside are intercepted in their turn
                    return attention(arguments, self.only)
        known = [value for value in tensors_in((args, kwargs)) if self._is_known(value)]
        if not known:
            return func(*args, **kwargs)
        if not _writes(func, kwargs):  # what is written is written once
            result = func(*args, **kwargs)
            if not tensors_in(result):  # asking for a shape is no reading
                return result
        elif self._is_known(args[0]):
            raise _written(self._sites.get(id(args[0])) or self._biases[id(args[0])], func)
        self._plain |= {id(self._sites[id(value)]) for value in known if id(value) in self._sites}
        return func(*self._replaced(list(args)), **self._replaced(kwargs))

    @contextmanager
    def only(self, third: int) -> Iterator[None]:
        """Run calls of which one third of the result is used."""
        self.third = third
        try:
            yield
        finally:
            self.third = None

    def _is_known(self, value: Any) -> bool:
        # Only parameters are asked for their id: torch.compile would tie its code to any other tensor's.
        return isinstance(value, nn.Parameter) and (id(value) in self._sites or id(value) in self._biases)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._replaced(entry) for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._replaced(entry) for entry in value)
        if not self._is_known(value):
            return value
        site = self._sites.get(id(value)) or self._biases[id(value)]
        return self.on_parameter(site, value)


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into a tensor that it is given: `mul_` (also as `*=`), or `out=`."""
    name = getattr(func, "__name__", "")
    in_place = name == "__set__" or (name.endswith("_") and not name.endswith("__"))
    return kwargs.get("out") is not None or in_place


def _written(site: Site, func: Callable[..., Any]) -> ComponentError:
    """Under gates a module would keep the gated numbers for good: `self.fc = self.fc.to(dtype)`."""
    group = site.gates[0].group
    return ComponentError(
        f"the forward pass writes into {group.module}.{group.parameter} or its bias",
        expected="parameters that a forward pass only reads",
        got=f"{type(site.module).__name__}, changed by {getattr(func, '__name__', func)}",
        todo=f"exclude=[{group.module!r}], or use masks",
    )
