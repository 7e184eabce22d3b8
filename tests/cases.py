"""Small models and tasks that between them have every shape of layer and output.

`CASES` names them; `make_task(name)` builds the task (also in worker processes), and `make_case(name)`
its components as well. All are deterministic, on the CPU, and run in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from coar import outputs
from coar.components import ComponentGroup, ComponentSet
from coar.discovery import find_components
from coar.experiments.ablation import ComponentAblation
from coar.recipes import task_factory
from coar.task import Task

CLASSES = 4


class Residual(nn.Module):
    """Convolutions without bias, BatchNorm, a shortcut."""

    input_shape = (2, 6, 6)
    kinds = ("conv_filter",)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.bn1(self.conv1(x)))
        hidden = functional.relu(self.bn2(self.conv2(hidden)) + hidden)
        return self.head(hidden.mean(dim=(2, 3)))


class Mlp(nn.Module):
    """Linear layers with biases."""

    input_shape = (6,)
    kinds = ("neuron",)

    def __init__(self):
        super().__init__()
        self.hidden1 = nn.Linear(6, 7)
        self.hidden2 = nn.Linear(7, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden2(torch.tanh(self.hidden1(x)))))


class Grouped(nn.Module):
    """A plain, a grouped, a depthwise and a pointwise convolution, with and without bias."""

    input_shape = (2, 5, 5)
    kinds = ("conv_filter", "neuron")

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 3, 1, stride=2)
        self.hidden = nn.Linear(3, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.grouped(functional.gelu(self.plain(x))))
        x = self.pointwise(functional.gelu(self.depthwise(x)))
        return self.head(functional.gelu(self.hidden(x.mean(dim=(2, 3)))))


class Conv1d(nn.Module):
    """Convolutions over time."""

    input_shape = (2, 9)
    kinds = ("conv_filter",)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 3)
        self.conv2 = nn.Conv1d(4, CLASSES, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(self.conv1(x))).mean(dim=2)


class Conv3d(nn.Module):
    """Convolutions over volumes."""

    input_shape = (1, 4, 4, 4)
    kinds = ("conv_filter",)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 3, 2)
        self.conv2 = nn.Conv3d(3, CLASSES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.tanh(self.conv1(x))).mean(dim=(2, 3, 4))


class TokenScorer(nn.Module):
    """Logits per token of a padded batch of sequences: [batch, time, 3] -> [batch, time, CLASSES]."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(3, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(tokens)))


class Slices(Mlp):
    """The MLP again; its components are pairs of inputs of `hidden2`, like heads of a projection."""


MODELS = {
    "residual": Residual,
    "mlp": Mlp,
    "grouped": Grouped,
    "conv1d": Conv1d,
    "conv3d": Conv3d,
    "slices": Slices,
    "several_outputs": TokenScorer,
}
CASES = tuple(MODELS)
OUTPUT_UNITS = ("residual", "mlp", "grouped", "conv1d", "conv3d")  # components are whole output units


@dataclass(frozen=True)
class Case:
    """A task and its components."""

    task: Task
    components: ComponentSet

    def experiment(self, bias="keep", value="zero") -> ComponentAblation:
        return ComponentAblation(self.task, self.components, bias, value)


def make_case(name: str) -> Case:
    task = make_task(name)
    return Case(task, components_of(name, task.model))


def components_of(name: str, model: nn.Module) -> ComponentSet:
    if name == "slices":
        # The first input of hidden2 is left out: an offset of 1, then three components of width 2.
        return ComponentSet(
            [ComponentGroup("pairs", "pair", "hidden2", "weight", 1, 3, width=2, offset=1, side="input")]
        )
    if name == "several_outputs":
        return find_components(model, kinds=["neuron"])
    return find_components(model, kinds=type(model).kinds)


@task_factory
def make_task(name: str) -> Task:
    """Five examples; the margin as output, but for `several_outputs`."""
    if name == "several_outputs":
        return _sequence_task()
    model = make_model(name)
    shape = model.input_shape
    inputs = random_numbers(5, *shape)
    dataset = [(x, torch.tensor(i % CLASSES)) for i, x in enumerate(inputs)]
    return Task(model, dataset, outputs={"margin": outputs.margin}, device="cpu")


def make_model(name: str) -> nn.Module:
    """A model with addressed weights, BatchNorm statistics included, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = MODELS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight.data, module.bias.data, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def random_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that leave torch's global generator alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------- several outputs


def first_logit(model, batch):
    """[batch]"""
    return model(batch["tokens"])[:, 0, 0]


def first_logits(model, batch):
    """[batch, CLASSES]"""
    return model(batch["tokens"])[:, 0]


def token_logits(model, batch):
    """One tensor per example, as long as its sequence."""
    logits = model(batch["tokens"]).amax(dim=2)
    return [row[:length] for row, length in zip(logits, batch["lengths"], strict=True)]


def _pad(items):
    return {
        "tokens": pad_sequence(items, batch_first=True),
        "lengths": torch.tensor([len(item) for item in items]),
    }


@cache
def _sequences() -> tuple[Tensor, ...]:
    return tuple(random_numbers(length, 3, seed=length) for length in (4, 2, 5, 3, 1))


def _sequence_task() -> Task:
    functions = {"one": first_logit, "many": first_logits, "ragged": token_logits}
    ids = {"id": ["d", "b", "e", "c", "a"]}
    model = make_model("several_outputs")
    return Task(model, _sequences(), functions, collate=_pad, metadata=ids, device="cpu")
