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
            # Compiled code cannot ask, and need not: there the difference costs nothing.
            moved = y - rest if torch.compiler.is_compiling() or bool(rest.any()) else y
            to_gates = reduce_to(grad * moved, gates)
        return to_input, to_gates, None


class _GateOverBias(torch.autograd.Function):
    """`g z + bias` for z computed without its bias: the kept bias costs no pass of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(z, gates)
        if _is_narrow(z, gates):
            return _over_bias_by_lines(z, gates.to(z.dtype), bias)
        return torch.addcmul(bias, z, gates.to(z.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z, gates = ctx.saved_tensors
        to_input = grad * gates.to(grad.dtype) if ctx.needs_input_grad[0] else None
        to_gates = reduce_to(grad * z, gates) if ctx.needs_input_grad[1] else None
        return to_input, to_gates, None


NARROW = 32  # channels that fill no vector register in half precision


def _is_narrow(z: Tensor, gates: Tensor) -> bool:
    """Images with few channels, which lie innermost.

    The shape of the gates says which dimension is that of the units: what a linear layer emits for a
    single pixel, [batch, 1, 1, units], has channels last as well as first.
    """
    if z.ndim != 4 or z.shape[1] >= NARROW or gates.shape[1:] != (z.shape[1], 1, 1):
        return False
    return z.is_contiguous(memory_format=torch.channels_last)


def _over_bias_by_lines(z: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """The same, with gates and bias repeated along a line of pixels.

    With few channels innermost, torch's loop over them is too short to be vectorised in half
    precision, and ten times slower.
    """
    width = z.shape[3]
    gates, bias = (value.flatten(1).repeat(1, width).unsqueeze(1) for value in (gates, bias))
    # Written into a tensor of its own: a view that a Function makes must not be changed in place, which
    # is what an activation with inplace=True does next.
    result = torch.empty_like(z, memory_format=torch.channels_last)
    torch.addcmul(bias, _lines(z), gates, out=_lines(result))
    return result


def _lines(images: Tensor) -> Tensor:
    """[batch, channels, height, width] -> [batch, height, width * channels], a view."""
    batch, channels, height, width = images.shape
    return images.permute(0, 2, 3, 1).view(batch, height, width * channels)


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
