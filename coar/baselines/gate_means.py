"""GateMeans: means of derivatives by gates over some passes, what baselines with gradients share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.baselines.cost import cost_of_passes
from coar.errors import OutputError, SettingError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.memory import halving
from coar.gradients.draws import Gates
from coar.gradients.passes import GatePasses
from coar.gradients.weights import chosen_examples
from coar.progress import progress_bar
from coar.rows import require_output
from coar.task import resolve_device

# Examples by number -> gates of each pass, and bool [examples, components]: which derivatives count.
Plan = Callable[[np.ndarray], Iterator[tuple[Gates, np.ndarray]]]


class GateMeans:
    """One output of an experiment, and gates to take its derivatives by.

    Args:
        experiment: whose components and examples.
        output: which output; needed where there are several.
        device: where; "auto" is the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes.
        placed: gates after each unit's own nonlinearity, or at the layers.
        examples: positions of the examples to attribute; None takes all.

    Attributes:
        axis: the columns of these examples.

    Raises:
        SettingError: not a component ablation.
        ComponentError: gates do not do what ablation does here.
    """

    def __init__(
        self,
        experiment: ComponentAblation,
        output: str | None,
        device: str | torch.device,
        batch_size: int | None,
        precision: str,
        placed: bool = True,
        examples: Sequence[int] | None = None,
    ) -> None:
        require_ablation(experiment)
        self.experiment, self.precision, self.batch_size = experiment, precision, batch_size
        self.output = require_output(output, list(experiment.task.outputs))
        self.device = experiment.device if str(device) == "auto" else resolve_device(device)
        self.placed = placed
        self.engine = GatePasses(experiment, (self.output,), self.device, batch_size, precision, placed)
        axis = experiment.columns[self.output]
        self.examples = np.array(chosen_examples(examples, len(experiment.task)))
        self.axis = axis.subset(np.flatnonzero(np.isin(axis.fields["example"], self.examples)))
        self._owner = np.searchsorted(self.examples, self.axis.fields["example"])  # among these

    def over(
        self, plan: Plan, passes: int, description: str, progress: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean derivative of those that count, and mean output, over the passes of a plan.

        Args:
            plan: says for some examples which gates each pass has.
            passes: how many there are, for the bar.
            description: of the bar.
            progress: show it.

        Returns:
            Weights float32 [columns, components] and outputs float64 [columns].

        Raises:
            OutputError: the output has no gradient, or a derivative is not finite.
            SettingError: no pass counts for some component.
        """
        with progress_bar(len(self.examples) * passes, description, progress) as bar:
            return halving(
                lambda size: self._over(plan, size, bar), self.engine.batch_size, self.engine.device
            )

    def _over(self, plan: Plan, batch_size: int, bar: Any) -> tuple[np.ndarray, np.ndarray]:
        self.engine.batch_size = batch_size
        bar.reset()  # memory may have run out half way
        weights = np.empty((len(self.axis), len(self.experiment.components)), np.float32)
        outputs = np.empty(len(self.axis))
        for here, batch in self.engine.batches(self.examples):
            columns = slice(*np.searchsorted(self._owner, [here.start, here.stop]))
            weights[columns], outputs[columns] = self._mean(plan, here, batch, columns, bar)
        return weights, outputs

    def _mean(
        self, plan: Plan, here: slice, batch: Any, columns: slice, bar: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        examples = self.examples[here]
        position = self._owner[columns] - here.start
        total = np.zeros((len(position), len(self.experiment.components)))
        outputs, passes = np.zeros(len(position)), 0
        counts = np.zeros((len(examples), total.shape[1]), np.int64)
        for gates, counted in plan(examples):
            (found,) = self.engine.derivatives(batch, gates).values()
            require_finite(found.by_gate, examples[position], self.experiment.components.names)
            np.add(total, found.by_gate, out=total, where=counted[position])
            counts += counted
            outputs += found.values
            passes += 1
            bar.update(len(examples))
        if not counts.all():
            raise self._never_counted(counts, examples, passes)
        return total / counts[position], outputs / passes

    def _never_counted(self, counts: np.ndarray, examples: np.ndarray, passes: int) -> SettingError:
        example, component = np.argwhere(counts == 0)[0]
        return SettingError(
            f"too few passes: component {self.experiment.components.names[component]!r} was kept in none "
            f"of them for example {examples[example]}",
            expected="every component kept at least once for every example",
            got=f"{passes} passes",
            todo="ask for more passes, or a smaller ablation_fraction",
        )

    def untouched(self) -> np.ndarray:
        """See `untouched_outputs`."""
        whole = untouched_outputs(
            self.experiment, self.output, self.device, self.batch_size, precision=self.precision
        )
        return whole[np.isin(self.experiment.columns[self.output].fields["example"], self.examples)]

    def attributions(
        self, method: str, weights: np.ndarray, intercept: np.ndarray, passes: int, **more: Any
    ) -> Attributions:
        """Attributions that say what was spent; `forwards` among `more` is added to what passes cost."""
        provenance = {
            "method": method,
            "passes": passes,
            "forwards": cost_of_passes(passes, self.axis) + more.pop("forwards", 0),
            "precision": self.precision,
            **self.engine.placed_record(),
        }
        axes = self.experiment.components, self.axis
        return Attributions(weights, intercept, *axes, self.output, provenance=provenance | more)


def untouched_outputs(
    experiment: ComponentAblation,
    output: str,
    device: torch.device,
    batch_size: int | None,
    precision: str = "float32",
) -> np.ndarray:
    """Outputs with all components kept, as a study's rows have them, float64 [columns]; one forward."""
    runner = experiment.prepare(device, batch_size, precision)
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    return np.asarray(runner(everything)[output][0], np.float64)


def require_finite(found: np.ndarray, owner: np.ndarray, components: Sequence[str]) -> None:
    """Raise where a derivative is not finite.

    Args:
        found: [columns, components].
        owner: number of each column's example.
        components: their names.

    Raises:
        OutputError: NaN or infinite.
    """
    if not np.isfinite(found).all():
        row, component = np.argwhere(~np.isfinite(found))[0]
        raise OutputError(
            f"a derivative is not finite: example {owner[row]}, component {components[component]!r}",
            expected="finite derivatives",
            got=float(found[row, component]),
            todo="raise the precision, or exclude this layer; usual: sqrt, norms, division at 0",
        )


def require_ablation(experiment: object, what: str = "derivatives by gates") -> ComponentAblation:
    """The experiment, if it ablates components of a model; `what` needs that."""
    if not isinstance(experiment, ComponentAblation):
        raise SettingError(
            f"{what} need a component ablation",
            expected="coar.ComponentAblation",
            got=type(experiment).__name__,
            todo="use leave_one_out, or run a study and fit it",
        )
    return experiment
