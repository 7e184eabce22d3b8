"""Components that are whole residual branches: ablated, the branch adds nothing to its shortcut.

A branch is removed at the last layer in it that has a weight: with weight and bias at zero that layer
emits zeros, and what may follow (a scale per channel, squeeze and excitation, SiLU, a root-mean-square
norm) keeps them. Both ends are exact everywhere. In between, a branch that ends in a nonlinearity or
a norm of its own (the shortest FusedMBConv, Gemma 2) is not linear in the gate. A LayerNorm at the
end is the last layer itself, since it would emit its bias.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from coar.components import ComponentGroup
from coar.errors import ComponentError
from coar.kinds.attention import HEAD
from coar.kinds.layers import is_conv1d, join
from coar.kinds.mlp import KIND as MLP_NEURON
from coar.kinds.registry import component_rule, rule_for

KIND = "block"
SHORTCUTS = ("downsample", "shortcut")  # children that are not in the branch
# Blocks that are one branch, and the last layer of it.
RESIDUAL = {
    "torchvision.models.resnet.BasicBlock": "bn2",
    "torchvision.models.resnet.Bottleneck": "bn3",
    "timm.models.resnet.BasicBlock": "bn2",
    "timm.models.resnet.Bottleneck": "bn3",
    "coar.tasks.digits.Block": "bn2",
    "coar.tasks.cifar_networks.BasicBlock": "bn2",
    "torchvision.models.convnext.CNBlock": "block.5",
    "timm.models.convnext.ConvNeXtBlock": "mlp.fc2",
}
# Blocks without a shortcut where the shape changes, and their branch.
INVERTED = {
    "torchvision.models.mobilenetv2.InvertedResidual": "conv",
    "torchvision.models.mobilenetv3.InvertedResidual": "block",
    "torchvision.models.efficientnet.MBConv": "block",
    "torchvision.models.efficientnet.FusedMBConv": "block",
}
# Layers with a branch for attention and one for the MLP, which the rules for heads and neurons find.
TRANSFORMER = (
    "torchvision.models.vision_transformer.EncoderBlock",
    "torchvision.models.swin_transformer.SwinTransformerBlock",
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    "torch.nn.modules.transformer.TransformerDecoderLayer",
    "timm.models.vision_transformer.Block",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.beit.Block",
    "timm.models.eva.EvaBlock",
    "transformers.models.*Layer",
    "transformers.models.*Block",
)
# The same, but each branch ends in a LayerNorm.
NORMED = {
    "torchvision.models.swin_transformer.SwinTransformerBlockV2": {"attn": "norm1", "mlp": "norm2"},
    "timm.models.vision_transformer.ResPostBlock": {"attn": "norm1", "mlp": "norm2"},
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": {"attn": "norm1", "mlp": "norm2"},
}


@component_rule(KIND, *RESIDUAL)
def _residual(name: str, module: nn.Module) -> list[ComponentGroup]:
    scope = [join(name, path) for path, _ in module.named_children() if path not in SHORTCUTS]
    return [branch(name, name, module, _entry(RESIDUAL, module), tuple(scope))]


@component_rule(KIND, *INVERTED)
def _inverted(name: str, module: Any) -> list[ComponentGroup]:
    if not module.use_res_connect:
        return []
    inner = _entry(INVERTED, module)
    weighted = [path for path, m in module.named_modules() if "weight" in m._parameters | m._buffers]
    last = [path for path in weighted if path.startswith(f"{inner}.")][-1]
    return [branch(name, name, module, last, (join(name, inner),))]


@component_rule(KIND, *NORMED)
def _normed(name: str, module: nn.Module) -> list[ComponentGroup]:
    return [
        branch(join(name, path), name, module, norm, (join(name, path), join(name, norm)))
        for path, norm in _entry(NORMED, module).items()
    ]


@component_rule(KIND, *TRANSFORMER)
def _transformer(name: str, module: nn.Module) -> list[ComponentGroup]:
    """One component for each attention and each MLP in a layer, except in layers inside that one."""
    groups: list[ComponentGroup] = []
    inner: list[str] = []  # modules that are blocks themselves
    for path, child in module.named_modules():
        if any(f"{path}.".startswith(f"{block}.") for block in inner):
            continue
        if path and (rule := rule_for(KIND, child)) and rule(join(name, path), child):
            inner.append(path)
            continue
        for kind in (HEAD, MLP_NEURON):
            if type(child).__name__.endswith("Experts"):  # no layer of its own ends their branch: not found
                continue
            rule = rule_for(kind, child)
            groups += rule(join(name, path), child) if rule else []
    start = len(name) + 1 if name else 0
    return [branch(group.name, name, module, group.module[start:], group.scope) for group in groups]


@component_rule(
    KIND,
    "transformers.models.swinv2.*Layer",
    "transformers.models.swin2sr.*Layer",
    "transformers.models.focalnet.*Layer",
)
def _unknown(name: str, module: nn.Module) -> list[ComponentGroup]:
    """Each branch ends in a LayerNorm that emits its bias, and modules are named unlike elsewhere."""
    raise ComponentError(
        f"branches of {name} ({type(module).__name__}) are not known",
        expected="a residual branch that ends in a projection",
        got="one that ends in a LayerNorm",
        todo="declare a rule for its class with coar.component_rule",
    )


def branch(label: str, name: str, module: nn.Module, path: str, scope: tuple[str, ...]) -> ComponentGroup:
    """One component: all units of the layer that ends a branch of a module."""
    layer = module.get_submodule(path)
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ComponentError(
            f"the branch of {label or 'the model'} cannot be ablated",
            expected=f"{path} with a weight that can be zero: all of the branch goes through it",
            got=f"{type(layer).__name__} without one",
            todo=f"exclude=[{label!r}], or use affine=True",
        )
    dimension = 1 if is_conv1d(layer) else 0
    width, bias = int(weight.shape[dimension]), "bias" if layer._parameters.get("bias") is not None else None
    where = join(name, path)
    return ComponentGroup(
        label, KIND, where, "weight", dimension, 1, width, bias=bias, whole=True, scope=scope
    )


def _entry(table: dict[str, Any], module: nn.Module) -> Any:
    """What a table says about the nearest class of a module."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
    return next(table[name] for name in names if name in table)
