"""Whether gates reach what a model computes: refused here rather than wrong in silence.

`require_reached` watches one forward pass of a private copy; `require_agreement` compares the two ways
of gating on one batch, for programs that are about to take gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import ComponentError, TaskError
from coar.gates.activations import GatedActivations
from coar.gates.convention import Bias, Value
from coar.gates.derivatives import require_derivatives
from coar.gates.interception import Interception
from coar.gates.layers import Layer, tensors_in
from coar.gates.scaled_weights import scaled_outputs
from coar.gates.sites import Site
from coar.randomness import uniform


def require_reached(
    original: nn.Module,
    sites: Sequence[Site],
    convention: tuple[Bias, Value],
    runs: Sequence[Callable[[], Any]],
) -> None:
    """Watch a private copy run.

    Args:
        original: what the copy was made of.
        sites: of the copy.
        convention: bias and value of the ablation.
        runs: run the copy, in each of the ways in which it will be run.

    Raises:
        TaskError: the copy computes with the original's tensors, which no gate touches.
        ComponentError: a layer adds another bias than its own where biases are to be moved.

    Warns where the parameter of a component is not read at all: ablating that changes nothing.
    """
    watch = _Reach(original, sites, convention != ("keep", "zero"))
    with torch.no_grad():
        for run in runs:
            with watch:
                run()
    unread = [site.gates[0].group.name for site in sites if site.gates and id(site) not in watch.read]
    if unread:
        warnings.warn(
            f"nothing reads the parameters of {len(unread)} groups of components for the first examples, so "
            f"that ablating them changes nothing: {', '.join(unread[:5])}. Exclude what is not used.",
            stacklevel=2,
        )


class _Reach(Interception):
    """Notes which sites are read, and refuses tensors of the original and foreign biases."""

    def __init__(self, original: nn.Module, sites: Sequence[Site], moves_biases: bool) -> None:
        super().__init__(sites)
        named: Mapping[str, Tensor] = {**dict(original.named_parameters()), **dict(original.named_buffers())}
        self._foreign = {id(tensor): name for name, tensor in named.items()}
        self._moves_biases = moves_biases
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            if id(tensor) in self._foreign:
                raise TaskError(
                    "a copy of the model still computes with tensors of the model itself",
                    expected="a model that copy.deepcopy can copy with all that it uses",
                    got=f"{self._foreign[id(tensor)]} is read from the original",
                    todo="no lambdas or hooks that hold self; output functions use the model they get",
                )
        return super().__torch_function__(func, types, args, kwargs)

    def run_layer(self, func: Callable[..., Any], layer: Layer, site: Site, arguments: Any) -> Tensor:
        self.read.add(id(site))
        added = arguments.get(layer.bias)
        own = site.module._parameters.get(site.bias) if site.bias else None
        moves = site.moves_bias() or (bool(site.outputs) and self._moves_biases)
        if moves and added is not own:
            group = site.gates[0].group
            raise ComponentError(
                f"the bias of {group.module} cannot be moved: its weight is used with another",
                expected=f"{type(site.module).__name__} to add its own bias"
                if own is not None
                else "no bias",
                got="no bias" if added is None else "a bias that is not the layer's parameter",
                todo='use bias="keep" and value="zero", or exclude these components',
            )
        return super().run_layer(func, layer, site, arguments)

    def on_parameter(self, site: Site, parameter: Tensor) -> Tensor:
        self.read.add(id(site))
        return parameter


def require_agreement(
    gated: GatedActivations,
    components: ComponentSet,
    outputs: Callable[[], Tensor],
    examples: int,
    derivatives: bool = False,
) -> None:
    """Compare gated activations with scaled weights on one batch, for all examples and one by one.

    Args:
        gated: of a private copy; its weights are scaled for a moment and restored.
        components: the same.
        outputs: runs `gated.model` on the batch: [examples].
        examples: how many there are.
        derivatives: also look whether there are any, see `coar.gates.derivatives`.

    Raises:
        ComponentError: the two differ: gates on activations do not do what ablation does here; or there
            are no derivatives.
    """
    size = len(components)
    rows = uniform(0, "require agreement", 0, 2 * size).reshape(2, size)
    turn = np.arange(examples) % 2
    dtype = next(gated.model.parameters()).dtype
    with torch.no_grad():
        expected = scaled_outputs(gated.model, gated.sites, components, outputs, rows)
        for what, gates in (("one gate vector", rows[0]), ("a gate vector for each example", rows[turn])):
            exact = torch.promote_types(dtype, torch.float32)
            with gated.at(torch.tensor(gates, dtype=exact, device=expected.device)):
                found = outputs()
            literal = expected[0] if gates.ndim == 1 else expected[torch.from_numpy(turn), range(examples)]
            _require_close(found, literal, what, dtype)
    if derivatives:
        require_derivatives(gated, components, outputs, examples)


def allowed_difference(expected: Tensor, dtype: torch.dtype) -> float:
    """How far outputs that should be these may be from them, in a model of this dtype."""
    spread = float((expected - expected.mean()).abs().max()) + float(expected.abs().max())
    return {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 0.1) * max(spread, 1e-6)


def _require_close(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    allowed = allowed_difference(expected, dtype)
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise ComponentError(
            f"{what}: gates on activations differ from scaled weights in this model",
            expected=f"outputs within {allowed:.2g}",
            got=f"a difference of {difference:.2g}",
            todo="exclude layers that are scripted, compiled, checkpointed, under autocast or run with "
            "examples not first; or use masks",
        )
