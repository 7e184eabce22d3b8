"""The gate itself, `g y + (1 - g) rest`, with a backward pass that keeps y alone.

Written by hand because it is the cost of a gate-gradient pass: one pass over y going forward, two
going back, and nothing stored that the layer has not computed anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gates: Tensor, rest: Tensor) -> Tensor:
        ctx.save_for_backward(y, gates, rest)
        low = gates.to(y.dtype)
        # Exact at both ends: g = 1 adds a zero to y * 1, g = 0 gives rest.
        return torch.addcmul((1 - low) * rest, y, low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, gates, rest = ctx.saved_tensors
        to_input = grad * gates.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_gates = None
        if ctx.needs_input_grad[1]:
            moved = y - rest if bool(rest.any()) else y
            to_gates = reduce_to(grad * moved, gates)
        return to_input, to_gates, None


class _GateOverBias(torch.autograd.Function):
    """`g z + bias` for z computed without its bias: the kept bias costs no pass of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, gates)
        return torch.addcmul(bias, z, gates.to(z.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, gates = ctx.saved_tensors
        to_input = grad * gates.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_gates = reduce_to(grad * z, gates) if ctx.needs_input_grad[1] else None
        return to_input, to_gates, None


def gate(y: Tensor, gates: Tensor, rest: Tensor) -> Tensor:
    """`g y + (1 - g) rest`; gates and rest broadcast against y, gradients go to y and the gates."""
    return _Gate.apply(y, gates, rest)


def gate_over_bias(z: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """`g z + bias`, for a bias that stays; gates and bias broadcast against z."""
    return _GateOverBias.apply(z, gates, bias)


def reduce_to(value: Tensor, like: Tensor) -> Tensor:
    """Sum over the dimensions along which `like` was broadcast; sums in float32 at least."""
    dims = [d for d in range(value.ndim) if like.shape[d] == 1 and value.shape[d] != 1]
    dtype = torch.promote_types(like.dtype, torch.float32) if value.is_floating_point() else None
    return value.sum(dims, keepdim=True, dtype=dtype).to(like.dtype) if dims else value.to(like.dtype)
