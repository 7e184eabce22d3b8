"""Leave-one-out and gradient x parameter against their definitions."""

from __future__ import annotations

import copy
import tracemalloc

import numpy as np
import pytest
import torch

from coar.baselines import gradient_x_parameter, leave_one_out
from coar.discovery import find_components
from coar.errors import ExecutorError, OutputError, SettingError, TaskError
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.gates import ScaledWeights
from coar.outputs import margin
from coar.task import Task
from coar.testing import SubsetMean, linear_experiment
from tests import cases, naive
from tests.refused import refused

NETWORKS = ("residual", "mlp", "grouped", "slices")


class NoExecutor:
    """Refuses to run anything."""

    def run(self, session, items):
        raise ExecutorError("something was run again", got=(session, items))


def quiet(baseline, experiment, **more):
    return baseline(experiment, progress=False, **more)


# ---------------------------------------------------------------------------------- leave-one-out


@pytest.mark.parametrize("name", NETWORKS)
def test_leave_one_out_is_literal_deletion(name):
    experiment = cases.make_case(name).experiment()
    found = quiet(leave_one_out, experiment)
    assert found.weights == pytest.approx(naive.leave_one_out(experiment, "margin"), abs=1e-5)


@pytest.mark.parametrize("output", ["one", "many", "ragged"])
def test_leave_one_out_of_several_columns_per_example(output):
    experiment = cases.make_case("several_outputs").experiment()
    found = quiet(leave_one_out, experiment, output=output)
    assert found.columns == experiment.columns[output]
    assert found.weights == pytest.approx(naive.leave_one_out(experiment, output), abs=1e-5)


def test_leave_one_out_of_data_points():
    experiment = SubsetMean(num_points=5, num_features=2)
    values = experiment.values
    without = [np.delete(values, i, axis=0).mean(axis=0) for i in range(5)]
    expected = values.mean(axis=0) - without
    found = quiet(leave_one_out, experiment)
    assert found.weights.transpose() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("experiment", [SubsetMean(), linear_experiment()[0]], ids=repr)
def test_a_study_directory_changes_no_number(experiment, tmp_path):
    in_memory = quiet(leave_one_out, experiment)
    on_disk = quiet(leave_one_out, experiment, directory=tmp_path / "loo")
    assert np.array_equal(in_memory.weights, on_disk.weights)
    assert np.array_equal(in_memory.intercept, on_disk.intercept)
    assert in_memory.provenance == on_disk.provenance


def test_what_is_in_the_directory_is_not_run_again(tmp_path):
    experiment, truth = linear_experiment()
    quiet(leave_one_out, experiment, directory=tmp_path / "loo")
    again = quiet(leave_one_out, experiment, directory=tmp_path / "loo", executor=NoExecutor())
    assert again.weights == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("baseline", [leave_one_out, gradient_x_parameter])
def test_the_untouched_output_is_predicted_exactly(baseline):
    experiment = cases.make_case("residual").experiment()
    everything = np.ones((1, len(experiment.components)), dtype=bool)
    untouched = experiment.prepare(experiment.device)(everything)["margin"]
    assert quiet(baseline, experiment).predict(everything) == pytest.approx(untouched, abs=1e-5)


# --------------------------------------------------------------------------- gradient x parameter


@pytest.mark.parametrize("baseline", [leave_one_out, gradient_x_parameter])
def test_of_a_linear_model_the_true_attributions_are_found(baseline):
    experiment, truth = linear_experiment()
    found = quiet(baseline, experiment)
    assert found.weights == pytest.approx(truth, abs=1e-6)
    assert found.intercept == pytest.approx(np.zeros(len(truth)), abs=1e-6)


@pytest.mark.parametrize("bias", ["keep", "ablate"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_x_parameter_is_its_definition(name, bias):
    experiment = cases.make_case(name).experiment(bias)
    expected = naive.gradient_x_parameter(experiment, "margin")
    assert quiet(gradient_x_parameter, experiment).weights == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("output", ["one", "many", "ragged"])
def test_gradient_x_parameter_of_several_columns_per_example(output):
    experiment = cases.make_case("several_outputs").experiment()
    found = quiet(gradient_x_parameter, experiment, output=output)
    expected = naive.gradient_x_parameter(experiment, output)
    assert found.weights.shape == (len(experiment.columns[output]), len(experiment.components))
    assert found.weights == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bias", ["keep", "ablate"])
@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_gradient_x_parameter_is_the_slope_of_the_gate_at_one(name, bias):
    experiment = cases.make_case(name).experiment(bias)
    found = quiet(gradient_x_parameter, experiment)
    assert found.weights == pytest.approx(slope_of_gates_at_one(experiment), abs=1e-4)


def slope_of_gates_at_one(experiment, step=1e-6):
    """Central differences in float64, [columns, components]."""
    task, count = experiment.task, len(experiment.components)
    inputs, labels = task.batch(range(len(task)))
    gated = ScaledWeights(
        copy.deepcopy(task.model).double(), experiment.component_set, experiment.bias, experiment.value
    )

    def outputs(gates):
        gated.set(gates)
        return margin(gated.model, (inputs.double(), labels)).detach().numpy()

    steps = step * np.eye(count)
    return np.stack([(outputs(1 + s) - outputs(1 - s)) / (2 * step) for s in steps], axis=1)


def test_gradient_x_parameter_keeps_no_second_array_of_weights():
    """Of 1,000 columns of 400 components, counted as NumPy asks for it."""
    hidden = torch.nn.Linear(4, 400)
    model = torch.nn.Sequential(hidden, torch.nn.ReLU(), torch.nn.Linear(400, 2)).eval()
    dataset = list(torch.randn(500, 4))
    task = Task(model, dataset, outputs={"both": lambda model, batch: model(batch)}, device="cpu")
    experiment = ComponentAblation(task, find_components(model, kinds=["neuron"]))
    tracemalloc.start()
    try:
        found = quiet(gradient_x_parameter, experiment)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.weights.shape == (1000, 400)
    assert found.weights.dtype == np.float32
    assert peak < 1.6 * found.weights.nbytes


def test_the_bias_counts_only_where_it_is_ablated():
    """Of a Linear with a bias the two conventions must differ, else the tests above prove little."""
    keep, ablate = (
        quiet(gradient_x_parameter, cases.make_case("mlp").experiment(bias)).weights
        for bias in ("keep", "ablate")
    )
    assert np.abs(keep - ablate).max() > 0.01


def test_a_model_in_float64_is_read_in_float32_like_the_rows():
    task = cases.make_task("mlp")
    double = Task(copy.deepcopy(task.model).double(), task.dataset, task.outputs, device="cpu")
    components = cases.components_of("mlp", task.model)
    found = quiet(gradient_x_parameter, ComponentAblation(double, components))
    expected = quiet(gradient_x_parameter, ComponentAblation(task, components))
    assert found.weights == pytest.approx(expected.weights, abs=1e-6)


def constant(model, batch):
    return model(batch[0]).argmax(dim=1).float()


def without_grad(model, batch):
    with torch.no_grad():
        return margin(model, batch)


@pytest.mark.parametrize("output", [constant, without_grad])
def test_an_output_without_a_gradient_is_refused(output):
    task = cases.make_task("mlp")
    blind = Task(task.model, task.dataset, {"blind": output}, device="cpu")
    experiment = ComponentAblation(blind, cases.components_of("mlp", task.model))
    with refused(OutputError, "'blind' has no gradient", "differentiable", "leave_one_out"):
        quiet(gradient_x_parameter, experiment)


# ------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("baseline", [leave_one_out, gradient_x_parameter])
def test_where_there_are_several_outputs_one_must_be_named(baseline):
    experiment = cases.make_case("several_outputs").experiment()
    with refused(SettingError, "which output?", "one, many, ragged"):
        quiet(baseline, experiment)
    with refused(SettingError, "no such output", "one, many, ragged", "margin"):
        quiet(baseline, experiment, output="margin")


@pytest.mark.parametrize("baseline", [leave_one_out, gradient_x_parameter])
def test_the_model_is_not_touched(baseline):
    experiment = cases.make_case("residual").experiment("ablate")
    model = experiment.task.model
    before = model_fingerprint(model)
    quiet(baseline, experiment)
    assert model_fingerprint(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training or module._forward_hooks for module in model.modules())


def test_a_model_that_changed_or_is_in_train_mode_is_refused():
    experiment, _ = linear_experiment()
    experiment.task.model.train()
    with refused(TaskError, "train mode"):
        gradient_x_parameter(experiment, progress=False)
    experiment.task.model.eval().hidden.weight.data.mul_(3)
    with refused(TaskError, "has changed"):
        gradient_x_parameter(experiment, progress=False)


def test_a_constant_in_place_of_zero_is_refused():
    experiment, _ = linear_experiment()
    constant = ComponentAblation(experiment.task, experiment.component_set, value=1.0)
    with refused(SettingError, "scales to zero", "leave_one_out"):
        gradient_x_parameter(constant, progress=False)
