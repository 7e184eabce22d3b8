"""Gates: put a factor in [0, 1] on every component of a model.

Ablation is defined once, here. With gate g, module output `W x + b` and constant c:

- `bias="keep"`, `value="zero"`: `g W x + b` (as published: the bias of a removed unit stays)
- `bias="ablate"`, `value="zero"`: `g (W x + b)`
- `value=c`: `g (W x + b) + (1 - g) c`

`ScaledWeights` does it on the weights of a private copy: no hooks, nothing in the forward pass, the
cost of a mask is one small product per group that changes.
"""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError, SettingError

Bias = Literal["keep", "ablate"]
Value = float | Literal["zero"]


def check_convention(bias: Bias, value: Value) -> None:
    """Raise `SettingError` unless `bias` and `value` are ones defined above."""
    if bias not in ("keep", "ablate"):
        raise SettingError("unknown bias convention", expected="'keep' or 'ablate'", got=repr(bias))
    number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if value != "zero" and not number:
        raise SettingError("unknown ablation value", expected="'zero' or a finite number", got=repr(value))


class ScaledWeights:
    """A model whose gated parameters are rewritten for each mask.

    Args:
        model: a private copy: its parameters are overwritten.
        components: where the gates are.
        bias: whether a unit's bias stays or is gated with its weight.
        value: what an ablated unit emits: "zero" (beside its bias, where that stays) or a constant.
    """

    def __init__(
        self, model: nn.Module, components: ComponentSet, bias: Bias = "keep", value: Value = "zero"
    ):
        check_convention(bias, value)
        components.require_fits(model)
        self.model = model.requires_grad_(False)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._groups = [
            (flat, _GatedGroup(modules[group.module], group, bias, value))
            for group, flat in components.slices()
        ]
        self._current = np.ones(len(components), dtype=np.float64)

    def set(self, gates: np.ndarray) -> None:
        """Apply one gate vector [components] (booleans are 0/1 gates) to the groups that change."""
        if np.shape(gates) != self._current.shape:
            raise ComponentError(
                "a gate vector has one gate per component", expected=self._current.shape, got=np.shape(gates)
            )
        for flat, group in self._groups:
            if not np.array_equal(gates[flat], self._current[flat]):
                group.set(np.asarray(gates[flat], dtype=np.float64))
        self._current = np.asarray(gates, dtype=np.float64).copy()


class _GatedGroup:
    """One group's parameter, its untouched values, and how to scale it."""

    def __init__(self, module: nn.Module, group: ComponentGroup, bias: Bias, value: Value) -> None:
        self.group = group
        self.constant = 0.0 if value == "zero" else float(value)
        self.weight = _slice(module._parameters[group.parameter], group)
        self.weight_kept = self.weight.clone()
        self.bias = self.bias_kept = None
        if value != "zero" or bias == "ablate":
            self.bias = _bias(module, group, needed=value != "zero")
            self.bias_kept = None if self.bias is None else self.bias.clone()

    def set(self, gates: np.ndarray) -> None:
        factors = torch.from_numpy(gates).to(self.weight.device, self.weight.dtype)
        if self.group.width > 1:
            factors = factors.repeat_interleave(self.group.width)
        shape = [1] * self.weight.ndim
        shape[self.group.dimension] = -1
        torch.mul(self.weight_kept, factors.view(shape), out=self.weight)
        if self.bias is not None and self.bias_kept is not None:
            torch.mul(self.bias_kept, factors, out=self.bias)
            if self.constant:
                self.bias.add_((1 - factors) * self.constant)


def _slice(parameter: nn.Parameter | None, group: ComponentGroup) -> Tensor:
    assert parameter is not None  # require_fits has looked
    return parameter.detach().narrow(group.dimension, group.offset, group.count * group.width)


def _bias(module: nn.Module, group: ComponentGroup, needed: bool) -> Tensor | None:
    """View of the biases of a group's units; a zero bias is added where a constant needs one."""
    if needed and group.bias is None:
        if "bias" not in module._parameters or group.dimension != 0:
            raise ComponentError(
                f"components of {group.module} cannot be replaced by a constant",
                expected="output units of a layer that can have a bias",
                got=f"{group.kind} in {type(module).__name__}",
                todo='use value="zero"',
            )
        weight = module._parameters[group.parameter]
        assert weight is not None
        if module.bias is None:
            module.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    name = group.bias or ("bias" if needed else None)
    bias = module._parameters.get(name) if name else None
    if bias is None:
        return None
    return bias.detach().narrow(0, group.offset, group.count * group.width)


def ablated_copy(
    model: nn.Module, components: ComponentSet, keep: np.ndarray, bias: Bias = "keep", value: Value = "zero"
) -> nn.Module:
    """Copy a model with the components of `keep == False` ablated for good.

    Args:
        model: left untouched.
        components: what `keep` indexes.
        keep: bool [components], True = kept.
        bias: see above.
        value: see above.
    """
    edited = copy.deepcopy(model)
    flags = {name: parameter.requires_grad for name, parameter in edited.named_parameters()}
    ScaledWeights(edited, components, bias, value).set(keep)
    for name, parameter in edited.named_parameters():
        parameter.requires_grad_(flags.get(name, False))
    return edited
