"""Functions that work entry by entry.

What such a function makes of a gated unit is known at both ends of its gate: the function of the one
end and of the other. So the gate can as well be put after it (`coar.gates.placement`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coar.gates.placed_gate import relu

# By name, since the same function comes as torch.add, Tensor.add, an operator, torch._C._nn.gelu, ...
ADDING = {"add", "sub", "subtract", "rsub", "__rsub__"}
SCALING = {"mul", "multiply", "div", "divide", "true_divide"}
KEEPING = {"neg", "contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type_as"}
IN_EVAL_MODE = {"batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
# No logarithm, root or reciprocal: what is finite for a unit need not be for one at rest.
ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "prelu", "threshold", "hardtanh", "clamp", "clamp_min", "clamp_max"),
    *("elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "hardswish", "hardsigmoid", "softsign"),
    *("sigmoid", "tanh", "erf", "exp", "sin", "cos", "maximum", "minimum"),
    *("logsigmoid", "tanhshrink", "hardshrink", "softshrink"),
}
BENDING = {"pow", "square", "abs"}  # part of some activations, and of norms
PER_CHANNEL = {"batch_norm", "prelu"}  # along the second dimension
# Where flags stand that callers may give by position.
TRAINING = {"batch_norm": 5} | dict.fromkeys(IN_EVAL_MODE - {"batch_norm"}, 2)
INPLACE = dict.fromkeys(("relu", "relu6", "silu", "mish", "hardswish", "hardsigmoid", "selu"), 1)
INPLACE |= dict.fromkeys(("leaky_relu", "elu", "celu"), 2)
INPLACE |= dict.fromkeys(("hardtanh", "threshold", *(IN_EVAL_MODE - {"batch_norm"})), 3)
ENTRYWISE = ADDING | SCALING | KEEPING | IN_EVAL_MODE | ACTIVATIONS | BENDING


@dataclass(frozen=True)
class Step:
    """One call of an entrywise function, to be made of either end.

    Attributes:
        name: of the function, without the underscore of those that work in place.
        function: the same out of place.
        args: arguments out of place.
        options: likewise.
        in_place: the first argument was to be overwritten.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    in_place: bool

    @property
    def divides(self) -> bool:
        """Whether the second argument is below a line."""
        return self.name in ("div", "divide", "true_divide")

    def is_curved(self, operands: int) -> bool:
        """Whether it is anything but affine in `operands` tensors of the same unit."""
        return self.name in ACTIVATIONS | BENDING or (self.name in SCALING and operands > 1)


def step_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
    """A call as a step, or None if it is not entrywise."""
    called = getattr(func, "__name__", "")
    in_place = called.endswith("_") and not called.endswith("__")
    name = called[:-1] if in_place else called
    if name not in ENTRYWISE or not args or kwargs.get("out") is not None:
        return None
    if name in IN_EVAL_MODE and _flag("training", TRAINING[name], args, kwargs) is not False:
        return None
    if name == "pow" and not _positive(kwargs.get("exponent", args[1] if len(args) > 1 else None)):
        return None
    function = _out_of_place(name) if in_place else func
    if function is None:
        return None
    place = INPLACE.get(name, len(args))
    in_place = in_place or _flag("inplace", place, args, kwargs) is True
    args = args[:place]
    kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
    return Step(name, relu if name == "relu" else function, args, kwargs, in_place)


def _flag(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _positive(exponent: Any) -> bool:
    return isinstance(exponent, int | float) and exponent > 0


def _out_of_place(name: str) -> Callable[..., Any] | None:
    return getattr(torch.Tensor, name, None) or getattr(functional, name, None)


def passable(
    step: Step,
    own: list[Tensor],
    others: list[Tensor],
    bent: bool,
    channels: int,
    ndim: int,
) -> bool:
    """Whether gates may act after a function as well as before."""
    first_is_own = bool(step.args) and isinstance(step.args[0], Tensor) and among(step.args[0], own)
    if (step.in_place or step.divides) and not first_is_own:
        # What is written to may be seen through another tensor; one over a unit is no line nor finite.
        return False
    many = any(tensor.numel() > 1 for tensor in others)
    if step.name in PER_CHANNEL and many and channels != 1 - ndim:
        return False
    return not (bent and many)  # behind its own nonlinearity a gate acts before others come in


def keeps_units(upper: Tensor, lower: Tensor, before: Tensor, channels: int) -> bool:
    """Whether both ends still have the units where they were."""
    same = upper.ndim == lower.ndim == before.ndim and upper.is_floating_point()
    same = same and upper.shape[0] == before.shape[0] and upper.shape[channels] == before.shape[channels]
    return same and all(low in (1, high) for low, high in zip(lower.shape, upper.shape, strict=True))


def among(tensor: Tensor, tensors: list[Tensor]) -> bool:
    """Whether a tensor is one of these objects."""
    return any(tensor is other for other in tensors)


def keeps_rows(func: Callable[..., Any]) -> bool:
    """Whether a function only gives a tensor other dimensions, in the order of its numbers."""
    return getattr(func, "__name__", "") in ("view", "reshape")


def parted_along(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int
) -> int | None:
    """The dimension, from the end, along which a call cuts its tensor into parts; None for other calls."""
    if getattr(func, "__name__", "") not in ("chunk", "split"):
        return None
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0))
    return dim if dim < 0 else dim - ndim
