"""Toy experiments with known answers: the ablation of a linear model, the mean of a subset."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.axes import Axis
from coar.discovery import find_components
from coar.experiments.ablation import ComponentAblation
from coar.files import digest_array
from coar.randomness import uniform
from coar.recipes import task_factory
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


class ResidualBlock(nn.Module):
    """Convolution, BatchNorm, residual, ReLU: where gates of filters act behind the ReLU."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch]."""
        hidden = nn.functional.relu(self.norm(self.conv(x)) + x)
        return (hidden.mean(dim=(2, 3)) * self.weight).sum(dim=1)


def residual_experiment(num_examples: int = 6) -> ComponentAblation:
    """The ablation of a small residual block's filters; weights and images are the same everywhere."""
    model = ResidualBlock()
    for number, tensor in enumerate([model.conv.weight, model.conv.bias, model.norm.bias]):
        assert tensor is not None
        drawn = uniform(0, "residual block", number, tensor.numel()).reshape(tensor.shape)
        tensor.data = torch.from_numpy(drawn - 0.5).to(torch.float32)
    images = uniform(0, "residual block", 9, num_examples * 4 * 36).reshape(num_examples, 4, 6, 6)
    data = list(torch.from_numpy(images).to(torch.float32))
    task = Task(model.eval(), data, outputs={"score": score}, device="cpu")
    return ComponentAblation(task, find_components(model, kinds=["conv_filter"]))


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
            "name": "coar.testing.toys:SubsetMean",
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
