"""fine_tune: the alternative to ablation: train the last layer on the very examples that an edit is given."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from coar.axes import Axis
from coar.editing.choice import OVERALL, Sizes
from coar.editing.effect import Effect
from coar.editing.parts import EditParts, LocatedParts
from coar.editing.protection import Protect, protected_groups
from coar.editing.ranked import Direction
from coar.errors import EditError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.passes import no_gradient
from coar.rows import require_output
from coar.task import Task

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)  # after which the layer is looked at
LEARNING_RATE = 1e-3


class CannotTrainError(EditError):
    """A model without a layer that fine-tuning knows; other ways of editing may work."""


@dataclass(frozen=True, repr=False)
class FineTuned:
    """A copy of a model whose last layer was trained, and what that does.

    Attributes:
        model: the copy.
        layer: name of the layer.
        steps: of Adam, chosen on the holdout.
        targets: effect on the targets.
        report: effect on examples that chose nothing.
        target_report: effect on examples like the targets that chose nothing, where there are some.
        seconds: of it all.
    """

    model: nn.Module
    layer: str
    steps: int
    targets: Effect
    report: Effect
    target_report: Effect | None = None
    seconds: float = 0.0

    def __repr__(self) -> str:
        return f"FineTuned({self.layer}, {self.steps} steps)"

    @property
    def judged(self) -> Effect:
        """Effect on examples like the targets that chose nothing; on the targets where there are none."""
        return self.targets if self.target_report is None else self.target_report


def fine_tune(
    experiment: ComponentAblation,
    parts: EditParts,
    direction: Direction = "raise",
    *,
    output: str | None = None,
    learning_rate: float = LEARNING_RATE,
    max_accuracy_drop: float = 0.005,
    max_output_drop: float | None = None,
    protect: Protect | None = None,
) -> FineTuned:
    """Train the last linear layer on targets and references, and stop where the holdout says so.

    Adam on softplus(-output) of the targets (softplus(output) to lower them) plus that of the references,
    which holds them where they are right. The number of steps, up to 128, is chosen as an edit's size is.

    Args:
        experiment: whose model; it stays as it is.
        parts: as for `make_edit`.
        direction: of the targets' outputs.
        output: which output; needed where there are several.
        learning_rate: of Adam.
        max_accuracy_drop: on the holdout, as a fraction.
        max_output_drop: of the holdout's mean output; needed where its sign says nothing.
        protect: subpopulations for which the guard holds as well.

    Raises:
        GuardError: no number of steps moves the targets within the guard.
        EditError: no linear layer, or nothing to guard by.
    """
    start = time.perf_counter()
    task = experiment.task
    name = require_output(output, list(experiment.columns))
    axis, accurate = experiment.columns[name], name in experiment.accuracy_outputs
    located = parts.located(axis)
    if not accurate and max_output_drop is None:
        raise EditError(
            f"output {name!r} does not say whether a prediction is right",
            expected="max_output_drop, or an output whose sign does",
        )
    groups = protected_groups(experiment, axis, located.holdout, protect)
    model = copy.deepcopy(task.model).to(experiment.device)
    layer = last_layer(model, task, name)
    _untie(model.get_submodule(layer))
    trained = _Training(model, task, experiment.columns[name], name, located, direction)
    parameters = list(model.get_submodule(layer).parameters())
    outputs, states = _trained(trained, parameters, learning_rate)
    guarded = {OVERALL: located.holdout, **groups}
    sizes = _effects(outputs, located.compared, guarded, direction, accurate)
    best = sizes.best(max_accuracy_drop, None, max_output_drop)
    with torch.no_grad():
        for parameter, value in zip(parameters, states[best], strict=True):
            parameter.copy_(value)

    def effect(columns: Any) -> Effect:
        return Effect(outputs[0, columns], outputs[best, columns])

    judged = None if located.target_report is None else effect(located.target_report)
    found = effect(located.targets), effect(located.report), judged
    return FineTuned(
        model.eval().requires_grad_(False),
        layer,
        int(sizes.sizes[best]),
        *found,
        seconds=time.perf_counter() - start,
    )


def last_layer(model: nn.Module, task: Task, output: str) -> str:
    """Name of the linear layer (or convolution) that runs last for an output.

    Raises:
        EditError: none runs.
    """
    ran: list[str] = []
    kinds = (nn.Linear, nn.Conv2d)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        with torch.no_grad():
            task.outputs[output](model, _placed(task.batch([0]), task.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise CannotTrainError(
            "the model has no linear layer to train", expected="an nn.Linear", got=type(model).__name__
        )
    return ran[-1]


def _untie(layer: nn.Module) -> None:
    """Give a layer weights of its own: GPT-2's last one is its first as well."""
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            layer._parameters[name] = nn.Parameter(parameter.detach().clone())


class _Training:
    """Outputs of the model as it is now, with and without gradients."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        axis: Axis,
        output: str,
        parts: LocatedParts,
        direction: Direction,
    ) -> None:
        self.model, self.task, self.axis = model, task, axis
        self.function, self.output = task.outputs[output], output
        self.device = next(model.parameters()).device
        sign = 1.0 if direction == "raise" else -1.0
        self.trained = [
            (sign, *self._batch(parts.targets)),
            (1.0, *self._batch(parts.references)),
        ]

    def _batch(self, columns: np.ndarray) -> tuple[Any, Tensor]:
        """A batch of the columns' examples, and where the columns are among all values of these."""
        example = self.axis.fields["example"]
        examples = np.unique(example[columns])
        values = np.flatnonzero(np.isin(example, examples))
        wanted = torch.from_numpy(np.flatnonzero(np.isin(values, columns))).to(self.device)
        return _placed(self.task.batch(examples), self.device), wanted

    def loss(self) -> Tensor:
        """Of the targets on the wanted side and of the references on the right side."""
        total = torch.zeros((), device=self.device)
        for sign, batch, wanted in self.trained:
            found = _flat(self.function(self.model, batch))[wanted]
            if not found.requires_grad:
                raise no_gradient(self.output)
            total = total + functional.softplus(-sign * found).mean()
        return total

    def outputs(self) -> np.ndarray:
        """Of all columns, float32 [columns]."""
        with torch.no_grad():
            found = [
                _flat(self.function(self.model, _placed(batch, self.device))).float().cpu()
                for _, batch in self.task.batches(100)
            ]
        return torch.cat(found).numpy()


def _trained(
    training: _Training, parameters: list[nn.Parameter], learning_rate: float
) -> tuple[np.ndarray, list[list[Tensor]]]:
    """Outputs [looks, columns] and the layer's parameters: before any step, and after each of `STEPS`."""
    training.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    outputs, states = [training.outputs()], [[p.detach().clone() for p in parameters]]
    with torch.enable_grad():
        for step in range(1, STEPS[-1] + 1):
            optimizer.zero_grad()
            training.loss().backward()
            optimizer.step()
            if step in STEPS:
                outputs.append(training.outputs())
                states.append([p.detach().clone() for p in parameters])
    return np.stack(outputs), states


def _effects(
    outputs: np.ndarray,
    compared: np.ndarray,
    guarded: Mapping[str, np.ndarray],
    direction: Direction,
    accurate: bool,
) -> Sizes:
    """What every number of steps does, as the sweep of an edit tells it of every size."""
    targets = outputs[:, compared].astype(np.float64)
    change, right = targets.mean(axis=1) - targets[0].mean(), targets > 0
    done = (right if direction == "raise" else ~right).mean(axis=1) * accurate
    drops, lost = {}, {}
    for name, columns in guarded.items():
        values = outputs[:, columns].astype(np.float64)
        accuracy = (values > 0).mean(axis=1) if accurate else np.full(len(outputs), np.nan)
        drops[name] = accuracy[0] - accuracy
        lost[name] = values[0].mean() - values.mean(axis=1)
    gain = change if direction == "raise" else -change
    return Sizes(np.array((0, *STEPS)), gain, done, drops, lost)


def _flat(found: Tensor | list[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in found]) if isinstance(found, list) else found.reshape(-1)


def _placed(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _placed(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_placed(value, device) for value in batch)
    return batch
