"""check_components: what every kind of component must keep, on one input of one model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from coar.components import ComponentGroup, ComponentSet
from coar.experiments.examples import move
from coar.experiments.private_model import cast
from coar.fingerprints import digest_value, model_fingerprint
from coar.gates import Bias, GatedActivations, ScaledWeights, Value, fold_batch_norm, make_sites
from coar.randomness import uniform
from coar.task import require_eval
from coar.testing.rebuilds import numbers_of, replaced

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the largest output, if that is above 1


def check_components(
    model: nn.Module,
    components: ComponentSet,
    example: Any,
    *,
    bias: Bias = "keep",
    value: Value = "zero",
    per_example: bool = True,
) -> None:
    """Assert that components keep their contract on one input of a model.

    - names and indices agree;
    - gates of 1 leave outputs bit for bit what they are, also after others;
    - a gate of 0 equals a literal rebuild with that slice removed or replaced (1e-5 in float32, 1e-10
      in float64 of the largest output) and changes no other number of the model;
    - scaled weights equal gated activations for random gates, one vector for all examples and one for
      each; gradients of the former equal those of gates on activations;
    - with BatchNorm folded all this stays so within the same tolerances;
    - the model is bit for bit what it was, also after an exception inside.

    Args:
        model: in eval mode, on the CPU.
        components: of this model.
        example: a batch of two examples or more: a tensor, a list of positional arguments or a
            dictionary of keyword arguments; examples along the first dimension.
        bias: convention, see `coar.gates.convention`.
        value: "zero" or a number.
        per_example: also check gate vectors for each example; False for layers that no gate for each
            example reaches (a parameter read by other functions than layers', examples that meet).

    Raises:
        AssertionError: saying which component, expected and got.
    """
    require_eval(model)
    before = model_fingerprint(model)
    _check_names(components)
    for dtype in TOLERANCES:
        probe = _Probe(model, components, example, bias, value, dtype)
        probe.check_ones()
        probe.check_zeros()
        probe.check_ways_agree(per_example)
        probe.check_folding()
    _Probe(model, components, example, bias, value, torch.float64).check_gradients()
    _check_exception(model, components, example)
    assert model_fingerprint(model) == before, "the model was modified"


def _check_names(components: ComponentSet) -> None:
    for _, flat in components.slices():
        for index in {flat.start, (flat.start + flat.stop) // 2, flat.stop - 1}:
            found = components.index(components.names[index])
            assert found == index, f"name of component {index} leads to {found}"
            group, number = components.locate(index)
            assert group.component_name(number) == components.names[index]


@dataclass
class _Probe:
    """One model in one precision, and the ways of gating it that must agree."""

    original: nn.Module
    components: ComponentSet
    example: Any
    bias: Bias
    value: Value
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.model = cast(copy.deepcopy(self.original), self.dtype)
        self.example = move(self.example, torch.device("cpu"), self.dtype)
        self.gated = ScaledWeights(copy.deepcopy(self.model), self.components, self.bias, self.value)
        with torch.no_grad():
            self.untouched = run(self.model, self.example)
        self.tolerance = TOLERANCES[self.dtype] * max(1.0, float(self.untouched.abs().max()))

    def check_ones(self) -> None:
        ones = np.ones(len(self.components), dtype=bool)
        for gates in (ones, ~ones, ones):
            self.gated.set(gates)
        with torch.no_grad():
            same = digest_value(run(self.gated.model, self.example)) == digest_value(self.untouched)
        assert same, "gates of 1 change the output"

    def check_zeros(self) -> None:
        for group, flat in self.components.slices():
            number = group.count // 2
            keep = np.ones(len(self.components), dtype=bool)
            keep[flat.start + number] = False
            self.gated.set(keep)
            literal = replaced(self.model, group, number, self.bias, self.value)
            self._compare(self._run(self.gated.model), self._run(literal), f"{group.name}: literal rebuild")
            stray = _stray(self.gated.model, self.model, group, number)
            assert not stray, f"{group.name}[{number}]: gating it changes {stray}"

    def check_ways_agree(self, per_example: bool) -> None:
        size = _batch_size(self.example)
        rows = uniform(0, "check components", 0, size * len(self.components)).reshape(size, -1)
        activations = GatedActivations(self.model, self.components, self.bias, self.value)
        with activations.at(torch.tensor(rows[0], dtype=self.dtype)):
            shared = self._run(self.model)
        self.gated.set(rows[0])
        self._compare(shared, self._run(self.gated.model), "gated activations and scaled weights")
        if not per_example:
            return
        with activations.at(torch.tensor(rows, dtype=self.dtype)):
            own = run_each(self.model, self.example).detach()
        for position, row in enumerate(rows):
            self.gated.set(row)
            with torch.no_grad():
                expected = run_each(self.gated.model, self.example)
            self._compare(own[position], expected[position], f"gates of example {position} alone")

    def check_folding(self) -> None:
        folded = copy.deepcopy(self.model)
        sites = make_sites(folded, self.components, self.bias, self.value)
        with torch.no_grad():
            count = fold_batch_norm(folded, sites, lambda: run(folded, self.example))
        if not count:
            return
        gates = uniform(1, "check components", 0, len(self.components))
        gates[: len(gates) // 2] = gates[: len(gates) // 2] > 0.3
        scaled = ScaledWeights(copy.deepcopy(self.model), self.components, self.bias, self.value)
        scaled.set(gates)
        expected = self._run(scaled.model)
        for fused in (False, True):
            activations = GatedActivations(folded, self.components, sites=sites, fused=fused)
            with activations.at(torch.tensor(gates, dtype=self.dtype)):
                self._compare(self._run(folded), expected, f"folded activations (fused={fused})")
        again = ScaledWeights(folded, self.components, sites=sites)
        again.set(gates)
        self._compare(self._run(folded), expected, "folded weights")

    def check_gradients(self) -> None:
        """Gradients of gated activations against those through literally scaled parameters."""
        size = len(self.components)
        gates = torch.tensor(uniform(2, "check components", 0, size), dtype=self.dtype).requires_grad_()
        weights = torch.tensor(uniform(3, "check components", 0, len(self.untouched)), dtype=self.dtype)
        model = self.model.requires_grad_(False)
        activations = GatedActivations(model, self.components, self.bias, self.value)
        with activations.at(gates):
            (found,) = torch.autograd.grad((run(model, self.example) * weights).sum(), gates)
        scaled = _scaled_parameters(model, self.components, self.bias, self.value, gates)
        outputs = functional_call(_Flat(model), scaled, (self.example,))
        (expected,) = torch.autograd.grad((outputs * weights).sum(), gates)
        allowed = 1e-5 * max(1.0, float(expected.abs().max()))
        difference = float((found - expected).abs().max())
        assert difference <= allowed, f"gradients differ by {difference:g}, expected at most {allowed:g}"

    def _run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return run(model, self.example)

    def _compare(self, found: Tensor, expected: Tensor, what: str) -> None:
        difference = float((found - expected).abs().max())
        assert difference <= self.tolerance, (
            f"{what}: {self.dtype} outputs differ by {difference:g}, expected at most {self.tolerance:g}"
        )


class _Flat(nn.Module):
    """A model that takes an example and gives all outputs as one vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, example: Any) -> Tensor:
        return run(self.model, example)


def _scaled_parameters(
    model: nn.Module, components: ComponentSet, bias: Bias, value: Value, gates: Tensor
) -> dict[str, Tensor]:
    """Parameters of `_Flat(model)` under gates, as differentiable functions of them."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for site in make_sites(model, components, bias, value):
        prefix = f"model.{names[id(site.module)]}".rstrip(".")
        weight, biases = site.weight_now(), site.bias_now()
        found[f"{prefix}.{site.parameter}"] = site.weight_at(weight, gates)
        if biases is not None and site.moves_bias():
            found[f"{prefix}.{site.bias}"] = site.bias_at(weight, biases, gates)
    return found


def run(model: nn.Module, example: Any) -> Tensor:
    """All floating-point outputs of a model as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in _floats(_called(model, example))])


def run_each(model: nn.Module, example: Any) -> Tensor:
    """Outputs that belong to single examples, [batch, values]."""
    size = _batch_size(example)
    found = [t.reshape(size, -1) for t in _floats(_called(model, example)) if t.ndim and len(t) == size]
    return torch.cat(found, dim=1)


def _called(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, list | tuple) else model(example)


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _floats(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _floats(entry)


def _batch_size(example: Any) -> int:
    entries = list(example.values()) if isinstance(example, Mapping) else example
    first = entries if isinstance(entries, Tensor) else next(e for e in entries if isinstance(e, Tensor))
    return len(first)


def _stray(gated: nn.Module, model: nn.Module, group: ComponentGroup, number: int) -> list[str]:
    """Names of parameters and buffers that differ outside of one component and its bias."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gated_one = parameters[f"{group.module}.{group.parameter}".lstrip(".")]
    own = {name for name, parameter in parameters.items() if parameter is gated_one}
    other = dict(gated.state_dict())
    found = []
    for name, expected in model.state_dict().items():
        if name in own:
            expected, got = expected.clone(), other[name].clone()
            for entry in range(
                group.offset + number * group.width, group.offset + (number + 1) * group.width
            ):
                numbers_of(expected, group, entry).zero_()
                numbers_of(got, group, entry).zero_()
            found += [] if torch.equal(expected, got) else [name]
        elif not name.endswith("bias") and not torch.equal(expected, other[name]):
            found.append(name)
    return found


def _check_exception(model: nn.Module, components: ComponentSet, example: Any) -> None:
    """An exception inside leaves neither gates nor changed weights behind."""
    with torch.no_grad():
        before = digest_value(run(model, example))
    activations = GatedActivations(model, components)
    try:
        with activations.at(torch.zeros(len(components))), torch.no_grad():
            run(model, example)
            raise _StopError
    except _StopError:
        pass
    with torch.no_grad():
        assert digest_value(run(model, example)) == before, "gates stay on after an exception"


class _StopError(Exception):
    pass
