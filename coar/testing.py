"""Contract suites for experiments, components and executors, one's own included, and toy experiments.

The suites raise AssertionError with what was expected and got; call them from a test:

>>> experiment, weights = linear_experiment()
>>> check_experiment(experiment)
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.axes import Axis
from coar.components import ComponentGroup, ComponentSet
from coar.designs import Bernoulli
from coar.discovery import find_components
from coar.executors.base import Executor
from coar.executors.serial import Serial
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.files import digest_array, digest_json
from coar.fingerprints import digest_value, model_fingerprint
from coar.gates import ScaledWeights
from coar.randomness import uniform
from coar.recipes import task_factory
from coar.study import Study
from coar.task import Task


class LinearSum(nn.Module):
    """Sum of linear units: component i contributes `weight[i] . x` to the output, and nothing else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.hidden.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, features] -> [batch]."""
        return self.hidden(x).sum(dim=1)


def score(model: nn.Module, batch: Any) -> Tensor:
    """The model's own output, [batch]."""
    return model(batch)


@task_factory
def linear_task(num_components: int = 12, num_examples: int = 10, features: int = 4) -> Task:
    """A linear model on random inputs, for tests: its attributions are known exactly."""
    count = (num_components + num_examples) * features
    numbers = torch.tensor(uniform(0, "linear task", 0, count) - 0.5, dtype=torch.float32)
    weight, inputs = numbers.view(-1, features).split([num_components, num_examples])
    return Task(LinearSum(weight.clone()).eval(), list(inputs), outputs={"score": score}, device="cpu")


def linear_experiment(
    num_components: int = 12, num_examples: int = 10
) -> tuple[ComponentAblation, np.ndarray]:
    """The ablation of a linear model, and its true attributions [columns, components]."""
    task = linear_task(num_components=num_components, num_examples=num_examples)
    components = find_components(task.model, kinds=["neuron"], include=["hidden"])
    weights = torch.stack(task.dataset) @ task.model.hidden.weight.T  # type: ignore[operator, union-attr]
    return ComponentAblation(task, components), weights.detach().numpy()


class SubsetMean:
    """Mean over a kept subset of data points of their values: no model, nothing is ablated.

    Components are data points, columns are features; the smallest experiment whose masks do not mean
    ablation, so that nothing downstream can assume it.
    """

    def __init__(self, num_points: int = 15, num_features: int = 6) -> None:
        self.values = uniform(0, "subset mean", 0, num_points * num_features).reshape(
            num_points, num_features
        )
        source = {"data": digest_array(self.values)}
        self.components = Axis("components", [f"point {i}" for i in range(num_points)], source)
        self.columns = {"mean": Axis("columns", [f"feature {i}" for i in range(num_features)], source)}
        self.accuracy_outputs: frozenset[str] = frozenset()
        self.device = torch.device("cpu")

    def fingerprint(self) -> dict[str, str]:
        """Digest of the values."""
        return {"data": digest_array(self.values)}

    def to_spec(self) -> dict[str, Any]:
        """Import string and arguments."""
        num_points, num_features = self.values.shape
        return {
            "name": "coar.testing:SubsetMean",
            "args": {"num_points": num_points, "num_features": num_features},
        }

    def prepare(
        self, device: torch.device, batch_size: int | None = None, precision: str = "float32"
    ) -> _SubsetMeanRunner:
        """Nothing to prepare: a mean runs on the CPU alone."""
        del device, batch_size, precision
        return _SubsetMeanRunner(self.values)


class _SubsetMeanRunner:
    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __call__(self, masks: np.ndarray) -> dict[str, np.ndarray]:
        counts = np.maximum(masks.sum(axis=1, keepdims=True), 1)
        return {"mean": (masks @ self._values / counts).astype(np.float32)}

    def record(self) -> dict[str, Any]:
        return {"device": "cpu", "numpy": np.__version__}


def check_experiment(experiment: Experiment) -> None:
    """Assert that an experiment keeps its contract.

    Outputs have the promised shapes, are finite and float; a row depends on its mask alone (not on the
    rows beside it or before it); fingerprint and spec are stable; the task's model is not modified.
    """
    model = getattr(getattr(experiment, "task", None), "model", None)
    before = None if model is None else model_fingerprint(model)
    fingerprint = experiment.fingerprint()
    count = len(experiment.components)
    masks = Bernoulli(ablation_fraction=0.3, seed=11).masks(range(3), count)
    masks[0] = True
    runner = experiment.prepare(experiment.device)
    together = runner(masks)
    assert set(together) == set(experiment.columns), (
        f"outputs {set(together)}, columns {set(experiment.columns)}"
    )
    for name, values in together.items():
        expected = (len(masks), len(experiment.columns[name]))
        assert values.shape == expected, f"{name}: expected shape {expected}, got {values.shape}"
        assert values.dtype in (np.float32, np.float64), f"{name}: expected floats, got {values.dtype}"
        assert np.isfinite(values).all(), f"{name}: not finite"
        backwards = np.stack([runner(mask[None])[name][0] for mask in masks[::-1]])[::-1]
        assert np.array_equal(values, backwards), f"{name}: a row depends on the rows run beside or before it"
    digest_json(runner.record())
    digest_json(experiment.to_spec())
    assert experiment.fingerprint() == fingerprint, "the fingerprint changes between calls"
    if model is not None:
        assert model_fingerprint(model) == before, "the task's model was modified"


def check_components(
    model: nn.Module, components: ComponentSet, example: Any, tolerance: float = 1e-5
) -> None:
    """Assert that components keep their contract on one input of a model.

    Names and indices agree; gates of 1 leave outputs bit-identical; a gate of 0 equals a literal
    rebuild with that slice zeroed; the model is not modified.
    """
    before = model_fingerprint(model)
    for index in {0, len(components) // 2, len(components) - 1}:
        assert components.index(components.names[index]) == index, (
            f"name of component {index} leads elsewhere"
        )
        group, number = components.locate(index)
        assert group.component_name(number) == components.names[index]
    gated = ScaledWeights(copy.deepcopy(model), components)
    with torch.no_grad():
        untouched = model(example)
        gated.set(np.ones(len(components), dtype=bool))
        assert digest_value(gated.model(example)) == digest_value(untouched), "gates of 1 change the output"
        for group, flat in components.slices():
            keep = np.ones(len(components), dtype=bool)
            keep[flat.start + group.count // 2] = False
            gated.set(keep)
            literal = zeroed(model, group, group.count // 2)(example)
            difference = float((gated.model(example) - literal).abs().max())
            assert difference <= tolerance, f"{group.name}: differs from a literal rebuild by {difference:g}"
        gated.set(np.ones(len(components), dtype=bool))
        assert digest_value(gated.model(example)) == digest_value(untouched), (
            "gates do not return to 1 exactly"
        )
    assert model_fingerprint(model) == before, "the model was modified"


def zeroed(model: nn.Module, group: ComponentGroup, number: int) -> nn.Module:
    """Literal rebuild: a deep copy with one component's slice of the parameter set to zero."""
    rebuilt = copy.deepcopy(model)
    parameter = rebuilt.get_submodule(group.module)._parameters[group.parameter]
    assert parameter is not None
    start = group.offset + number * group.width
    with torch.no_grad():
        parameter.narrow(group.dimension, start, group.width).zero_()
    return rebuilt


def check_executor(executor: Executor, num_rows: int = 23) -> None:
    """Assert that an executor completes studies with the very bits that `Serial` gives."""
    for experiment in (linear_experiment()[0], SubsetMean()):
        with tempfile.TemporaryDirectory() as folder:
            design = Bernoulli(ablation_fraction=0.3, seed=5)
            studies = [
                Study.create(Path(folder) / name, experiment, design, num_rows, rows_per_shard=5)
                for name in ("serial", "other")
            ]
            studies[0].run(Serial(), progress=False)
            status = studies[1].run(executor, progress=False)
            assert status.complete, status.summary()
            assert status.rows == num_rows, status.summary()
            assert np.array_equal(studies[0].masks, studies[1].masks), "masks differ from those of Serial"
            for name, values in studies[0].outputs.items():
                assert np.array_equal(values, studies[1].outputs[name]), f"{name} differs from that of Serial"
