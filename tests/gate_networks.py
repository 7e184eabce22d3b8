"""Small networks for gate gradients that other processes can make again, and what studies of them share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from coar.discovery import find_components
from coar.experiments.ablation import ComponentAblation
from coar.outputs import sign_means_correct
from coar.recipes import task_factory
from coar.signed_arrays import read_signed
from coar.task import Task


@sign_means_correct
def value(model, batch):
    return model(batch)[:, 0]


def both(model, batch):
    """Two values per example."""
    return model(batch)[:, 1:]


@task_factory
def make_task(num_examples: int = 24, layers: int = 2, width: int = 6) -> Task:
    """Inputs, `layers` tanh layers, three logits. With one layer the outputs are additive in the neurons."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parts: list[nn.Module] = []
        for number in range(layers):
            parts += [nn.Linear(width if number else 5, width), nn.Tanh()]
        model = nn.Sequential(*parts, nn.Linear(width, 3)).eval().requires_grad_(False)
        for layer in model[:-1:2]:
            layer.weight.mul_(7)
        examples = list(torch.randn(num_examples, 5))
    ids = {"id": [f"e{i}" for i in range(num_examples)], "label": [i % 3 for i in range(num_examples)]}
    return Task(model, examples, {"value": value, "both": both}, metadata=ids, device="cpu")


def make_experiment(num_examples: int = 24, layers: int = 2, width: int = 6) -> ComponentAblation:
    """All neurons of the tanh layers."""
    task = make_task(num_examples, layers, width)
    return ComponentAblation(task, find_components(task.model, kinds=["neuron"]))


FRACTION = 0.1
OPTIONS = {"outputs": ["value"], "batch_size": 4}


def arrays(found):
    """Everything that attributions hold."""
    details = {name: found.detail(name) for name in ("signal", "agreement")}
    return {"weights": found.weights, "intercept": found.intercept, "errors": found.errors} | details


def same_bits(found, other):
    assert found.columns == other.columns
    for name, values in arrays(found).items():
        np.testing.assert_array_equal(values, arrays(other)[name], err_msg=name)


def same_to_rounding(found, other):
    assert found.columns == other.columns
    for name, values in arrays(found).items():
        np.testing.assert_allclose(values, arrays(other)[name], rtol=1e-4, atol=5e-6, err_msg=name)


def same_files(study, other):
    """The sums are those of another run, up to how they were computed (the record)."""
    names, others = ({path.name for path in one.sums.folder.glob("*.safetensors*")} for one in (study, other))
    assert names ^ others == set()
    for name in names:
        found, theirs = (read_signed(one.sums.folder / name, 1)[1] for one in (study, other))
        for key, values in found.items():
            np.testing.assert_array_equal(values, theirs[key])
