"""Components of transformers' MLPs: hidden units, after the nonlinearity.

A hidden unit is one entry of what the down projection reads. In a gated MLP that is a product of two
units of up projections, so no row of a weight is the unit; the column of the down projection is.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from coar.components import ComponentGroup
from coar.errors import ComponentError
from coar.kinds.layers import input_entries, input_size, join, output_size
from coar.kinds.registry import component_rule

KIND = "mlp_neuron"
MLP = (
    *("transformers.models.*MLP", "transformers.models.*Mlp", "transformers.models.*Dense*Dense"),
    *("transformers.models.*FeedForward", "transformers.models.*FFN"),
    *("timm.*Mlp", "timm.*SwiGLU*"),
)
# Layers that hold the two projections themselves, beside an attention module.
LAYER = (
    *("transformers.models.*Layer", "transformers.models.*Block"),
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torch.nn.modules.transformer.TransformerDecoderLayer",
)
TORCHVISION_MLP, CONVNEXT = "torchvision.ops.misc.MLP", "torchvision.models.convnext.CNBlock"
# Down projection -> the up projections that libraries put before it; of a gated pair, both.
PROJECTIONS = {
    "c_proj": ("c_fc",),
    "down_proj": ("up_proj", "gate_proj", "gate_up_proj"),
    "fc2": ("fc1", "fc1_g", "fc1_x"),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "wo": ("wi", "wi_0", "wi_1"),
    "Wo": ("Wi",),
    "w2": ("w1", "w3"),
    "weights_out": ("weights_in",),
    "fc_out": ("fc_in",),
    "lin2": ("lin1",),
    "linear2": ("linear1",),
    "linear_2": ("linear_1",),
    "linear_fc2": ("linear_fc1",),
    "output_linear": ("input_linear",),
    "output_dense": ("intermediate_dense",),
    "output.dense": ("intermediate.dense",),
    "ffn_output": ("ffn",),
    "layer_2": ("layer_1",),
}


@component_rule(KIND, *MLP)
def mlp_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    """Hidden units of a module that is an MLP and nothing else."""
    pairs = list(_pairs(module))
    if not pairs:
        _require_none_missed(name, module)
    return [_hidden(name, name, module, down, ups, (name,)) for down, ups in pairs]


@component_rule(KIND, *LAYER)
def _layer_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    """Hidden units of a layer without a module for its MLP, named by the layer that emits them."""
    groups = []
    for down, ups in _pairs(module):
        parts = [join(name, path.removesuffix(".dense")) for path in (*ups, down)]
        groups.append(_hidden(parts[0], name, module, down, ups, tuple(parts)))
    return groups


@component_rule(KIND, TORCHVISION_MLP)
def _sequential_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    """torchvision's MLP is a Sequential with any number of Linears, each after the first reads units."""
    linear = [path for path, child in module.named_children() if isinstance(child, nn.Linear)]
    steps = list(pairwise(linear))
    labels = [name] if len(steps) == 1 else [join(name, up) for up, _ in steps]
    return [
        _hidden(label, name, module, down, (up,), (name,))
        for label, (up, down) in zip(labels, steps, strict=True)
    ]


@component_rule(KIND, CONVNEXT)
def _convnext_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    """The two pointwise layers of a ConvNeXt block are Linears in a Sequential."""
    linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    if len(linear) != 2:
        raise _refusal(name, module, "two Linears", ", ".join(linear))
    scope = (join(name, linear[0]), join(name, linear[1]))
    return [_hidden(scope[0], name, module, linear[1], (linear[0],), scope)]


@component_rule(KIND, "transformers.models.*Experts")
def _experts(name: str, module: nn.Module) -> list[ComponentGroup]:
    """Experts that share one parameter: a unit of one expert is no slice along a single dimension."""
    raise _refusal(name, module, "an MLP whose projections are layers of its own", "experts in one parameter")


def _pairs(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every down projection among a module's own layers, with the up projections before it."""
    for down, names in PROJECTIONS.items():
        ups = tuple(path for path in names if _layer(module, path) is not None)
        if ups and _layer(module, down) is not None:
            yield down, ups


def _layer(module: nn.Module, path: str) -> nn.Module | None:
    child: nn.Module | None = module
    for part in path.split("."):
        child = None if child is None else child._modules.get(part)
    return child if child is not None and input_size(child) is not None else None


def _hidden(
    label: str, name: str, module: nn.Module, down: str, ups: tuple[str, ...], scope: tuple[str, ...]
) -> ComponentGroup:
    """The entries that the down projection reads, where they are the units that the ups emit."""
    layer = module.get_submodule(down)
    size = input_size(layer) or 0
    emitted = [output_size(module.get_submodule(path)) for path in ups]
    fused = len(ups) == 1 and emitted == [2 * size]  # gate and value in one layer
    if not fused and any(width != size for width in emitted):
        expected = f"{', '.join(ups)} emits what {down} reads: {size} entries, or twice as many if gated"
        raise _refusal(name, module, expected, emitted)
    return input_entries(label, KIND, join(name, down), layer, size, 1, scope)


def _require_none_missed(name: str, module: nn.Module) -> None:
    """Raise where an MLP has projections of unknown names; a wrapper of other modules has none."""
    linear = [path for path, child in module.named_children() if input_size(child) is not None]
    if len(linear) > 1 or any(path in PROJECTIONS for path in linear):
        raise _refusal(name, module, "names such as up_proj and down_proj, fc1 and fc2", ", ".join(linear))


def _refusal(name: str, module: nn.Module, expected: str, got: object) -> ComponentError:
    return ComponentError(
        f"MLP in {name or 'the model'} ({type(module).__name__}) is not cut into hidden units",
        expected=expected,
        got=got,
        todo=f"declare a rule for its class with coar.component_rule, or exclude=[{name!r}]",
    )
