"""LASSO: scikit-learn's solutions by both algorithms, certified; the choice of a penalty; refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet, lasso_path

import coar
from coar.errors import CoarWarning, FitError, MissingDependencyError, SettingError
from coar.regression import coordinate_descent, fista
from coar.regression.collection import is_held_out
from coar.regression.lasso import Lasso
from coar.regression.problem import Problem
from coar.testing import SubsetMean

BOTH = pytest.mark.parametrize("algorithm", ["coordinate_descent", "fista"])


def rows_of(rows=600, components=40, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    masks = rng.random((rows, components)) < 0.85
    weights = rng.normal(size=(components, columns)) * (rng.random((components, columns)) < 0.3)
    return masks, (masks @ weights + 3 + rng.normal(size=(rows, columns))).astype(np.float32)


def fit(masks, outputs, **options):
    problem = Problem.from_arrays(masks, outputs)
    return Lasso(**options).prepare(problem).fit(slice(0, outputs.shape[1]))


def standardised(masks):
    return (masks - masks.mean(axis=0)) / masks.std(axis=0)


def peer(masks, outputs, penalty, l1_ratio=1.0):
    """scikit-learn, in mask units: weights [columns, components], intercepts."""
    weights = np.stack(
        [
            ElasticNet(alpha=a, l1_ratio=l1_ratio, tol=1e-10, max_iter=1_000_000)
            .fit(standardised(masks), outputs[:, column].astype(np.float64))
            .coef_
            for column, a in enumerate(np.broadcast_to(penalty, outputs.shape[1]))
        ]
    )
    weights = weights / masks.std(axis=0)
    return weights, outputs.mean(axis=0, dtype=np.float64) - weights @ masks.mean(axis=0)


def violation(masks, outputs, weights, penalty, l1_ratio=1.0):
    """Of the optimality conditions, from the definition, relative to penalty_max; [columns]."""
    x, y = standardised(masks), outputs - outputs.mean(axis=0, dtype=np.float64)
    w = (weights.astype(np.float64) * masks.std(axis=0)).T
    gradient = x.T @ (y - x @ w) / len(x) - penalty * (1 - l1_ratio) * w
    worst = np.where(
        w == 0, np.abs(gradient) - penalty * l1_ratio, np.abs(gradient - penalty * l1_ratio * np.sign(w))
    )
    return worst.max(axis=0).clip(0) / (np.abs(x.T @ y / len(x)).max(axis=0) / l1_ratio)


@BOTH
@pytest.mark.parametrize("l1_ratio", [1.0, 0.4])
@pytest.mark.parametrize("penalty", [0.003, 0.03, 0.2])
def test_one_penalty_is_scikit_learn(algorithm, l1_ratio, penalty):
    masks, outputs = rows_of()
    found = fit(
        masks, outputs, penalties=penalty, l1_ratio=l1_ratio, algorithm=algorithm, refit_tolerance=1e-6
    )
    weights, intercept = peer(masks, outputs, penalty, l1_ratio)
    np.testing.assert_allclose(found.weights, weights, atol=2e-5)
    np.testing.assert_allclose(found.intercept, intercept, atol=2e-4)
    np.testing.assert_array_equal((found.weights != 0).sum(axis=1), found.details["nonzeros"])
    residual = outputs - masks @ found.weights.T - found.intercept
    np.testing.assert_allclose(found.details["r2"], 1 - residual.var(axis=0) / outputs.var(axis=0), atol=1e-5)
    assert found.errors is None


@BOTH
@pytest.mark.parametrize("rows", [60, 600], ids=["fewer rows than components", "more"])
def test_the_certificate_is_true(algorithm, rows):
    masks, outputs = rows_of(rows, components=80)
    for l1_ratio in (1.0, 0.5):
        found = fit(masks, outputs, penalties=0.05, l1_ratio=l1_ratio, algorithm=algorithm)
        true = violation(masks, outputs, found.weights, 0.05, l1_ratio)
        assert (true < 1.2e-5).all()
        np.testing.assert_allclose(found.details["kkt"], true, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.floats(0.001, 0.5), st.floats(0.05, 1.0))
def test_both_algorithms_certify_the_same_solution(seed, components, penalty, l1_ratio):
    masks, outputs = rows_of(120, components, 3, seed)
    masks[0], masks[1] = False, True  # no component is constant
    options = {"penalties": penalty, "l1_ratio": l1_ratio, "refit_tolerance": 1e-6}
    found = [fit(masks, outputs, algorithm=a, **options) for a in ("coordinate_descent", "fista")]
    for one in found:
        assert (violation(masks, outputs, one.weights, penalty, l1_ratio) < 1e-5).all()
    np.testing.assert_allclose(found[0].weights, found[1].weights, atol=1e-3)


@BOTH
def test_path_choice_and_refit_are_those_of_scikit_learn_and_numpy(algorithm):
    masks, outputs = rows_of()
    away = is_held_out(np.arange(len(masks)), 10)
    train, rest = masks[~away], masks[away]
    scaled = (rest - train.mean(axis=0)) / train.std(axis=0)
    options = {"num_penalties": 30, "patience": None, "tolerance": 1e-5, "algorithm": algorithm}
    found = fit(masks, outputs, **options)
    chosen = np.empty(6)
    for column in range(6):
        centre = outputs[~away, column].mean(dtype=np.float64)
        y = outputs[~away, column].astype(np.float64) - centre
        x = standardised(train)
        penalties = np.geomspace(1.0, 1e-3, 30) * np.abs(x.T @ y / len(x)).max()
        _, path, _ = lasso_path(x, y, alphas=penalties, tol=1e-9, max_iter=100_000)
        errors = ((outputs[away, column][:, None] - centre - scaled @ path) ** 2).mean(axis=0)
        chosen[column] = penalties[np.argmin(errors)]
        np.testing.assert_allclose(found.details["held_out_error"][column], errors.min(), rtol=1e-3)
    np.testing.assert_allclose(found.details["penalty"], chosen, rtol=1e-5)
    weights, _ = peer(masks, outputs, chosen)
    np.testing.assert_allclose(found.weights, weights, atol=1e-4)


def test_patience_saves_sweeps_and_finds_the_same_first_minimum():
    masks, outputs = rows_of()
    patient, hasty = fit(masks, outputs, patience=None), fit(masks, outputs, patience=2)
    assert (hasty.details["held_out_error"] >= patient.details["held_out_error"] - 1e-9).all()
    np.testing.assert_allclose(hasty.weights, patient.weights, atol=1e-3)


def test_columns_do_not_know_of_each_other():
    masks, outputs = rows_of(columns=40)
    exact = {"refit_tolerance": 1e-6}  # solutions agree as far as they are solved
    together = fit(masks, outputs, **exact)
    order = np.random.default_rng(0).permutation(40)
    shuffled = fit(masks, outputs[:, order], **exact)
    np.testing.assert_allclose(shuffled.weights, together.weights[order], atol=5e-6)
    np.testing.assert_allclose(shuffled.details["penalty"], together.details["penalty"][order], rtol=1e-6)
    alone = [fit(masks, outputs[:, [k]], **exact) for k in range(3)]
    for k, one in enumerate(alone):
        np.testing.assert_allclose(one.weights[0], together.weights[k], atol=5e-6)


def test_threads_do_not_matter():
    import torch

    masks, outputs = rows_of(columns=70)
    one = fit(masks, outputs)
    try:
        torch.set_num_threads(2)
        np.testing.assert_array_equal(fit(masks, outputs).weights, one.weights)
    finally:
        torch.set_num_threads(1)


@BOTH
def test_the_second_residual_is_kept_up_to_date(algorithm):
    masks, outputs = rows_of(500, 30, 20)
    problem = Problem.from_arrays(masks, outputs, held_out=5)
    train, held = problem.masks("train"), problem.masks("held_out")
    gram, second = train.correlation(np.float32), held.covariance(train.deviation, np.float32)
    c = problem.outputs(slice(0, 20), "train").covariance(train).T.astype(np.float32).copy()
    d = (
        problem.outputs(slice(0, 20), "held_out")
        .covariance(held, train.deviation)
        .T.astype(np.float32)
        .copy()
    )
    weights, residual, other = np.zeros_like(c), c.copy(), d.copy()
    per_column = [np.full(20, value, np.float32) for value in (0.05, 0.01, 1e-6)]
    solve = coordinate_descent.descend if algorithm == "coordinate_descent" else fista.minimise
    chosen = np.array([3, 4, 11, 19])
    solve(gram, weights, residual, *per_column, 10_000, second=(second, other), chosen=chosen)
    assert (weights[chosen] != 0).any(axis=1).all()
    assert not np.delete(weights, chosen, axis=0).any()
    np.testing.assert_allclose(residual, c - weights @ gram, atol=1e-5)
    np.testing.assert_allclose(other, d - weights @ second, atol=1e-5)


@BOTH
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_loose_solutions_are_as_good_as_they_say(algorithm, tolerance):
    """Along a path, from warm starts: nothing is violated by more than the tolerance."""
    import torch

    problem = Problem.from_arrays(*rows_of(500, 60, 80))
    masks = problem.masks()
    gram = masks.correlation(np.float32)
    residual = problem.outputs(slice(0, 80)).covariance(masks).T.astype(np.float32).copy()
    weights, largest = np.zeros_like(residual), np.abs(residual).max(axis=1)
    solve = coordinate_descent.descend if algorithm == "coordinate_descent" else fista.minimise
    for share in np.geomspace(1, 1e-3, 12, dtype=np.float32):
        per_column = largest * share, 0 * largest, largest * np.float32(tolerance)
        solve(gram, weights, residual, *per_column, 1_000)
        arrays = (torch.from_numpy(a) for a in (residual, weights))
        l1, l2 = (torch.from_numpy(a)[:, None] for a in per_column[:2])
        found = fista.violation(*arrays, l1, l2)[:, 0].numpy()
        assert (found <= 1.01 * per_column[2]).all()


def test_a_small_weight_of_the_wrong_sign_is_changed():
    """It moves by less than the tolerance, and yet violates the conditions by twice the penalty."""
    one = np.ones(1, np.float32)
    weights = np.full((1, 1), 0.0025, np.float32)
    residual = np.full((1, 1), -1.005, np.float32) - weights
    coordinate_descent.descend(np.eye(1, dtype=np.float32), weights, residual, one, 0 * one, 0.01 * one, 10)
    assert weights[0, 0] == pytest.approx(-0.005)


@BOTH
@pytest.mark.filterwarnings("ignore:.*components were kept:coar.errors.CoarWarning")
def test_constant_components_and_constant_columns_get_nothing(algorithm):
    masks, outputs = rows_of()
    masks[:, 4], masks[:, 9], outputs[:, 2] = True, False, 1.5
    for options in ({"penalties": 0.02}, {}):
        found = fit(masks, outputs, algorithm=algorithm, **options)
        assert not found.weights[:, [4, 9]].any()
        assert not found.weights[2].any()
        assert found.intercept[2] == pytest.approx(1.5)
        assert all(np.isfinite(value).all() for value in found.details.values())
        others = np.delete(np.arange(40), [4, 9])
        if options:
            weights, _ = peer(masks[:, others], outputs, 0.02)
            np.testing.assert_allclose(found.weights[:, others], weights, atol=1e-4)


@BOTH
def test_the_cap_is_warned_of_with_the_worst(algorithm):
    masks, outputs = rows_of(300, 200)
    with pytest.warns(CoarWarning, match=r"of 6 columns do not meet .* raise max_sweeps"):
        fit(masks, outputs, penalties=0.001, max_sweeps=1, algorithm=algorithm, refit_tolerance=1e-7)


def test_from_a_study_by_blocks(tmp_path, monkeypatch):
    study = coar.Study.create(tmp_path / "s", SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 400)
    study.run(progress=False)
    whole = coar.fit(study, Lasso())
    assert whole.provenance["method"] == "lasso"
    assert whole.provenance["notes"]["algorithm"] == "coordinate_descent"
    assert whole.errors is None
    monkeypatch.setattr("coar.regression.problem.BLOCK_COLUMN_BYTES", 0)
    monkeypatch.setattr("coar.regression.problem.COLUMN_SHARE", 2.5 * 8 * 15 / 2**30)
    saved = coar.fit(study, Lasso(), save_as="blocks", memory="1 GiB")
    assert len(saved.ranges) > 1
    np.testing.assert_allclose(saved.weights, whole.weights, atol=1e-6)


def test_too_little_memory_says_how_much_is_needed():
    masks, outputs = rows_of()
    problem = Problem.from_arrays(masks, outputs, budget=10_000)
    with pytest.raises(FitError, match="do not fit") as error:
        Lasso().prepare(problem)
    assert "Ridge" in error.value.todo


def test_without_numba_it_is_fista(monkeypatch):
    monkeypatch.setattr("coar.regression.lasso.available", lambda: False)
    problem = Problem.from_arrays(*rows_of())
    assert Lasso().prepare(problem).notes == {"algorithm": "fista", "why": "numba is not installed"}
    with pytest.raises(MissingDependencyError, match="numba"):
        Lasso(algorithm="coordinate_descent").prepare(problem)


def test_too_few_rows_to_hold_some_out_are_refused():
    masks, outputs = rows_of(8)
    with pytest.raises(FitError, match="too few rows"):
        fit(masks, outputs)
    assert fit(masks, outputs, penalties=0.5).weights.shape == (6, 40)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("penalties", value)
            for value in (0.0, -1.0, (), (0.1, -0.1), float("nan"), float("inf"), "0.1", True)
        ),
        *(("l1_ratio", value) for value in (0.0, 1.1)),
        *(("smallest", value) for value in (0.0, 1.0)),
        ("num_penalties", 1),
        ("held_out", 1),
        ("patience", 0),
        ("tolerance", 0.0),
        ("algorithm", "simplex"),
    ],
)
def test_senseless_settings_are_refused(key, value):
    with pytest.raises(SettingError, match="not accepted") as error:
        Lasso(**{key: value})
    assert key in str(error.value)


def test_fista_names_numbers_that_are_not_finite():
    gram, one = np.eye(3, dtype=np.float32), np.ones(1, np.float32)
    residual = np.array([[1.0, np.nan, 0.0]], np.float32)
    with pytest.raises(FitError, match="finite"):
        fista.minimise(gram, np.zeros((1, 3), np.float32), residual, one, one, one, 10)


def test_the_largest_eigenvalue_is_that_of_numpy():
    import torch

    x = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    matrix = x.T @ x
    found = fista.largest_eigenvalue(torch.from_numpy(matrix))
    assert found == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=0.02)
