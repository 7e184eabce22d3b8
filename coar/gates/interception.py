"""Interception: act on what gated layers read and emit, whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coar.gates.attention import attention, bind_attention
from coar.gates.layers import LAYERS, Layer, bound, call
from coar.gates.sites import Site


class Interception(TorchFunctionMode):
    """Context manager; subclasses say what happens to inputs and outputs of the sites' layers.

    Attributes:
        seen: ids of the sites whose parameter was read.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        self._sites = {id(site.module._parameters[site.parameter]): site for site in sites}
        with_bias = [site for site in sites if site.bias_now() is not None]
        self._biases = {id(site.module._parameters[str(site.bias)]): site for site in with_bias}
        self.seen: set[int] = set()

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
                self.seen.add(id(site))
                return self.run_layer(func, layer, site, arguments)
        if func is functional.multi_head_attention_forward:
            arguments = bind_attention(args, kwargs)
            if {id(arguments["in_proj_weight"]), id(arguments["out_proj_weight"])} & self._sites.keys():
                with self:  # the calls inside are intercepted in their turn
                    return attention(arguments)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and any(id(value) in self._known for value in args):
            return func(*(self._replaced(value) for value in args), **kwargs)
        return result

    @property
    def _known(self) -> set[int]:
        return self._sites.keys() | self._biases.keys()

    def _replaced(self, value: Any) -> Any:
        site = self._sites.get(id(value)) or self._biases.get(id(value))
        if site is None:
            return value
        self.seen.add(id(site))
        return self.on_parameter(site, value)
