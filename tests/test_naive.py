"""The references themselves, on numbers worked out by hand."""

import numpy as np
import pytest
import torch

from coar.testing import linear_experiment
from tests import naive
from tests.cases import make_case

# Output 1 + 2 a - 3 b, on all four masks of two components.
MASKS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
OUTPUTS = np.array([[1.0], [3.0], [-2.0], [0.0]])


def test_least_squares_recovers_a_linear_function():
    weights, intercept = naive.least_squares(MASKS, OUTPUTS)
    np.testing.assert_allclose(weights, [[2.0, -3.0]], atol=1e-12)
    np.testing.assert_allclose(intercept, [1.0], atol=1e-12)


def test_ridge_shrinks_orthogonal_masks_by_one_over_one_plus_penalty():
    # Standardised masks of this design are orthonormal, so each weight is divided by 1 + penalty.
    weights, intercept = naive.ridge(MASKS, OUTPUTS, penalty=3.0)
    np.testing.assert_allclose(weights, [[0.5, -0.75]])
    np.testing.assert_allclose(intercept, [0.5 - 0.5 / 2 + 0.75 / 2])  # through the mean output, 0.5


def test_a_row_that_lies_on_the_line_of_the_others_has_no_error():
    errors = naive.leave_one_row_out_errors(MASKS, OUTPUTS, penalty=0.0)
    np.testing.assert_allclose(errors, np.zeros((4, 1)), atol=1e-12)


def test_an_infinite_penalty_predicts_a_row_by_the_mean_of_the_others():
    errors = naive.leave_one_row_out_errors(MASKS, OUTPUTS, penalty=1e12)
    expected = [[1 - 1 / 3], [3 - -1 / 3], [-2 - 4 / 3], [0 - 2 / 3]]
    np.testing.assert_allclose(errors, expected, rtol=1e-9)


def test_the_effect_of_a_linear_component_is_its_term():
    experiment, weights = linear_experiment(num_components=5, num_examples=3)
    np.testing.assert_allclose(naive.leave_one_out(experiment, "score"), weights, atol=1e-6)
    np.testing.assert_allclose(naive.gradient_x_parameter(experiment, "score"), weights, atol=1e-6)


def test_margins_are_taken_against_the_best_other_class():
    assert naive.margins(torch.tensor([[1.0, 4.0, 2.0], [5.0, 4.0, 2.0]]), torch.tensor([2, 0])) == [-2, 1]


def test_welch_t_of_means_2_and_5():
    # means 2 and 5, population variances 1 and 4, two entries each: -3 / sqrt(1/2 + 4/2)
    assert naive.welch_t([[1.0], [3.0]], [[3.0], [7.0]]) == [pytest.approx(-3 / 2.5**0.5)]


def test_a_component_of_two_inputs_is_zeroed_whole_and_alone():
    case = make_case("slices")
    rebuilt = naive.ablated(case.task.model, case.components, [True, False, True])
    expected = case.task.model.hidden2.weight.detach().clone()
    expected[:, 3:5] = 0.0  # offset 1, width 2, second component
    assert torch.equal(rebuilt.hidden2.weight, expected)


def test_gates_of_zero_on_activations_equal_a_rebuild():
    case = make_case("mlp")
    gates = np.ones(len(case.components))
    gates[[1, 9]] = 0
    gated = naive.outputs_of(case.task, naive.gated(case.task.model, case.components, gates))
    rebuilt = naive.outputs_of(case.task, naive.ablated(case.task.model, case.components, gates))
    np.testing.assert_allclose(gated["margin"], rebuilt["margin"], atol=1e-6)
