"""Baselines from derivatives by gates against their definitions, written out for two small networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import coar
from coar.baselines import (
    attribution_patching,
    integrated_gradients,
    kept_mean,
    leave_one_out,
    uniform_gradient_sampling,
)
from coar.errors import OutputError, SettingError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.gradients import gate_gradients
from coar.gradients.draws import GateDraws
from coar.gradients.passes import GatePasses
from coar.outputs import margin
from coar.task import Task
from coar.testing import SubsetMean, linear_experiment, residual_experiment
from tests import cases, naive
from tests.refused import refused

ONE_PASS = [
    attribution_patching,
    lambda experiment, **more: attribution_patching(experiment, gates=0.9, **more),
    integrated_gradients,
]
SAMPLED = [
    lambda experiment, **more: kept_mean(experiment, 0.1, passes=20, **more),
    lambda experiment, **more: uniform_gradient_sampling(experiment, 0.1, passes=20, **more),
]
names = ["patching", "patching at .9", "integrated", "kept", "sampled"]
everyone = pytest.mark.parametrize("baseline", ONE_PASS + SAMPLED, ids=names)
one_pass = pytest.mark.parametrize("baseline", ONE_PASS, ids=names[:3])


def quiet(baseline, experiment, *more, **options):
    return baseline(experiment, *more, progress=False, **options)


# ----------------------------------------------------------------- gates written out, in float64


def mlp(model, x, gates, rest, placed=True):
    """The MLP of `cases` under gates [examples, 13]; `rest(layer)` is what an ablated unit emits."""
    for layer, own in zip((model.hidden1, model.hidden2), gates.split([7, 6], dim=1), strict=True):
        kept, ablated = layer(x), rest(layer)
        if placed:
            kept, ablated = torch.tanh(kept), torch.tanh(ablated)
        x = ablated + own * (kept - ablated)
        x = x if placed else torch.tanh(x)
    return model.head(x)


def residual(model, x, gates, rest, placed=True):
    """The convolutions of `cases`: behind the ReLU, shortcut included; or on the filters."""
    del rest  # no biases: an ablated filter emits what BatchNorm makes of 0
    first, second = (own[:, :, None, None] for own in gates.split(5, dim=1))
    hidden = gated_filter(model.conv1, model.bn1, x, first, 0.0, placed)
    hidden = gated_filter(model.conv2, model.bn2, hidden, second, hidden, placed)
    return model.head(hidden.mean(dim=(2, 3)))


def gated_filter(conv, norm, x, gates, shortcut, placed):
    z = conv(x)
    if not placed:
        return functional.relu(norm(gates * z) + shortcut)
    kept, ablated = (functional.relu(norm(value) + shortcut) for value in (z, torch.zeros_like(z)))
    return ablated + gates * (kept - ablated)


WRITTEN_OUT = {"mlp": mlp, "residual": residual}
RESTS = {
    ("keep", "zero"): lambda layer: layer.bias,
    ("ablate", "zero"): lambda layer: torch.zeros_like(layer.bias),
    ("keep", 0.7): lambda layer: torch.full_like(layer.bias, 0.7),
}


class WrittenOut:
    """Outputs and derivatives of an experiment, by the code above."""

    def __init__(self, name, experiment, placed=True):
        self.network, self.placed = WRITTEN_OUT[name], placed
        self.rest = RESTS[experiment.bias, experiment.value]
        self.model = copy.deepcopy(experiment.task.model).double()
        self.inputs, self.labels = experiment.task.batch(range(len(experiment.task)))

    def outputs(self, gates):
        logits = self.network(self.model, self.inputs.double(), gates, self.rest, self.placed)
        return margin(lambda _: logits, (self.inputs, self.labels))

    def derivatives(self, gates):
        gates = torch.as_tensor(gates, dtype=torch.float64).clone().requires_grad_()
        return torch.autograd.grad(self.outputs(gates).sum(), gates)[0].numpy()

    def differences(self, gates, step=1e-6):
        """Central differences, [examples, components]: no autograd."""
        found = []
        with torch.no_grad():
            for own in step * torch.eye(gates.shape[1], dtype=torch.float64):
                found.append((self.outputs(gates + own) - self.outputs(gates - own)) / (2 * step))
        return torch.stack(found, dim=1).numpy()


def mlp_experiment(name, output):
    """The MLP of `cases` with another output."""
    task = cases.make_task("mlp")
    other = Task(task.model, task.dataset, {name: output}, device="cpu")
    return ComponentAblation(other, cases.components_of("mlp", task.model))


def level(experiment, value):
    shape = (len(experiment.task), len(experiment.components))
    return torch.full(shape, value, dtype=torch.float64)


# ----------------------------------------------------------------------------- one value for all


@pytest.mark.parametrize("gates", [1.0, 0.9])
@pytest.mark.parametrize(
    ("name", "bias", "value"),
    [("mlp", "keep", "zero"), ("mlp", "ablate", "zero"), ("mlp", "keep", 0.7), ("residual", "keep", "zero")],
)
def test_attribution_patching_is_the_slope_of_gates_behind_the_nonlinearity(name, bias, value, gates):
    experiment = cases.make_case(name).experiment(bias, value)
    found = quiet(attribution_patching, experiment, gates=gates)
    expected = WrittenOut(name, experiment).differences(level(experiment, gates))
    assert found.weights == pytest.approx(expected, abs=2e-5)
    at_the_layer = WrittenOut(name, experiment, placed=False).differences(level(experiment, gates))
    assert np.abs(found.weights - at_the_layer).max() > 0.02


@pytest.mark.parametrize("output", ["one", "many"])
def test_behind_the_nonlinearity_a_linear_read_out_is_patched_exactly(output):
    """A hidden layer and logits: each unit's derivative is all that its deletion changes."""
    experiment = cases.make_case("several_outputs").experiment()
    found = quiet(attribution_patching, experiment, output=output)
    assert found.weights == pytest.approx(naive.leave_one_out(experiment, output), abs=1e-5)


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_integrated_gradients_are_the_midpoint_rule_along_the_diagonal(name):
    experiment = cases.make_case(name).experiment()
    written = WrittenOut(name, experiment)
    expected = np.mean([written.derivatives(level(experiment, t)) for t in (1 / 8, 3 / 8, 5 / 8, 7 / 8)], 0)
    found = quiet(integrated_gradients, experiment, 4)
    assert found.weights == pytest.approx(expected, abs=2e-5)


def test_integrated_gradients_sum_to_the_difference_of_the_ends():
    experiment = mlp_experiment("logit", lambda model, batch: model(batch[0])[:, 0])  # smooth
    ends = np.stack([np.ones(13, bool), np.zeros(13, bool)])
    kept, ablated = experiment.prepare(torch.device("cpu"), precision="float64")(ends)["logit"]
    errors = []
    for steps in (1, 4, 16):
        found = quiet(integrated_gradients, experiment, steps, precision="float64")
        errors.append(np.abs(found.weights.sum(axis=1, dtype=np.float64) - (kept - ablated)).max())
    assert errors[0] > 0.005  # or there was nothing to integrate
    assert errors[1] < errors[0] / 8  # the midpoint rule: 16 times smaller
    assert errors[2] < errors[1] / 8


@pytest.mark.parametrize("gates", [1.0, 0.9])
def test_patching_of_some_examples_is_that_of_all(gates):
    experiment = residual_experiment()
    whole = attribution_patching(experiment, gates=gates, progress=False)
    some = attribution_patching(experiment, gates=gates, examples=[4, 1, 2], batch_size=2, progress=False)
    assert some.columns.names == tuple(whole.columns.names[i] for i in (1, 2, 4))
    np.testing.assert_allclose(some.weights, whole.rows([1, 2, 4]), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(some.intercept, np.asarray(whole.intercept)[[1, 2, 4]], rtol=1e-5, atol=1e-6)


def test_one_step_is_patching_half_way():
    experiment = cases.make_case("grouped").experiment()
    one, half = quiet(integrated_gradients, experiment, 1), quiet(attribution_patching, experiment, gates=0.5)
    np.testing.assert_array_equal(one.weights, half.weights)
    np.testing.assert_array_equal(one.intercept, half.intercept)


@one_pass
@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_the_untouched_output_is_predicted_exactly(baseline, name):
    experiment = cases.make_case(name).experiment()
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    untouched = experiment.prepare(experiment.device)(everything)["margin"]
    assert quiet(baseline, experiment).predict(everything) == pytest.approx(untouched, abs=1e-5)


# -------------------------------------------------------------------------------- the gate law


def by_hand(name, experiment, fraction, rounds, seed, placed, kept):
    """Sums over passes, one after the other; weights and mean outputs."""
    written = WrittenOut(name, experiment, placed)
    draws = GateDraws(fraction, seed, len(experiment.components))
    total = counts = outputs = 0
    for number in range(rounds):
        for gates in draws.round(number % 4, number // 4, np.arange(len(experiment.task))):
            counted = (gates.gates == 1) if kept else gates.probes
            total = total + counted * written.derivatives(gates.gates)
            counts = counts + counted
            outputs = outputs + written.outputs(torch.from_numpy(gates.gates).double()).detach().numpy()
    return total / counts, outputs / (rounds * draws.passes_per_round)


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize("fraction", [0.1, 0.4])
@pytest.mark.parametrize("baseline", [kept_mean, uniform_gradient_sampling])
def test_means_are_those_of_passes_one_by_one(baseline, name, fraction):
    experiment = cases.make_case(name).experiment()
    kept = baseline is kept_mean
    found = quiet(baseline, experiment, fraction, 21, 3)  # 25 passes: five rounds of five
    weights, outputs = by_hand(name, experiment, fraction, 5, 3, placed=kept, kept=kept)
    assert found.provenance["passes"] == 25
    assert found.weights == pytest.approx(weights, abs=2e-5)
    on_average = found.intercept + (1 - fraction) * found.weights.sum(axis=1)
    assert on_average == pytest.approx(outputs, abs=2e-5)


class Product(nn.Module):
    """Sum of products of the units of two layers: affine in each gate, pairwise products in two."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Linear(3, 4, bias=False) for _ in range(2))

    def forward(self, x):
        return (self.left(x) * self.right(x)).sum(dim=1)


def product_experiment(copies):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Product().eval()
    task = Task(model, [torch.ones(3)] * copies, outputs={"product": lambda m, x: m(x)}, device="cpu")
    one = torch.ones(1, 3)
    return ComponentAblation(
        task, coar.find_components(model, kinds=["neuron"], include=["left", "right"])
    ), ((model.left(one) * model.right(one))[0].detach().numpy())


@pytest.mark.parametrize("fraction", [0.1, 0.4])
@pytest.mark.parametrize("baseline", [kept_mean, uniform_gradient_sampling])
def test_of_a_multilinear_model_means_are_right_on_average(baseline, fraction):
    """w_i = (product i) (1 - fraction) in closed form; copies of one example are independent draws."""
    experiment, products = product_experiment(copies=600)
    found = quiet(baseline, experiment, fraction, 25)
    expected = (1 - fraction) * np.concatenate([products, products])
    error = found.weights.std(axis=0) / np.sqrt(600)
    assert error.min() > 0
    assert (np.abs(found.weights.mean(axis=0) - expected) < 4.5 * error).all()
    on_average = found.intercept + (1 - fraction) * found.weights.sum(axis=1)
    spread = on_average.std() / np.sqrt(600)
    assert abs(on_average.mean() - (1 - fraction) ** 2 * products.sum()) < 4.5 * spread


def test_gates_are_those_of_gate_gradients():
    """The same seed and passes: the same mean output, whatever is made of the derivatives."""
    experiment = cases.make_case("mlp").experiment()
    both = [quiet(f, experiment, 0.1, passes=40, seed=5) for f in (kept_mean, gate_gradients)]
    first, second = (found.intercept + 0.9 * found.weights.sum(axis=1) for found in both)
    assert first == pytest.approx(second, abs=1e-5)


def test_seeds_are_other_gates_and_the_same_seed_the_same():
    experiment = cases.make_case("mlp").experiment()
    first, again, other = (quiet(kept_mean, experiment, 0.3, 10, seed).weights for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


# ------------------------------------------------------------------------------------------ all


@everyone
def test_of_a_linear_model_the_true_attributions_are_found(baseline):
    experiment, truth = linear_experiment()
    found = quiet(baseline, experiment)
    assert found.weights == pytest.approx(truth, abs=1e-6)
    if baseline in ONE_PASS:
        assert found.intercept == pytest.approx(np.zeros(len(truth)), abs=1e-6)


@everyone
@pytest.mark.parametrize("output", ["one", "many", "ragged"])
def test_columns_are_those_of_the_output(baseline, output):
    """A hidden layer behind its nonlinearity: within the ablations' reach of leave-one-out."""
    experiment = cases.make_case("several_outputs").experiment()
    found = quiet(baseline, experiment, output=output)
    assert found.columns == experiment.columns[output]
    assert found.components == experiment.components
    close = quiet(leave_one_out, experiment, output=output).weights
    assert np.corrcoef(found.weights.ravel(), close.ravel())[0, 1] > 0.9


@everyone
def test_batches_do_not_matter(baseline):
    experiment = cases.make_case("mlp").experiment()
    whole, small = (quiet(baseline, experiment, precision="float64", batch_size=b) for b in (5, 2))
    np.testing.assert_allclose(small.weights, whole.weights, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(small.intercept, whole.intercept, rtol=1e-5, atol=1e-7)


@everyone
def test_the_model_is_not_touched(baseline):
    experiment = cases.make_case("residual").experiment()
    model = experiment.task.model
    before = model_fingerprint(model)
    quiet(baseline, experiment)
    assert model_fingerprint(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_provenance_says_what_was_spent_and_where_gates_were():
    experiment = cases.make_case("mlp").experiment()
    found = [quiet(f, experiment).provenance for f in ONE_PASS + SAMPLED]
    methods = ["attribution_patching"] * 2
    methods += ["integrated_gradients", "kept_mean", "uniform_gradient_sampling"]
    assert [p["method"] for p in found] == methods
    assert [p["passes"] for p in found] == [1, 1, 20, 20, 20]
    assert [p["forwards"] for p in found] == [3, 4, 61, 60, 60]
    assert [p["ablation_fraction"] for p in found] == [None, 0.1, None, 0.1, 0.1]
    assert [p["seed"] for p in found] == [None, None, None, 0, 0]
    assert [set(p["placements"].values()) for p in found] == [{"after tanh"}] * 4 + [set()]
    several = cases.make_case("several_outputs").experiment()
    found = [quiet(attribution_patching, several, output=o).provenance for o in ("one", "many", "ragged")]
    assert [p["forwards"] for p in found] == [1 + 2 * 1, 1 + 2 * cases.CLASSES, 1 + 2 * 3]  # 15 tokens


# -------------------------------------------------------------------------------------- refused


@everyone
def test_an_output_without_a_gradient_is_refused(baseline):
    experiment = mlp_experiment("blind", lambda model, batch: model(batch[0]).argmax(dim=1).float())
    with refused(OutputError, "'blind' has no gradient", "regression"):
        quiet(baseline, experiment)


@everyone
def test_a_derivative_that_is_not_finite_is_refused(baseline):
    experiment = mlp_experiment("blind", lambda model, batch: (0 * margin(model, batch)).sqrt())
    with refused(OutputError, "not finite: example 0", "hidden1"):
        quiet(baseline, experiment)


@everyone
def test_what_is_no_component_ablation_is_refused(baseline):
    with refused(SettingError, "component ablation", "SubsetMean", "leave_one_out"):
        quiet(baseline, SubsetMean())


@everyone
def test_where_there_are_several_outputs_one_must_be_named(baseline):
    experiment = cases.make_case("several_outputs").experiment()
    with refused(SettingError, "which output?", "one, many, ragged"):
        quiet(baseline, experiment)
    with refused(SettingError, "no such output", "one, many, ragged", "margin"):
        quiet(baseline, experiment, output="margin")


@pytest.mark.parametrize("gates", [0, -0.1, 1.01, float("nan"), True, "1", None])
def test_gates_out_of_range(gates):
    with refused(SettingError, "gates out of range", "at most 1"):
        quiet(attribution_patching, linear_experiment()[0], gates=gates)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "3"])
def test_senseless_steps(steps):
    with refused(SettingError, "steps must be a whole number"):
        quiet(integrated_gradients, linear_experiment()[0], steps)


@pytest.mark.parametrize("baseline", [kept_mean, uniform_gradient_sampling])
def test_senseless_fractions_passes_and_seeds(baseline):
    experiment = linear_experiment()[0]
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with refused(SettingError, "ablation_fraction"):
            quiet(baseline, experiment, fraction, 10)
    for passes in (0, 2.5, "auto", True):
        with refused(SettingError, "passes must be a whole number"):
            quiet(baseline, experiment, 0.1, passes)
    with refused(SettingError, "seed"):
        quiet(baseline, experiment, 0.1, 10, -1)


def test_a_component_that_is_never_kept_is_named():
    with refused(SettingError, "too few passes", "was kept in none", "5 passes", "more passes"):
        quiet(kept_mean, linear_experiment()[0], 0.8, 5)


def test_where_memory_runs_out_batches_are_halved(monkeypatch):
    experiment = cases.make_case("mlp").experiment()
    expected = quiet(kept_mean, experiment, 0.1, 10)
    run, sizes = GatePasses.derivatives, []

    def small_memory(self, batch, gates):
        sizes.append(len(gates.gates))
        if len(gates.gates) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return run(self, batch, gates)

    monkeypatch.setattr(GatePasses, "derivatives", small_memory)
    found = quiet(kept_mean, experiment, 0.1, 10)
    assert sizes[0] == 5
    assert found.weights == pytest.approx(expected.weights, abs=1e-6)
