"""torch's multi-head attention as calls of single layers, which gates can act on.

`nn.MultiheadAttention` hands all its parameters to one function; here is the same computation from
`linear` and `scaled_dot_product_attention`, examples first. The two projections find their gates
through their weights, like any other layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coar.errors import ComponentError

Only = Callable[[int], AbstractContextManager[None]]
_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)
_REFUSED = ("bias_k", "bias_v", "add_zero_attn", "use_separate_proj_weight", "static_k", "static_v")


def bind_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `multi_head_attention_forward` by name, defaults included."""
    call = _SIGNATURE.bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def attention(call: dict[str, Any], only: Only) -> tuple[Tensor, Tensor | None]:
    """What `multi_head_attention_forward` gives, in eval mode; see the module's text.

    Args:
        call: arguments by name.
        only: context manager for a call of which only queries (0), keys (1) or values (2) are used.
    """
    for name in _REFUSED:
        if call[name] is not None and call[name] is not False:
            raise ComponentError(
                f"gates inside MultiheadAttention do not support {name}",
                expected="fused projections without extra keys",
                got=f"{name}={call[name] if isinstance(call[name], bool) else 'given'}",
                todo="gate other components of this model, or use masks (scaled weights)",
            )
    batched = call["query"].ndim == 3
    query, key, value = (_examples_first(call[name], batched) for name in ("query", "key", "value"))
    heads = call["num_heads"]
    parts = _project((query, key, value), call, only)
    queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    mask = _mask(call, len(query), heads, queries)
    weights = None
    if call["need_weights"]:
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = weights @ values
        weights = weights.mean(dim=1) if call["average_attn_weights"] else weights
    else:
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    merged = mixed.transpose(1, 2).flatten(2)
    out = functional.linear(merged, call["out_proj_weight"], call["out_proj_bias"])
    if batched:
        return out.transpose(0, 1), weights
    return out.squeeze(0), None if weights is None else weights.squeeze(0)


def _examples_first(sequence: Tensor, batched: bool) -> Tensor:
    return sequence.transpose(0, 1) if batched else sequence.unsqueeze(0)


def _project(inputs: tuple[Tensor, Tensor, Tensor], call: dict[str, Any], only: Only) -> list[Tensor]:
    weight, bias = call["in_proj_weight"], call["in_proj_bias"]
    if call["query"] is call["key"] is call["value"]:
        return list(functional.linear(inputs[0], weight, bias).chunk(3, dim=-1))
    # All rows on each input and a third of each result: the weight stays whole, so its gates are found.
    parts = []
    for third, x in enumerate(inputs):
        with only(third):
            parts.append(functional.linear(x, weight, bias).chunk(3, dim=-1)[third])
    return parts


def _mask(call: dict[str, Any], examples: int, heads: int, queries: Tensor) -> Tensor | None:
    """Attention and padding masks as one to add to the scores, or None."""
    mask, padding = call["attn_mask"], call["key_padding_mask"]
    if mask is not None:
        mask = _to_add(mask, queries)
        mask = mask.view(examples, heads, *mask.shape[-2:]) if mask.ndim == 3 else mask
    if padding is not None:
        hidden = _to_add(padding, queries).view(examples, 1, 1, -1)
        mask = hidden if mask is None else mask + hidden
    return mask


def _to_add(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
