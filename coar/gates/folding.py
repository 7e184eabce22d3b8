"""fold_batch_norm: put BatchNorm into the convolution before it, gates included.

In eval mode BatchNorm is `s y + t` per channel. Folded, the convolution emits that at once: its
weight and bias take s and t, and so does what a gated filter is at rest, so that ablation means the
same. Which BatchNorm follows which convolution, and that nobody else looks in between or reads their
parameters, is read off forward passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from coar.gates.layers import ASKING, CONVOLUTIONS, bound, tensors_in
from coar.gates.sites import Site


def fold_batch_norm(model: nn.Module, sites: Sequence[Site], *runs: Callable[[], Any]) -> int:
    """Fold every BatchNorm that can be into its convolution; sites stay what they are.

    Args:
        model: a private copy in eval mode; its parameters and modules are changed.
        sites: of this copy; gates on a folded BatchNorm move to the convolution.
        runs: run the model on some batch, in each of the ways in which it will be run.

    Returns:
        How many were folded.
    """
    pairs = _pairs(model, runs)
    for conv, norm in pairs:
        moved = _fold(conv, norm)
        _move_gates(sites, conv, norm, moved)
        vars(norm)["forward"] = _unchanged  # the module stays: others may hold it, or ask for its size
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
            if not gate.keeps_bias:  # one that keeps its bias takes whatever the layer adds
                scaled = gate.rest.double() * moved.scale[gate.entries] + moved.shift[gate.entries]
                gate.rest = scaled.to(bias.dtype)
    for site in other:
        for gate in site.outputs:
            gate.keeps_bias = False  # what stays is BatchNorm's bias, not all that the convolution adds now
        if own:
            own[0].outputs.extend(site.outputs)
            site.outputs = []
        else:
            site.module, site.bias = conv, "bias"


def _unchanged(x: Tensor) -> Tensor:
    return x


def _pairs(model: nn.Module, runs: Sequence[Callable[[], Any]]) -> list[tuple[nn.Module, nn.Module]]:
    convs = [m for m in model.modules() if _plain(m, nn.Conv1d, nn.Conv2d, nn.Conv3d) and _has_weight(m)]
    norms = [m for m in model.modules() if _foldable(m)]
    if not convs or not norms:
        return []
    traces = [_traced([*convs, *norms], run) for run in runs]
    return [(conv, norm) for conv in convs for norm in norms if _always_joined(conv, norm, traces)]


def _always_joined(conv: nn.Module, norm: nn.Module, traces: Sequence[_Trace]) -> bool:
    """Whether one follows the other wherever one of them is used, and nobody else uses them."""
    joined = [trace.joins(conv, norm) for trace in traces]
    return any(joined) and all(j or t.silent(conv, norm) for j, t in zip(joined, traces, strict=True))


def _has_weight(module: nn.Module) -> bool:
    return module._parameters.get("weight") is not None  # a parametrised one is computed for each call


def _plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """One of these classes with its own forward and nobody listening."""
    forward = type(module).forward
    own = any(isinstance(module, base) and forward is base.forward for base in classes)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return own and not any(hooks) and "forward" not in vars(module)


def _foldable(module: nn.Module) -> bool:
    return _plain(module, _BatchNorm) and module.running_mean is not None and not module.training


def _traced(modules: Sequence[nn.Module], run: Callable[[], Any]) -> _Trace:
    trace = _Trace(modules)
    with torch.no_grad(), _counting(modules, trace.uses), trace:
        run()
    return trace


@contextmanager
def _counting(modules: Sequence[nn.Module], calls: Counter[int]) -> Iterator[None]:
    """Count calls of modules by id."""
    hooks = [m.register_forward_pre_hook(lambda called, _: calls.update([id(called)])) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Trace(TorchFunctionMode):
    """Who reads what convolutions emit, in one forward pass.

    Attributes:
        readers: id of a convolution's weight -> running means of the BatchNorms that read its result; a
            reader of another sort is 0.
        uses: id of a module, or of a tensor of one -> number of calls.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.readers: dict[int, list[int]] = {}
        self.uses: Counter[int] = Counter()
        self._watched = {id(tensor) for module in modules for tensor in _own(module)}
        self._results: dict[int, int] = {}  # id of a result -> id of the weight
        self._alive: list[Tensor] = []  # so that no id is given twice

    def joins(self, conv: nn.Module, norm: nn.Module) -> bool:
        """Whether both were called once, as modules, one on what the other emits, and nothing else."""
        keys = [id(x) for module in (conv, norm) for x in (module, *_own(module))]
        mean = id(norm._buffers["running_mean"])
        joined = self.readers.get(id(conv._parameters["weight"])) == [mean]
        return joined and all(self.uses[key] == 1 for key in keys)

    def silent(self, conv: nn.Module, norm: nn.Module) -> bool:
        """Whether none was used."""
        return not any(self.uses[id(x)] for module in (conv, norm) for x in (module, *_own(module)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ASKING and not tensors_in(result):
            return result
        given = tensors_in((args, kwargs))
        self.uses.update(id(tensor) for tensor in given if id(tensor) in self._watched)
        reader = id(bound(func, args, kwargs)["running_mean"]) if func is functional.batch_norm else 0
        for tensor in given:
            if id(tensor) in self._results:
                self.readers[self._results[id(tensor)]].append(reader)
        if func in CONVOLUTIONS:
            weight = id(bound(func, args, kwargs)["weight"])
            self.readers.setdefault(weight, [])
            self._results[id(result)] = weight
            self._alive.append(result)
        return result


def _own(module: nn.Module) -> list[Tensor]:
    """Tensors that a convolution or a BatchNorm computes with."""
    named = {**module._parameters, **module._buffers}
    return [value for name, value in named.items() if value is not None and name != "num_batches_tracked"]
