"""GatePasses: derivatives of every example's outputs by every gate, from one forward and backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import OutputError, SettingError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import Examples, default_batch_size
from coar.experiments.memory import keep_freed_memory
from coar.experiments.private_model import PrivateModel
from coar.experiments.reading import SharedForward, per_example
from coar.gates import GatedActivations, PlacedActivations, require_agreement, verify_ends
from coar.gradients.draws import Gates
from coar.precision import LOW

CHECKED_EXAMPLES = 16  # on which both ends of every gate are compared with ablation


@dataclass(frozen=True)
class Derivatives:
    """Of one output of a batch.

    Attributes:
        by_gate: float32 [columns, components].
        values: the outputs themselves, float64 [columns].
    """

    by_gate: np.ndarray
    values: np.ndarray


class GatePasses:
    """An experiment's model with gates that gradients are taken for, and its examples, on one device.

    Args:
        experiment: whose components, convention and examples.
        outputs: which outputs; each costs a backward pass of its own per value of an example.
        device: where.
        batch_size: examples at a time; None chooses.
        precision: of the computation.
        placed: gates after each unit's own nonlinearity, wherever possible; or all at their layers.
        derivatives: look at start-up whether every group has derivatives where ablation has an effect.

    Attributes:
        placements: where each group's gates act; empty unless `placed`.
        fallen: why groups stay at their layer although a nonlinearity follows.

    Raises:
        OutputError: the output has no gradient by the gates.
        ComponentError: gates do not do what ablation does here.
    """

    def __init__(
        self,
        experiment: ComponentAblation,
        outputs: Sequence[str],
        device: torch.device,
        batch_size: int | None = None,
        precision: str = "float32",
        placed: bool = True,
        derivatives: bool = True,
    ) -> None:
        experiment.require_unchanged()
        if device.type == "cpu":
            keep_freed_memory()
        self.task, self.outputs = experiment.task, tuple(outputs)
        gated = (experiment.component_set, experiment.bias, experiment.value, experiment.means)
        self._private = PrivateModel(self.task, gated, device, precision)
        self._private.model.requires_grad_(False)
        components = self._components = experiment.component_set
        kind = PlacedActivations if placed else GatedActivations
        self._gated = kind(self._private.model, components, *gated[1:], sites=self._private.sites, fused=True)
        self.device, self.num_components = device, len(components)
        self._shared = SharedForward(self._private.model) if len(self.outputs) > 1 else None
        self._examples = Examples(self.task, device, self._private.dtype, self._private.channels_last)
        rule = default_batch_size(self.task, device, self._private.largest)
        self.batch_size = min(batch_size or rule, len(self.task))
        if precision in LOW:  # too coarse to compare ends: a twin in float32 tells
            twin = GatePasses(experiment, outputs, device, batch_size, "float32", placed, derivatives)
            self.fallen: dict[str, str] = self._as_in(twin.fallen)
        else:
            self.fallen = self._verified(derivatives)
        self.placements = self._gated.placements() if isinstance(self._gated, PlacedActivations) else {}

    def _verified(self, derivatives: bool) -> dict[str, str]:
        outputs, count = self._checked_batch(self.batch_size if derivatives else CHECKED_EXAMPLES)
        check = self._components, outputs, count
        if isinstance(self._gated, PlacedActivations):
            return verify_ends(self._gated, *check, derivatives=derivatives)
        require_agreement(self._gated, *check, derivatives=derivatives)
        return {}

    def _as_in(self, fallen: dict[str, str]) -> dict[str, str]:
        """Place gates where they were found right; what fell back elsewhere stays at its layer."""
        if isinstance(self._gated, PlacedActivations):
            self._gated.settle(self._checked_batch(self.batch_size)[0])
            for site in self._gated.deferred_sites():
                reasons = [fallen[gate.group.name] for gate in site.outputs if gate.group.name in fallen]
                if reasons:
                    self._gated.keep_plain(site, reasons[0])
        return fallen

    def _checked_batch(self, most: int) -> tuple[Callable[[], Tensor], int]:
        """A few examples spread over the data: their outputs, and how many they are."""
        count = min(CHECKED_EXAMPLES, len(self.task), max(2, most))
        spread = sorted({i * len(self.task) // count for i in range(count)})
        batch = self._examples.place(self.task.batch(spread))
        return lambda: self._per_example(batch, len(spread)), len(spread)

    def record(self) -> dict[str, Any]:
        """Execution record: equal records give bit-identical sums."""
        return self._private.record(self.batch_size)

    def placed_summary(self) -> str:
        """Where gates act, in a line; why where they fell back."""
        counts = Counter(self.placements.values()) or {"at the layers": 0}
        text = ", ".join(f"{place} ({n} groups)" for place, n in counts.items())
        reasons = "; ".join(f"{name}: {why}" for name, why in self.fallen.items())
        return text + (f"; fell back to the layer: {reasons}" if reasons else "")

    def placed_record(self) -> dict[str, dict[str, str]]:
        """Where gates act, and why not later, by group."""
        return {"placements": dict(self.placements), "fallen": dict(self.fallen)}

    def _per_example(self, batch: Any, count: int) -> Tensor:
        """Sum of all columns of each example, [examples]."""
        total = torch.zeros(count, dtype=torch.float32, device=self.device)
        for values, counts in self._values(batch, count).values():
            owner = torch.from_numpy(np.repeat(np.arange(count), counts)).to(values.device)
            total = total.to(values.dtype).index_add(0, owner, values)
        return total

    def _values(self, batch: Any, count: int) -> dict[str, tuple[Tensor, np.ndarray]]:
        """Per output, the value of each column of a batch, and columns of each example."""
        model, functions = self._private.model, self.task.outputs
        if self._shared:
            self._shared.clear()
        found = {name: per_example(functions[name](model, batch), count, name) for name in self.outputs}
        if self._shared:
            self._shared.clear()  # or it keeps the pass's activations
        return found

    def derivatives(self, batch: Any, gates: Gates) -> dict[str, Derivatives]:
        """Derivatives of a batch's outputs by the gates of each example."""
        return {
            name: Derivatives(by_gate.cpu().numpy(), values.cpu().numpy())
            for name, (by_gate, values) in self.tensors(batch, gates).items()
        }

    def tensors(self, batch: Any, gates: Gates) -> dict[str, tuple[Tensor, Tensor]]:
        """The same on the device: float32 [columns, components] and float64 [columns] per output."""
        own = torch.from_numpy(gates.gates).to(self.device).requires_grad_()
        with torch.enable_grad(), self._gated.at(own):
            found = self._values(batch, len(own))
        missing = [name for name, (values, _) in found.items() if not values.requires_grad]
        if missing:
            raise no_gradient(missing[0])
        left = sum(int(counts.max(initial=0)) for _, counts in found.values())
        taken = {}
        for name, (values, counts) in found.items():
            left -= int(counts.max(initial=0))
            taken[name] = self._by_gate(values, counts, own, keep=left > 0), values.detach().double()
        return taken

    def _by_gate(self, values: Tensor, counts: np.ndarray, own: Tensor, keep: bool) -> Tensor:
        """One backward pass per value of an example: examples do not share gates."""
        positions, ends = int(counts.max(initial=0)), np.cumsum(counts)
        found = own.new_zeros((len(values), self.num_components))
        for position in range(positions):
            # The same position of every example that has it.
            mine = counts > position
            here = torch.from_numpy((ends - counts)[mine] + position).to(self.device)
            last = position + 1 == positions
            (gradient,) = torch.autograd.grad(values[here].sum(), own, retain_graph=keep or not last)
            found[here] = gradient if mine.all() else gradient[torch.from_numpy(mine).to(self.device)]
        return found

    def batches(self, examples: np.ndarray) -> Iterator[tuple[slice, Any]]:
        """Batches of some examples, and where in the list they are."""
        for start in range(0, len(examples), self.batch_size):
            here = slice(start, min(start + self.batch_size, len(examples)))
            yield here, self._examples.place(self.task.batch([int(e) for e in examples[here]]))


def no_gradient(output: str) -> OutputError:
    """An output that gates have no derivative for."""
    return OutputError(
        f"output {output!r} has no gradient",
        expected="an output computed from the model's logits by differentiable functions",
        got="a tensor without a gradient: argmax, accuracy, rounding, detach() or no_grad()",
        todo="use a margin, log-odds or loss; or fit a regression on rows (coar.Study, coar.fit), which "
        "needs no gradients",
    )


def require_gradients(experiment: object) -> None:
    """Raise unless gate gradients are defined for an experiment."""
    if not isinstance(experiment, ComponentAblation):
        raise SettingError(
            "gate gradients need a component ablation",
            expected="coar.ComponentAblation",
            got=type(experiment).__name__,
            todo="run a study and fit it",
        )
