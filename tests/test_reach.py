"""What gates cannot reach is refused: a copy that runs the original, biases that others add, and so on."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

import coar
from coar.discovery import find_components
from coar.errors import ComponentError, TaskError
from coar.gates import GatedActivations, require_agreement
from coar.testing import check_components
from tests.refused import refused

CPU = torch.device("cpu")
KEEP_ZERO, ABLATE, CONSTANT = ("keep", "zero"), ("ablate", "zero"), ("keep", 0.5)


class Pair(nn.Module):
    """Two layers; subclasses say how they are used."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.out = nn.Linear(4, 5, bias=bias), nn.Linear(5, 3)

    def hidden(self, x):
        return self.fc(x)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


class Captured(Pair):
    def __init__(self):
        super().__init__()
        self.steps = [lambda x: self.fc(x), torch.relu, lambda x: self.out(x)]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class BiasOutside(Pair):
    def hidden(self, x):
        return functional.linear(x, self.fc.weight) + self.fc.bias


class OtherBias(Pair):
    def __init__(self):
        super().__init__(bias=False)
        self.own_bias = nn.Parameter(torch.ones(5))

    def hidden(self, x):
        return functional.linear(x, self.fc.weight, self.own_bias)


class NoBias(Pair):
    def __init__(self):
        super().__init__(bias=False)

    def hidden(self, x):
        return functional.linear(x, self.fc.weight)


class Recast(Pair):
    def hidden(self, x):
        self.fc = self.fc.to(torch.float32)
        return self.fc(x)


class Checkpointed(Pair):
    def hidden(self, x):
        return checkpoint(self.fc, x, use_reentrant=True)


class Scripted(Pair):
    def hidden(self, x):
        with torch._C.DisableTorchFunction():  # as in a scripted function: no mode sees it
            return functional.linear(x, self.fc.weight, self.fc.bias)


def experiment_of(model, convention=KEEP_ZERO, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    examples = [(torch.randn(4, generator=generator) * scale, i % 3) for i in range(6)]
    task = coar.Task(model.eval(), examples, outputs={"margin": coar.outputs.margin}, device="cpu")
    components = find_components(task.model, kinds=["neuron"], include=["fc"])
    return coar.ComponentAblation(task, components, *convention)


def test_a_copy_that_still_runs_the_original_is_refused():
    with refused(TaskError, "still computes with tensors of the model itself", "fc.weight", "lambdas"):
        experiment_of(Captured()).prepare(CPU)


def test_an_output_that_reads_the_original_is_refused():
    model = Pair().eval()
    experiment = experiment_of(model)
    experiment.task.outputs["own"] = lambda other, batch: (other(batch[0]) - model(batch[0]))[:, 0]
    with refused(TaskError, "read from the original", "use the model they get"):
        experiment.prepare(CPU)


@pytest.mark.parametrize("model", [BiasOutside, OtherBias, NoBias])
def test_biases_that_another_adds_stay_and_are_not_moved(model):
    """The published convention is right for them; where the bias should go, it is refused."""
    experiment = experiment_of(model())
    masks = np.ones((1, 5), dtype=bool)
    masks[0, 2] = False
    literal = copy.deepcopy(experiment.task.model)
    with torch.no_grad():
        literal.fc.weight[2] = 0
    expected = coar.outputs.margin(literal, experiment.task.batch(range(6))).detach()
    found = experiment.prepare(CPU)(masks)["margin"][0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    with refused(ComponentError, "bias of fc cannot be moved", "value="):
        experiment_of(model(), CONSTANT).prepare(CPU)


@pytest.mark.parametrize("model", [BiasOutside, OtherBias])
def test_a_bias_that_should_go_is_not_left(model):
    with refused(ComponentError, "bias of fc cannot be moved", 'bias="keep"'):
        experiment_of(model(), ABLATE).prepare(CPU)


def test_gates_on_activations_leave_a_bias_added_outside():
    model = BiasOutside().eval()
    check_components(model, find_components(model, kinds=["neuron"], include=["fc"]), torch.randn(3, 4))


def test_a_layer_without_a_bias_can_be_replaced_by_a_constant():
    model = Pair(bias=False).eval()
    components = find_components(model, kinds=["neuron"], include=["fc"])
    check_components(model, components, torch.randn(3, 4), value=0.7)


def test_a_forward_pass_that_rewrites_a_gated_parameter_is_refused_and_leaves_it():
    model = Recast().eval()
    before = copy.deepcopy(model.state_dict())
    gated = GatedActivations(model, find_components(model, kinds=["neuron"], include=["fc"]))
    with refused(ComponentError, "writes into fc.weight"), gated.at(torch.full((5,), 0.5)):
        model(torch.randn(2, 4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_that_would_be_lost_are_refused():
    model = Checkpointed().eval()
    gated = GatedActivations(model, find_components(model, kinds=["neuron"], include=["fc"]))
    gates = torch.ones(5, requires_grad=True)
    with refused(ComponentError, "gradients do not reach fc.weight", "checkpoint"), gated.at(gates):
        model(torch.randn(2, 4, requires_grad=True))


def test_a_compiled_model_is_refused():
    for model in (torch.compile(Pair().eval()), Pair().eval()):
        if isinstance(model, Pair):
            model.forward = torch.compile(model.forward)
        with refused(TaskError, "the model is compiled", "the plain model"):
            coar.Task(model, [1])


def test_memory_shared_by_views_is_shared():
    first, second = nn.Linear(3, 4), nn.Linear(3, 2)
    second.weight = nn.Parameter(first.weight.data[1:3])
    with refused(ComponentError, "0 shares its weight with another module", "1.weight"):
        find_components(nn.Sequential(first, second, nn.Linear(2, 2)), kinds=["neuron"])


def test_a_bias_that_is_no_parameter_is_refused():
    layer = nn.Linear(3, 4, bias=False)
    del layer._parameters["bias"]
    layer.register_buffer("bias", torch.ones(4))
    with refused(ComponentError, "0 has a bias that is not a parameter", "buffer"):
        find_components(nn.Sequential(layer, nn.Linear(4, 2)), kinds=["neuron"])


class TestAgreement:
    def agreement(self, model, x):
        model = model.eval().requires_grad_(False)
        components = find_components(model, kinds=["neuron"], include=["*fc"])
        gated = GatedActivations(model, components)
        before = copy.deepcopy(model.state_dict())
        try:
            require_agreement(gated, components, lambda: model(x).flatten(1).sum(dim=1), len(x))
        finally:
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_holds_for_a_plain_model(self):
        self.agreement(Pair(), torch.randn(5, 4))

    def test_gates_that_no_mode_sees_are_refused(self):
        with refused(ComponentError, "one gate vector", "differ from scaled weights"):
            self.agreement(Scripted(), torch.randn(5, 4))

    def test_examples_that_are_not_first_are_noticed_where_sizes_happen_to_fit(self):
        class TimeFirst(Pair):
            def forward(self, x):
                return self.out(torch.relu(self.fc(x.transpose(0, 1)))).transpose(0, 1)

        with refused(ComponentError, "a gate vector for each example"):
            self.agreement(TimeFirst(), torch.randn(3, 6, 4))


def test_small_outputs_in_another_order_are_noticed():
    def reversed_batch(items):
        return [part.flip(0) for part in default_collate(items)]

    task = experiment_of(Pair(), scale=1e-3).task
    with torch.no_grad():
        for layer in (task.model.fc, task.model.out):
            layer.bias.zero_()
    task = coar.Task(task.model, task.dataset, collate=reversed_batch, device="cpu")
    components = find_components(task.model, kinds=["neuron"], include=["fc"])
    with refused(TaskError, "alone is not what it is in its batch"):
        _ = coar.ComponentAblation(task, components).columns
