"""GatePasses: derivatives of every example's outputs by every gate, from one forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import OutputError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import Examples, default_batch_size
from coar.experiments.memory import keep_freed_memory
from coar.experiments.private_model import PrivateModel
from coar.experiments.reading import per_example
from coar.gates import PlacedActivations, verify_ends
from coar.gradients.draws import Gates

CHECKED_EXAMPLES = 16  # on which both ends of every gate are compared with ablation


class GatePasses:
    """An experiment's model with gates that gradients are taken for, and its examples, on one device.

    Args:
        experiment: whose components, convention and examples.
        output: which output.
        device: where.
        batch_size: examples at a time; None chooses.
        precision: of the computation.

    Attributes:
        placements: where each group's gates act.
        fallen: why groups stay at their layer although a nonlinearity follows.

    Raises:
        OutputError: the output has no gradient by the gates.
        ComponentError: gates do not do what ablation does here.
    """

    def __init__(
        self,
        experiment: ComponentAblation,
        output: str,
        device: torch.device,
        batch_size: int | None = None,
        precision: str = "float32",
    ) -> None:
        experiment.require_unchanged()
        if device.type == "cpu":
            keep_freed_memory()
        self.task, self.output = experiment.task, output
        gated = (experiment.component_set, experiment.bias, experiment.value, experiment.means)
        self._private = PrivateModel(self.task, gated, device, precision)
        self._private.model.requires_grad_(False)
        components = self._components = experiment.component_set
        self._gated = PlacedActivations(
            self._private.model, components, *gated[1:], sites=self._private.sites, fused=True
        )
        self.device, self.num_components = device, len(components)
        self._examples = Examples(self.task, device, self._private.dtype, self._private.channels_last)
        rule = default_batch_size(self.task, device, self._private.largest)
        self.batch_size = min(batch_size or rule, len(self.task))
        self.fallen = self._verified()
        self.placements = self._gated.placements()

    def _verified(self) -> dict[str, str]:
        count = min(CHECKED_EXAMPLES, len(self.task))
        spread = sorted({i * len(self.task) // count for i in range(count)})
        batch = self._examples.place(self.task.batch(spread))
        count = len(spread)
        return verify_ends(self._gated, self._components, lambda: self._per_example(batch, count), count)

    def _per_example(self, batch: Any, count: int) -> Tensor:
        """Sum of the columns of each example, [examples]."""
        values, counts = self._values(batch, count)
        owner = torch.from_numpy(np.repeat(np.arange(count), counts)).to(values.device)
        return values.new_zeros(count).index_add(0, owner, values)

    def _values(self, batch: Any, count: int) -> tuple[Tensor, np.ndarray]:
        """Output of each column of a batch, and columns of each example."""
        return per_example(self.task.outputs[self.output](self._private.model, batch), count, self.output)

    def derivatives(self, batch: Any, gates: Gates) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of a batch by the gates of each example.

        Returns:
            float32 [columns, components], and the outputs themselves, float64 [columns].
        """
        own = torch.from_numpy(gates.gates).to(self.device).requires_grad_()
        with torch.enable_grad(), self._gated.at(own):
            values, counts = self._values(batch, len(own))
        if not values.requires_grad:
            raise no_gradient(self.output)
        found = np.empty((len(values), self.num_components), np.float32)
        ends = np.cumsum(counts)
        for position in range(int(counts.max(initial=0))):
            # The same position of every example that has it: examples do not share gates.
            here = (ends - counts)[counts > position] + position
            total = values[torch.from_numpy(here).to(self.device)].sum()
            more = bool(position + 1 < counts.max())
            (gradient,) = torch.autograd.grad(total, own, retain_graph=more)
            found[here] = gradient[torch.from_numpy(counts > position)].float().cpu().numpy()
        return found, values.detach().double().cpu().numpy()

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
