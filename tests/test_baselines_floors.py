"""Floors: random weights have the law that they say, norms are norms, and neither knows the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.baselines import random_attributions, weight_norm
from coar.errors import SettingError, TaskError
from coar.experiments.ablation import ComponentAblation
from coar.task import Task
from coar.testing import SubsetMean, linear_experiment
from tests import cases, naive
from tests.refused import refused


def test_random_weights_are_standard_normal_and_apart():
    experiment = SubsetMean(num_points=400, num_features=50)
    found = random_attributions(experiment)
    weights = found.weights
    assert weights.shape == (50, 400)
    spread = 1 / np.sqrt(weights.size)
    assert abs(weights.mean()) < 4.5 * spread
    assert abs(weights.var() - 1) < 4.5 * np.sqrt(2) * spread
    assert abs((weights**4).mean() - 3) < 4.5 * np.sqrt(96) * spread
    assert abs((np.abs(weights) > 1.959964).mean() - 0.05) < 4.5 * np.sqrt(0.05 * 0.95) * spread
    between = np.corrcoef(weights)[np.triu_indices(50, 1)]
    assert np.abs(between).max() < 6 / np.sqrt(400)
    assert not found.intercept.any()


def test_a_column_depends_on_the_seed_and_its_number_alone():
    few, many = (SubsetMean(num_points=9, num_features=n) for n in (2, 5))
    first, again, more = random_attributions(few), random_attributions(few), random_attributions(many)
    np.testing.assert_array_equal(first.weights, again.weights)
    np.testing.assert_array_equal(first.weights, more.weights[:2])
    assert np.abs(random_attributions(few, seed=1).weights - first.weights).min() > 0


def test_random_weights_predict_nothing():
    experiment = SubsetMean(num_points=40, num_features=30)
    masks = np.random.default_rng(0).random((300, 40)) < 0.5
    outputs = experiment.prepare(experiment.device)(masks)["mean"]
    predicted = random_attributions(experiment).predict(masks)
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(outputs.T, predicted.T, strict=True)]
    # The correlation of one column is about normal with variance 1 / components.
    assert abs(np.mean(found)) < 4.5 / np.sqrt(40 * 30)


@pytest.mark.parametrize("name", ["residual", "mlp", "grouped", "conv1d", "conv3d", "slices"])
def test_norms_are_of_the_entries_that_ablation_sets_to_zero(name):
    experiment = cases.make_case(name).experiment()
    found = weight_norm(experiment)
    expected = []
    for index in range(len(experiment.component_set)):
        group, number = experiment.component_set.locate(index)
        weight = getattr(experiment.task.model.get_submodule(group.module), group.parameter)
        rows = [weight.detach().select(group.dimension, entry) for entry in naive.entries(group, number)]
        expected.append(float(sum((row.double() ** 2).sum() for row in rows)) ** 0.5)
    np.testing.assert_allclose(found.weights, np.tile(expected, (5, 1)), rtol=1e-6)
    assert not found.intercept.any()


def test_norms_of_grouped_transposed_filters_are_those_that_ablation_takes_away():
    """Their filters are columns of their group's rows: what is left without one has a smaller norm."""
    model = nn.ConvTranspose2d(4, 6, 3, groups=2).eval()
    nn.init.constant_(model.bias, 3.0)  # does not count
    model.weight.data = cases.random_numbers(4, 3, 3, 3)
    task = Task(model, [cases.random_numbers(4, 3, 3)], {"sum": total}, collate=torch.stack, device="cpu")
    experiment = ComponentAblation(task, coar.find_components(model, kinds=["conv_filter"]))
    weight = model.weight.detach().unflatten(0, (2, 2))  # groups, inputs, filters of the group, ...
    expected = weight.square().sum(dim=(1, 3, 4)).sqrt().flatten()
    np.testing.assert_allclose(weight_norm(experiment).weights[0], expected, rtol=1e-6)


def total(model, batch):
    return model(batch).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("floor", [random_attributions, weight_norm])
def test_floors_are_of_the_output_asked_for_and_say_so(floor):
    experiment = cases.make_case("several_outputs").experiment()
    found = floor(experiment, output="ragged")
    assert (found.columns, found.components) == (experiment.columns["ragged"], experiment.components)
    assert (found.provenance["method"], found.provenance["forwards"]) == (floor.__name__, 0)
    with refused(SettingError, "which output?", "one, many, ragged"):
        floor(experiment)


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_is_a_whole_number(seed):
    with refused(SettingError, "a seed is a whole number", repr(seed)):
        random_attributions(linear_experiment()[0], seed)


def test_norms_need_weights():
    with refused(SettingError, "norms of weights need a component ablation", "SubsetMean"):
        weight_norm(SubsetMean())


def test_norms_are_of_the_model_that_was_measured():
    experiment, _ = linear_experiment()
    experiment.task.model.hidden.weight.data.mul_(3)
    with refused(TaskError, "has changed"):
        weight_norm(experiment)
