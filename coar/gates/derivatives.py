"""require_derivatives: whether gates that act also have derivatives, before anybody pays for passes.

Where the graph is cut (`detach`, `no_grad`, rounding), the backward pass does not fail: it gives zeros.
One pass at random gates finds groups whose derivatives are all exactly 0; if ablating such a group changes
the outputs, gate gradients would call it unimportant, and that is an error. Where the graph is cut beside
another path, derivatives are wrong and not 0. Two more passes, a little along one direction and back, tell
whether outputs follow the derivatives; where they do not, a warning sends to the audit (`coar.checking`),
which knows which components are concerned.

A branch that ends in a norm of its own (Gemma 2) undoes its gate: nothing happens along the way but on its
last thousandth, where no probe ever is. Such branches are refused, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from coar.component_group import ComponentGroup
from coar.components import ComponentSet
from coar.errors import CoarWarning, ComponentError
from coar.gates.activations import GatedActivations
from coar.gates.scaled_weights import scaled_outputs
from coar.randomness import uniform

DRAWS = 4  # of gates, for groups without a derivative at the first
PROBES = 0.2  # share of gates below 1 in every second example; in the others it is all of them
TELLING = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the largest output: no rounding
STEPS = {torch.float64: 1e-3, torch.float32: 1e-2}  # length along all gates; none where rounding says more
MISSED = 0.2  # of what outputs change by: a kink in between does less
NEAR = 0.02  # gates of whole branches close to their rest ...
SUDDEN = 0.5  # ... and the part of an ablation that may happen between there and the rest
STREAM = "require derivatives"
Silent = list[tuple[ComponentGroup, slice]]


def require_derivatives(
    gated: GatedActivations, components: ComponentSet, outputs: Callable[[], Tensor], examples: int
) -> None:
    """Take derivatives on one batch; where a whole group has none, look whether ablation does anything.

    Args:
        gated: of a private copy; its weights are scaled for a moment and restored.
        components: the same.
        outputs: runs `gated.model` on the batch: [examples]. Without a gradient nothing is looked at: the
            passes themselves then name the output.
        examples: how many there are.

    Raises:
        ComponentError: the backward pass fails, derivatives by the gates of a group are 0 although ablating
            it changes the outputs, or whole branches undo their gates.

    Warns where outputs do not change as the derivatives say.
    """
    silent: Silent = list(components.slices())
    for draw in range(DRAWS):
        gates = _gates(gated, draw, examples)
        slopes = _slopes(gated, gates, outputs)
        if slopes is None:
            return
        moves = (slopes != 0).any(dim=0).cpu().numpy()
        silent = [(group, flat) for group, flat in silent if not moves[flat].any()]
        if draw == 0:
            _require_gradual(gated, components, outputs, examples)
            _warn_if_missed(gated, gates, slopes, outputs)
        if not silent:
            return
    _require_no_effect(gated, components, outputs, examples, silent)


def _gates(gated: GatedActivations, draw: int, examples: int) -> Tensor:
    """Gates of each example, [examples, components]."""
    size = sum(gated.counts)
    gates, chosen = (uniform(0, STREAM, 2 * draw + turn, examples * size) for turn in range(2))
    dense = np.repeat((np.arange(examples) + draw) % 2 == 0, size)
    rows = np.where(dense | (chosen < PROBES), gates, 1.0).reshape(examples, size)
    weight = gated.sites[0].weight_now()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.tensor(rows, dtype=dtype, device=weight.device)


def _slopes(gated: GatedActivations, gates: Tensor, outputs: Callable[[], Tensor]) -> Tensor | None:
    """Derivatives [examples, components] of each example's output; None without gradients."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            gates = gates.clone().requires_grad_()
            with gated.at(gates):
                total = outputs().sum()
            if not total.requires_grad:
                return None
            return torch.autograd.grad(total, gates, materialize_grads=True)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ComponentError(
            "the model cannot be differentiated under gates",
            expected="a forward and a backward pass",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            todo="no tensors changed in place after another function has read them, no checkpoints, no "
            "tensors made in inference mode; or exclude these layers; or fit a regression on rows "
            "(coar.Study, coar.fit), which needs no gradients",
        ) from error


def _require_gradual(
    gated: GatedActivations, components: ComponentSet, outputs: Callable[[], Tensor], examples: int
) -> None:
    whole = [(group, flat) for group, flat in components.slices() if group.whole]
    if not whole:
        return
    # In each example about half of the branches are gated, at least one.
    gates = torch.ones_like(_gates(gated, 0, examples))
    for place, (_, flat) in enumerate(whole):
        chosen = uniform(0, STREAM, 2 * DRAWS + 1 + place, examples) < 0.5
        chosen[place % len(whole) :: len(whole)] = True
        gates[torch.from_numpy(chosen).to(gates.device), flat] = 0.0
    found = []
    with torch.no_grad():
        for least in (0.0, NEAR, 1.0):
            with gated.at(gates.clamp(min=least)):
                found.append(outputs().double())
    sudden, all_of_it = ((end - found[0]).norm() for end in found[1:])
    rounding = 1e-3 * float(found[2].norm())
    if float(sudden) > SUDDEN * float(all_of_it) + rounding:
        raise ComponentError(
            f"gates of whole branches are undone by a norm behind them: {whole[0][0].name}, ...",
            expected="outputs that change all along the way from a gate of 1 to a gate of 0",
            got=f"{float(sudden / all_of_it):.0%} of the change between {NEAR} and 0",
            todo=f"leave components of kind {whole[0][0].kind!r} out, or fit a regression on rows "
            "(coar.Study, coar.fit), which ablates them at once",
        )


def _warn_if_missed(
    gated: GatedActivations, gates: Tensor, slopes: Tensor, outputs: Callable[[], Tensor]
) -> None:
    missed = missed_share(gated, gates, slopes, outputs)
    if missed > MISSED:
        warnings.warn(
            f"derivatives by gates miss {missed:.0%} of what the outputs change by in this model. Usual: "
            "detach(), no_grad(), straight-through estimators, routing, rounding or jumps. coar.check audits "
            "components one by one; a regression on rows (coar.Study, coar.fit) needs no gradients.",
            CoarWarning,
            stacklevel=4,
        )


def missed_share(
    gated: GatedActivations, gates: Tensor, slopes: Tensor, outputs: Callable[[], Tensor]
) -> float:
    """Which part of finite differences along one direction of all gates the derivatives do not explain.

    Args:
        gated: whose gates.
        gates: where, [examples, components].
        slopes: derivatives there, [examples, components].
        outputs: runs the model: [examples].

    Returns:
        0 for derivatives that are right, as for those that cannot be told from rounding.
    """
    length = STEPS.get(gated.sites[0].weight_now().dtype)
    if length is None:
        return 0.0
    size = gates.shape[1]
    step = length * size**-0.5
    signs = torch.from_numpy(np.sign(uniform(0, STREAM, 2 * DRAWS, size) - 0.5)).to(gates)
    with torch.no_grad():
        ends = []
        for end in (step, -step):
            with gated.at(gates + end * signs):
                ends.append(outputs().double())
    found = (ends[0] - ends[1]) / (2 * step)
    rounding = 10 * torch.finfo(gates.dtype).eps * torch.stack(ends).abs().amax(dim=0) / step
    lacking = ((found - slopes.double() @ signs.double()).abs() - rounding).clamp(min=0).norm()
    return float(lacking / found.norm()) if float(lacking) else 0.0


def _require_no_effect(
    gated: GatedActivations,
    components: ComponentSet,
    outputs: Callable[[], Tensor],
    examples: int,
    silent: Silent,
) -> None:
    """Ablate what has no derivative: all together first, which costs one pass."""
    rows = np.ones((1 + len(silent), len(components)))
    for row, (_, flat) in zip(rows[1:], silent, strict=True):
        row[flat] = 0.0
    together = rows.min(axis=0)
    with torch.no_grad():
        first = np.stack([rows[0], together])
        untouched, without = scaled_outputs(gated.model, gated.sites, components, outputs, first)
        if torch.equal(untouched, without):
            return  # components that nothing reads
        ablated = scaled_outputs(gated.model, gated.sites, components, outputs, rows[1:])
        changed = (ablated - untouched).abs().amax(dim=1)
    least = TELLING.get(gated.sites[0].weight_now().dtype, 0.02) * float(untouched.abs().max())
    for (group, flat), change in zip(silent, changed.tolist(), strict=True):
        if change > least:
            raise ComponentError(
                f"derivatives by the gates of {group.name} are 0 although ablating it changes the outputs",
                expected="outputs that follow the gates smoothly",
                got=f"0 for {flat.stop - flat.start} components, {examples} examples and {DRAWS} draws of "
                f"gates; without them an output changes by {change:.2g}",
                todo="look for detach(), no_grad(), rounding or saturation behind this layer; exclude it, or "
                "fit a regression on rows (coar.Study, coar.fit), which needs no gradients",
            )
