"""A model whose attributions one writes down.

`contributions[e][i]` is what component i adds to the output of example e, and nothing else happens:
the output is positive where the answer counts as right, and ablating components subtracts theirs.
"""

from __future__ import annotations

import numpy as np
import torch

from coar.attributions import Attributions
from coar.discovery import find_components
from coar.experiments.ablation import ComponentAblation
from coar.outputs import sign_means_correct
from coar.recipes import task_factory
from coar.task import Task
from coar.testing import LinearSum


@sign_means_correct
def answer(model, batch):
    return model(batch)


@task_factory
def make_task(contributions: list[list[float]]) -> Task:
    """Example e is the e-th unit vector, so that it picks the e-th column of the weights."""
    weight = torch.tensor(contributions).T.contiguous()
    ids = [f"e{i}" for i in range(len(contributions))]
    dataset = list(torch.eye(len(contributions)))
    model = LinearSum(weight).eval()
    return Task(model, dataset, outputs={"margin": answer}, metadata={"id": ids}, device="cpu")


def doubled(model, batch):
    return 2 * model(batch)


@task_factory
def make_task_of_two_outputs(contributions: list[list[float]]) -> Task:
    """The same with a second output, twice the first."""
    task = make_task(contributions)
    outputs = task.outputs | {"twice": doubled}
    return Task(task.model, task.dataset, outputs=outputs, metadata=task.metadata, device="cpu")


@task_factory
def make_labelled_task() -> Task:
    """Twelve examples that components 0 and 1 hold back together, and forty others."""
    held_back, other = [-2.0, -1.9, 1.5, -0.55, 0.0], [0.1, 0.2, 1.5, -0.5, 0.0]
    more = [0.0, 0.1, 1.5, -0.6, 0.1]
    task = make_task([held_back] * 12 + [other, more] * 20)
    metadata = {"id": task.metadata["id"], "kind": ["held back"] * 12 + ["other"] * 40}
    return Task(task.model, task.dataset, outputs=task.outputs, metadata=metadata, device="cpu")


def make_experiment(contributions) -> ComponentAblation:
    task = make_task(np.asarray(contributions, dtype=float).tolist())
    return ComponentAblation(task, find_components(task.model, kinds=["neuron"], include=["hidden"]))


def make_attributions(contributions, experiment=None, **more) -> Attributions:
    """The true ones, of `make_experiment(contributions)` unless another experiment is given."""
    experiment = experiment or make_experiment(contributions)
    weights = np.asarray(contributions, dtype=float)
    axes = experiment.components, experiment.columns["margin"]
    return Attributions(weights, np.zeros(len(weights)), *axes, output="margin", **more)
