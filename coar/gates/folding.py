"""fold_batch_norm: put BatchNorm into the convolution before it, gates included.

In eval mode BatchNorm is `s y + t` per channel. Folded, the convolution emits that at once: its
weight and bias take s and t, and so does what a gated filter is at rest, so that ablation means the
same. Which BatchNorm follows which convolution, and that nobody else looks in between, is read off
one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from coar.gates.layers import CONVOLUTIONS, bound
from coar.gates.sites import Site


def fold_batch_norm(model: nn.Module, sites: Sequence[Site], run: Callable[[], Any]) -> int:
    """Fold every BatchNorm that can be into its convolution; sites stay what they are.

    Args:
        model: a private copy in eval mode; its parameters and modules are changed.
        sites: of this copy; gates on a folded BatchNorm move to the convolution.
        run: runs the model on some batch.

    Returns:
        How many were folded.
    """
    pairs = _pairs(model, run)
    for conv, norm in pairs:
        moved = _fold(conv, norm)
        _move_gates(sites, conv, norm, moved)
        _replace(model, norm, nn.Identity())
    return len(pairs)


@dataclass(frozen=True)
class _Affine:
    """What a BatchNorm does per channel, float64."""

    scale: Tensor
    shift: Tensor


def _fold(conv: nn.Module, norm: Any) -> _Affine:
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    assert weight is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.detach().double()
    old = torch.zeros_like(shift) if bias is None else bias.detach().double()
    factors = scale.view(-1, *[1] * (weight.ndim - 1))
    flag = weight.requires_grad
    folded = (weight.detach().double() * factors).to(weight.dtype)
    # The layout (channels last, say) is part of what makes it fast.
    conv._parameters["weight"] = nn.Parameter(torch.empty_like(weight).copy_(folded), requires_grad=flag)
    conv._parameters["bias"] = nn.Parameter((scale * old + shift).to(weight.dtype), requires_grad=flag)
    return _Affine(scale, shift)


def _move_gates(sites: Sequence[Site], conv: nn.Module, norm: nn.Module, moved: _Affine) -> None:
    own = [site for site in sites if site.module is conv and site.parameter == "weight"]
    other = [site for site in sites if site.module is norm and site.parameter == "weight"]
    bias = conv._parameters["bias"]
    assert bias is not None
    for site in own:
        site.bias = "bias"
        for gate in site.outputs:
            if gate.keeps_bias:
                gate.rest = bias.detach()[gate.entries].clone()
            else:
                scaled = gate.rest.double() * moved.scale[gate.entries] + moved.shift[gate.entries]
                gate.rest = scaled.to(bias.dtype)
    for site in other:
        if own:
            own[0].outputs.extend(site.outputs)
            site.outputs = []
        else:
            site.module, site.bias = conv, "bias"


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _pairs(model: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, nn.Module]]:
    convs = {id(m.weight): m for m in model.modules() if _plain(m, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
    norms = {id(m.running_mean): m for m in model.modules() if _foldable(m)}
    if not convs or not norms:
        return []
    trace = _Trace()
    with torch.no_grad(), trace:
        run()
    found = []
    for weight, readers in trace.readers.items():
        norm = norms.get(readers[0]) if len(readers) == 1 else None
        if weight in convs and norm is not None and trace.norm_calls[id(norm.running_mean)] == 1:
            found.append((convs[weight], norm))
    return found


def _plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """One of these classes with its own forward and nobody listening."""
    forward = type(module).forward
    own = any(isinstance(module, base) and forward is base.forward for base in classes)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return own and not any(hooks) and "forward" not in vars(module)


def _foldable(module: nn.Module) -> bool:
    return _plain(module, _BatchNorm) and module.running_mean is not None and not module.training


class _Trace(TorchFunctionMode):
    """Who reads what convolutions emit, in one forward pass.

    Attributes:
        readers: id of a convolution's weight -> running means of the BatchNorms that read its result;
            a reader of another sort is 0, and so is a second call of the convolution.
        norm_calls: id of running means -> number of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, list[int]] = {}
        self.norm_calls: dict[int, int] = {}
        self._results: dict[int, int] = {}  # id of a result -> id of the weight
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in CONVOLUTIONS:
            weight = id(bound(func, args, kwargs)["weight"])
            self._note_readers(args, 0)
            self.readers.setdefault(weight, []) if weight not in self.readers else self.readers[
                weight
            ].append(0)
            self._results[id(result)] = weight
            self._alive.append(result)
        elif func is functional.batch_norm:
            mean = id(bound(func, args, kwargs)["running_mean"])
            self.norm_calls[mean] = self.norm_calls.get(mean, 0) + 1
            self._note_readers(args, mean)
        elif any(True for _ in _tensors(result)):  # asking for a shape is no reading
            self._note_readers((args, kwargs), 0)
        return result

    def _note_readers(self, values: Any, reader: int) -> None:
        for tensor in _tensors(values):
            weight = self._results.get(id(tensor))
            if weight is not None:
                self.readers[weight].append(reader)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
