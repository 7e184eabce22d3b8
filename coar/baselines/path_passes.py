"""PathPasses: activations and derivatives of one output at points of a straight path to the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.baselines.gate_means import require_ablation, require_finite
from coar.baselines.layer_activations import LayerActivations, Seen, not_apart
from coar.baselines.straight_line import StraightLine
from coar.errors import SettingError, TaskError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.examples import Examples, default_batch_size
from coar.experiments.memory import halving, keep_freed_memory
from coar.experiments.private_model import PrivateModel
from coar.experiments.reading import per_example
from coar.gradients.passes import no_gradient
from coar.progress import progress_bar
from coar.rows import require_output
from coar.task import resolve_device


@dataclass(frozen=True)
class Point:
    """A batch at one point of its path, with the graph of its outputs.

    Attributes:
        values: of the columns, example by example.
        counts: columns of each example.
        seen: activations, call by call.
    """

    values: Tensor
    counts: np.ndarray
    seen: Sequence[Seen]

    def changes(self, after: Point) -> list[Tensor]:
        """How activations change up to a later point."""
        shapes, later = ([entry.values.shape for entry in point.seen] for point in (self, after))
        if shapes != later:
            raise TaskError(
                "the model does not call its layers alike along the path",
                expected=f"{len(shapes)} calls of the components' layers, of the same shapes",
                got=f"{len(later)} calls, or other shapes",
                todo="another baseline, or exclude what depends on the input",
            )
        pairs = zip(self.seen, after.seen, strict=True)
        return [later.values.detach() - now.values.detach() for now, later in pairs]

    def contributions(self, factors: Sequence[Tensor] | None, num_components: int) -> Tensor:
        """Derivatives by activations, times factors if any, summed by component: [columns, components].

        One backward pass per value of an example; the last one frees the graph.
        """
        counts, starts = self.counts, np.cumsum(self.counts) - self.counts
        found = self.values.new_zeros((len(self.values), num_components))
        for position in range(int(counts.max(initial=0))):
            mine = counts > position  # the same position of every example that has it
            here = torch.from_numpy(starts[mine] + position).to(found.device)
            last = position + 1 == counts.max()
            slopes = self._slopes(self.values[here].sum(), keep=not last)
            total = found.new_zeros((len(counts), num_components))
            for number, (entry, slope) in enumerate(zip(self.seen, slopes, strict=True)):
                entry.add(slope if factors is None else slope * factors[number], total)
            found[here] = total[torch.from_numpy(mine).to(found.device)]
        return found

    def require_apart(self) -> None:
        """Raise if an example's outputs depend on rows of activations that are taken for another's."""
        if len(self.counts) == 1 or not self.counts.any():
            return
        example = int(np.argmax(self.counts > 0))
        start = int(self.counts[:example].sum())
        own = self.values[start : start + int(self.counts[example])].sum()
        for entry, slope in zip(self.seen, self._slopes(own, keep=True), strict=True):
            others = entry.by_example(slope.abs(), len(self.counts)).amax(dim=1)
            others[example] = 0
            if bool((others > 0).any()):  # not NaN, which has an error of its own
                raise not_apart(entry.gates[0], len(self.counts), tuple(slope.shape))

    def _slopes(self, value: Tensor, keep: bool) -> list[Tensor]:
        tensors = [entry.values for entry in self.seen]
        if not tensors:
            return []
        found = torch.autograd.grad(value, tensors, retain_graph=keep, allow_unused=True)
        return [
            torch.zeros_like(own) if slope is None else slope
            for own, slope in zip(tensors, found, strict=True)
        ]


# Points of a batch at given fractions of its path -> contributions [columns, components].
Rule = Callable[[Callable[[float], Point], int], Tensor]


class PathPasses:
    """A model that runs at points of straight paths, and its examples, on one device.

    Args:
        experiment: whose components and examples; what it puts in their place does not matter.
        baseline: where paths start, from `read_baseline`.
        output: which output; needed where there are several.
        device: where; "auto" is the task's.
        batch_size: examples at a time; None chooses.

    Raises:
        SettingError: not a component ablation.
    """

    def __init__(
        self,
        experiment: ComponentAblation,
        baseline: Tensor | None,
        output: str | None,
        device: str | torch.device,
        batch_size: int | None,
    ) -> None:
        require_ablation(experiment, "derivatives by activations").require_unchanged()
        self.experiment, self.task, self.asked = experiment, experiment.task, batch_size
        self.output = require_output(output, list(self.task.outputs))
        self.device = experiment.device if str(device) == "auto" else resolve_device(device)
        if batch_size is not None and batch_size < 1:
            raise SettingError("batch_size out of range", expected="at least 1 example", got=batch_size)
        if self.device.type == "cpu":
            keep_freed_memory()
        # Not folded: a filter's activation is what the filter emits, before its BatchNorm.
        gated = (experiment.component_set, "keep", "zero", None)
        self._private = PrivateModel(self.task, gated, self.device, "float32", fold=False)  # type: ignore[arg-type]
        self._private.model.requires_grad_(False)
        self.line = StraightLine(self._private.model, baseline)
        self._examples = Examples(self.task, self.device, torch.float32, self._private.channels_last)
        rule = default_batch_size(self.task, self.device, self._private.largest)
        self.batch_size = min(batch_size or rule, len(self.task))
        self.axis = experiment.columns[self.output]

    def over(self, rule: Rule, points: int, description: str, progress: bool) -> np.ndarray:
        """What a rule makes of every batch's path, float64 [columns, components].

        Args:
            rule: adds up contributions of points.
            points: how many it asks for, for the bar.
            description: of the bar.
            progress: show it.

        Raises:
            OutputError: the output has no gradient, or a derivative is not finite.
            ComponentError: activations of a component cannot be seen, or not example by example.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            progress_bar(len(self.task) * points, description, progress) as bar,
            torch.random.fork_rng(devices=devices),  # a model that draws numbers must not be noticed
        ):
            return halving(lambda size: self._over(rule, size, bar), self.batch_size, self.device)

    def _over(self, rule: Rule, batch_size: int, bar: Any) -> np.ndarray:
        bar.reset()  # memory may have run out half way
        owner, names = self.axis.fields["example"], self.experiment.components.names
        weights = np.empty((len(self.axis), len(names)))
        for start, examples, batch in self._batches(batch_size):
            points = self._points(batch, len(examples), bar)
            if start == 0:
                points(1.0).require_apart()
                bar.reset()
            found = rule(points, len(names)).cpu().numpy()
            columns = slice(*np.searchsorted(owner, [start, start + len(examples)]))
            require_finite(found, owner[columns], names)
            weights[columns] = found
        return weights

    def _batches(self, size: int) -> Iterator[tuple[int, np.ndarray, Any]]:
        for examples, batch in self.task.batches(size):
            yield int(examples[0]), examples, self._examples.place(batch)

    def _points(self, batch: Any, count: int, bar: Any) -> Callable[[float], Point]:
        def point(fraction: float) -> Point:
            watch = LayerActivations(self._private.sites)
            function = self.task.outputs[self.output]
            with torch.enable_grad(), self.line.at(fraction), watch:
                result = function(self._private.model, batch)
                values, counts = per_example(result, count, self.output)
            if not values.requires_grad:
                raise no_gradient(self.output)
            bar.update(count)
            return Point(values, counts, watch.seen)

        return point
