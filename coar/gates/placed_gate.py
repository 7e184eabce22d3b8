"""The gate between two ends, `lower + g (upper - lower)`, where both may depend on the input.

`coar.gates.gate_function` has the gate over a rest that is a constant of each unit. Behind a residual
connection the rest is `act(rest + s)`: a whole tensor, through which gradients go, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coar.gates.gate_function import reduce_to


class _OverConstant(torch.autograd.Function):
    """The lower end is a constant of each unit: no gradient, and one number per unit to store."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, lower: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(upper, lower, gates)
        low = gates.to(upper.dtype)
        return torch.addcmul((1 - low) * lower, upper, low)  # exact at both ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        upper, lower, gates = ctx.saved_tensors
        to_upper = grad * gates.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_gates = _moved(grad, upper, lower, gates) if ctx.needs_input_grad[2] else None
        return to_upper, None, to_gates


class _Between(torch.autograd.Function):
    """Both ends are computed from the input."""

    @staticmethod
    def forward(ctx: Any, upper: Tensor, lower: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(upper, lower, gates)
        return torch.lerp(lower, upper, gates.to(upper.dtype))  # exact at both ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        upper, lower, gates = ctx.saved_tensors
        to_upper = grad * gates.to(grad.dtype)
        to_lower = reduce_to(grad - to_upper, lower) if ctx.needs_input_grad[1] else None
        to_gates = reduce_to((upper - lower).mul_(grad), gates) if ctx.needs_input_grad[2] else None
        return to_upper if ctx.needs_input_grad[0] else None, to_lower, to_gates


class _Relu(torch.autograd.Function):
    """ReLU without a mask of truth values, for the writing of which compiled code has no vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = torch.relu(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return grad * torch.sign(result)


def relu(x: Tensor) -> Tensor:
    """ReLU, in whichever way is faster."""
    return _Relu.apply(x) if torch.compiler.is_compiling() else torch.relu(x)


def gate_between(upper: Tensor, lower: Tensor, gates: Tensor) -> Tensor:
    """`lower + g (upper - lower)`, exact at both ends.

    Args:
        upper: what is emitted at a gate of 1, [batch, ...].
        lower: at a gate of 0; broadcasts against `upper`.
        gates: broadcast against `upper`; gradients go to all three.

    >>> ends = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, -1.0]])
    >>> gate_between(*ends, torch.tensor([[0.0, 0.5]]))
    tensor([[1., 2.]])
    """
    if lower.requires_grad:
        return _Between.apply(upper, lower, gates)
    return _OverConstant.apply(upper, lower, gates)


def _moved(grad: Tensor, upper: Tensor, lower: Tensor, gates: Tensor) -> Tensor:
    """Sum of `grad (upper - lower)` over what shares a gate."""
    shared = [d for d in range(grad.ndim) if gates.shape[d] == 1]
    if grad.dtype in (torch.float32, torch.float64) and all(lower.shape[d] == 1 for d in shared):
        # One pass over memory less. Not in half precision, which would round the difference.
        return reduce_to(grad * upper, gates) - reduce_to(grad, gates) * lower
    return reduce_to((upper - lower).mul_(grad), gates)
