"""Components of attention: heads, and the units of queries, keys and values.

A head is a run of entries that the output projection reads: heads are joined there in order, each as
wide as its values. With grouped queries that is a query head; its keys and values are shared.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from coar.components import ComponentGroup
from coar.errors import ComponentError
from coar.kinds.layers import (
    MULTIHEAD_ATTENTION,
    in_projection_units,
    input_entries,
    input_size,
    join,
    output_units,
)
from coar.kinds.registry import component_rule, rule_for

HEAD, NEURON = "attention_head", "attention_neuron"
ATTENTION = (
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "timm.*Attention*",
    "timm.*Attn",
    "timm.models.xcit.XCA",
    "transformers.models.*Attention",
)
# What libraries call the same things. A head is as wide as its values, whose width may be its own.
PROJECTIONS = (
    *("c_proj", "o_proj", "out_proj", "proj", "dense", "o", "output", "out_lin", "output_proj"),
    *("linear_out", "projection", "projection_layer", "post", "Wo"),
)
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
WIDTHS = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "size_per_head")
QUERIES_KEYS_VALUES = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "qkv", "kv", "query_key_value", "qkv_proj", "Wqkv"),
    *("c_attn", "q_attn", "q_b_proj", "kv_proj", "kv_b_proj", "in_proj"),
)
INPUT_WORDS = {"q", "k", "v", "kv", "qkv", "wqkv", "query", "key", "value", "in", "pos", "relative", "global"}


@component_rule(HEAD, MULTIHEAD_ATTENTION, *ATTENTION)
def attention_heads(name: str, module: nn.Module) -> list[ComponentGroup]:
    """Heads of an attention module, or of a pair of modules such as BERT's `self` and `output`."""
    path, layer = _projection(module)
    if layer is None:
        _require_none_missed(name, module)
        return []
    heads, width = _number(module, HEADS), _number(module, WIDTHS)
    if heads is None:
        return []  # one map for all channels: nothing to cut
    size = input_size(layer)
    if size is None or size % heads or width not in (None, size // heads):
        got = "neither Linear nor Conv1D" if size is None else f"{size} entries"
        heads_read = f"{heads} heads" + (f" of {width} entries" if width else "")
        raise _refusal(name, module, f"{type(layer).__name__} {path!r} that reads {heads_read}", got)
    return [input_entries(name, HEAD, join(name, path), layer, heads, size // heads, scope=(name,))]


@component_rule(HEAD, "transformers.models.diffllama.*Attention")
def _differential(name: str, module: nn.Module) -> list[ComponentGroup]:
    raise _refusal(name, module, "as many heads as are joined", "half as many, each twice as wide")


@component_rule(HEAD, "timm.models.nest.Attention")
def _interleaved(name: str, module: nn.Module) -> list[ComponentGroup]:
    raise _refusal(name, module, "heads joined one after the other", "the first entry of each head first")


def _projection(module: nn.Module) -> tuple[str, nn.Module | None]:
    """The output projection: a child, or `dense` in the second module of a pair."""
    for path in (*PROJECTIONS, "output.dense"):
        child: Any = module
        for part in path.split("."):
            child = child._modules.get(part) if child is not None else None
        if child is not None and "weight" in child._parameters:
            return path, child
    return "", None


def _number(module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    """The first of some attributes: of the module, of a module in it, of their configuration."""
    owners = [module, *module.children()]
    owners += [owner.config for owner in owners if hasattr(owner, "config")]  # type: ignore[misc]
    values = (getattr(owner, attribute, None) for owner in owners for attribute in attributes)
    return next((value for value in values if type(value) is int), None)


def _require_none_missed(name: str, module: nn.Module) -> None:
    """Raise where a module has heads, but its output projection has an unknown name.

    It is right that there is none in a wrapper of another attention module, and in the first module
    of a pair: all Linears there make queries, keys or values, and the second one is its parent's.
    """
    if not any(type(getattr(module, attribute, None)) is int for attribute in HEADS):
        return
    inner = [child for child in module.modules() if child is not module]
    if any((rule := rule_for(HEAD, child)) and rule("", child) for child in inner):
        return
    linear = [path for path, child in module.named_children() if input_size(child) is not None]
    if not linear or not all(INPUT_WORDS & set(path.lower().split("_")) for path in linear):
        has = ", ".join(path for path, _ in module.named_children())
        raise _refusal(name, module, f"an output projection: {', '.join(PROJECTIONS)}", has)


def _refusal(name: str, module: nn.Module, expected: str, got: str) -> ComponentError:
    return ComponentError(
        f"attention in {name or 'the model'} ({type(module).__name__}) is not cut into heads",
        expected=expected,
        got=got,
        todo=f"declare a rule for its class with coar.component_rule, or exclude=[{name!r}]",
    )


@component_rule(NEURON, MULTIHEAD_ATTENTION)
def _in_projection(name: str, module: nn.Module) -> list[ComponentGroup]:
    return in_projection_units(name, NEURON, module)


@component_rule(NEURON, *ATTENTION)
def _projections(name: str, module: nn.Module) -> list[ComponentGroup]:
    """One group per projection: what it emits, fused or not."""
    found = [(path, module._modules.get(path)) for path in QUERIES_KEYS_VALUES]
    return [
        output_units(join(name, path), NEURON, child)
        for path, child in found
        if child is not None and input_size(child) is not None
    ]
