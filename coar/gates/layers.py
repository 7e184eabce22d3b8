"""Which torch functions read a layer's parameters, and along which dimensions.

Gated activations find a gated layer by the parameter that a function reads, not by the module that
calls it: what a library computes without calling the module (Swin's projections, the output
projection inside torch's MultiheadAttention) is found all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Layer:
    """Where a function takes its weight, input and bias, and the dimension of its channels.

    Attributes:
        arguments: names of the function's arguments in order.
        weight: name of the weight.
        input: name of what it reads.
        from_end: dimension of the units in what it reads and emits, from the end; 0 for dimension 1.
    """

    arguments: tuple[str, ...]
    weight: str = "weight"
    input: str = "input"
    bias: str = "bias"
    from_end: int = -1

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.arguments, args, strict=False)) | dict(kwargs)

    def channels(self, x: Tensor) -> int:
        """Dimension of the units of x, counted from the end."""
        return self.from_end or 1 - x.ndim


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
LAYERS: dict[Callable[..., Tensor], Layer] = {
    functional.linear: Layer(("input", "weight", "bias"), from_end=-1),
    torch.addmm: Layer(("bias", "input", "weight"), from_end=-1),  # Hugging Face's Conv1D
    functional.conv1d: Layer(_CONV, from_end=-2),
    functional.conv2d: Layer(_CONV, from_end=-3),
    functional.conv3d: Layer(_CONV, from_end=-4),
    functional.conv_transpose1d: Layer(_TRANSPOSED, from_end=-2),
    functional.conv_transpose2d: Layer(_TRANSPOSED, from_end=-3),
    functional.conv_transpose3d: Layer(_TRANSPOSED, from_end=-4),
    functional.layer_norm: Layer(_LAYER_NORM, from_end=-1),
    functional.batch_norm: Layer(_NORM, from_end=0),
}
CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
NO_BIAS_ALONE = (
    torch.addmm,
    functional.batch_norm,
)  # their bias cannot be left out, or is no pass of its own

# What can be asked of a tensor without reading its numbers.
ASKING = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__"}
ASKING |= {
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "get_device",
    "element_size",
    "type",
    "__hash__",
}


def _addmm_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """torch.addmm calls its arguments input, mat1 and mat2; here they are bias, input and weight."""
    names = {"input": "bias", "mat1": "input", "mat2": "weight"}
    return {names.get(key, key): value for key, value in kwargs.items()}


def bound(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of one of `LAYERS`, by the names used here."""
    return LAYERS[func].bind(args, _addmm_arguments(kwargs) if func is torch.addmm else kwargs)


def call(func: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
    """Call one of `LAYERS` with arguments by the names used here."""
    if func is torch.addmm:
        extra = {key: arguments[key] for key in ("beta", "alpha") if key in arguments}
        return torch.addmm(arguments["bias"], arguments["input"], arguments["weight"], **extra)
    return func(**arguments)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    entries = list(value.values()) if isinstance(value, Mapping) else value
    return [t for e in entries for t in tensors_in(e)] if isinstance(entries, list | tuple) else []


def broadcastable(values: Tensor, y: Tensor, channels: int) -> Tensor:
    """Values of units, [units] or [examples, units], in a shape that broadcasts against y.

    Where one example is several rows of y (windows, flattened tokens), the result has one dimension
    more than y, after the first: see `by_example`.
    """
    shape = [1] * (y.ndim + (values.ndim == 2 and len(values) != len(y)))
    shape[channels] = values.shape[-1]
    if values.ndim == 2:
        shape[0] = len(values)
    return values.view(shape)


def by_example(y: Tensor, gates: Tensor) -> Tensor:
    """y with the rows of each example in a dimension of their own, if the gates ask for it."""
    return y if gates.ndim == y.ndim else y.unflatten(0, (len(gates), -1))


def by_row(gated: Tensor, y: Tensor) -> Tensor:
    """What `by_example` made of y, with the rows of all examples in one dimension again.

    The same tensor where nothing was parted: a view would make every function that then works in place
    (ReLU, `+=`) copy its gradient.
    """
    return gated if gated.ndim == y.ndim else gated.flatten(0, 1)
