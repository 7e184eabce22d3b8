"""The dual form: the same answer as the direct one, to rounding, from a matrix of rows x rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge

import coar
from coar.errors import FitError
from coar.regression import dual
from coar.regression.dual import directions, kernel
from coar.regression.problem import PackedMasks, Problem
from coar.regression.ridge import Ridge
from coar.regression.statistics import MaskCounts
from tests import naive

COLUMNS, CPU = 5, torch.device("cpu")
GRID = (1e-2, 0.1, 1.0, 10.0, 100.0)


def bernoulli(rows, components, seed=0):
    return np.random.default_rng(seed).random((rows, components)) < 0.8


def one_size(rows, components):
    masks = np.ones((rows, components), dtype=bool)
    for row, mask in enumerate(masks):
        mask[np.random.default_rng(row).permutation(components)[: components // 5]] = False
    return masks


def with_constants(rows, components):
    masks = bernoulli(rows, components)
    masks[:, 3:20], masks[:, 40] = True, False
    return masks


DESIGNS = {
    "wide": bernoulli(40, 301),
    "hardly wide": bernoulli(90, 96),
    "tall": bernoulli(200, 30),
    "sets of one size": one_size(50, 200),
    "some never vary": with_constants(50, 200),
}


def outputs_of(masks):
    """Linear in the masks, with noise between 0 and five times the signal, far away from 0."""
    rng = np.random.default_rng(1)
    signal = masks @ rng.normal(size=(masks.shape[1], COLUMNS))
    noise = signal.std() * np.linspace(0.05, 5.0, COLUMNS) * rng.normal(size=signal.shape)
    return (signal + noise + 30.0).astype(np.float32)


def fit(masks, outputs, penalties=GRID, algorithm="dual", **settings):
    fitter = Ridge(penalties=penalties, algorithm=algorithm, **settings).prepare(
        Problem.from_arrays(masks, outputs)
    )
    return fitter.fit(slice(0, outputs.shape[1]))


def pack(masks):
    packed = PackedMasks(np.packbits(masks, axis=1, bitorder="little"), masks.shape[1])
    return packed, MaskCounts(len(masks), masks.sum(axis=0))


@pytest.mark.parametrize("masks", DESIGNS.values(), ids=DESIGNS)
class TestFit:
    def test_is_the_direct_one_choice_and_standard_errors_included(self, masks):
        outputs = outputs_of(masks)
        found, direct = fit(masks, outputs), fit(masks, outputs, algorithm="eigen")
        assert len(set(direct.details["penalty"])) > 1
        np.testing.assert_array_equal(found.details["penalty"], direct.details["penalty"])
        for figure in ("score", "r2"):
            np.testing.assert_allclose(found.details[figure], direct.details[figure], rtol=1e-8)
        for name in ("weights", "intercept", "errors"):
            expected = getattr(direct, name)
            scale = np.abs(expected[np.isfinite(expected)]).max()
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-8, atol=1e-8 * scale)

    def test_is_that_of_its_normal_equations(self, masks):
        outputs = outputs_of(masks)
        found = fit(masks, outputs, 0.05, errors=False)
        weights, intercept = naive.ridge(masks, outputs, 0.05)
        atol = 1e-6 * np.abs(weights).max()
        np.testing.assert_allclose(found.weights, weights, atol=atol)
        np.testing.assert_allclose(found.intercept, intercept, atol=atol * masks.shape[1])
        assert found.errors is None

    def test_is_that_of_scikit_learn(self, masks):
        outputs = outputs_of(masks)
        standard, scale = naive.standardised(masks)
        peer = KernelRidge(alpha=0.05 * len(masks)).fit(standard, outputs - outputs.mean(axis=0))
        weights = (standard.T @ peer.dual_coef_).T / scale
        found = fit(masks, outputs, 0.05)
        np.testing.assert_allclose(found.weights, weights, atol=1e-5 * np.abs(weights).max())


class TestDirections:
    @pytest.mark.parametrize("masks", DESIGNS.values(), ids=DESIGNS)
    def test_are_those_of_the_correlation_matrix(self, masks):
        values, vectors = directions(*pack(masks), CPU)
        standard, _ = naive.standardised(masks)
        matrix = standard.T @ standard / len(masks)
        all_values = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(values[::-1], all_values[: len(values)], rtol=1e-9)
        np.testing.assert_allclose(all_values[len(values) :], 0.0, atol=1e-10)
        np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e-10)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(values)), atol=1e-8)

    @given(rows=st.integers(2, 20), components=st.integers(1, 40), seed=st.integers(0, 99))
    def test_the_kernel_is_that_of_standardised_masks(self, rows, components, seed):
        masks = bernoulli(rows, components, seed)
        standard, _ = naive.standardised(masks)
        found = kernel(*pack(masks), CPU)
        np.testing.assert_allclose(found, standard @ standard.T / rows, atol=1e-12 * components)

    def test_do_not_depend_on_how_much_is_unpacked_at_a_time(self, monkeypatch):
        whole = kernel(*pack(DESIGNS["wide"]), CPU), directions(*pack(DESIGNS["wide"]), CPU)
        monkeypatch.setattr(dual, "_COMPONENTS", 8)
        np.testing.assert_array_equal(kernel(*pack(DESIGNS["wide"]), CPU), whole[0])
        values, vectors = directions(*pack(DESIGNS["wide"]), CPU)
        np.testing.assert_array_equal(values, whole[1][0])
        np.testing.assert_allclose(vectors, whole[1][1], atol=1e-14)


class TestBadInput:
    @pytest.mark.parametrize("name", ["wide", "hardly wide", "sets of one size"])
    def test_no_penalty_where_the_masks_do_not_determine_every_weight_is_refused(self, name):
        masks = DESIGNS[name]
        with pytest.raises(FitError, match="penalty of 0") as error:
            fit(masks, outputs_of(masks), (0.0, 1.0))
        assert f"{len(masks)} rows" in error.value.got

    def test_no_penalty_where_they_do_is_least_squares(self):
        masks = DESIGNS["tall"]
        outputs = outputs_of(masks)
        found = fit(masks, outputs, 0.0)
        np.testing.assert_allclose(found.weights, naive.least_squares(masks, outputs)[0], atol=1e-5)

    def test_components_that_never_vary_get_no_weight_and_infinite_errors(self):
        masks = DESIGNS["some never vary"]
        found = fit(masks, outputs_of(masks))
        constant = masks.all(axis=0) | ~masks.any(axis=0)
        assert constant.sum() == 18
        assert not found.weights[:, constant].any()
        assert np.isinf(found.errors[:, constant]).all()
        assert np.isfinite(found.errors[:, ~constant]).all()

    def test_masks_that_never_vary_at_all_leave_the_mean(self):
        found = fit(np.ones((10, 30), dtype=bool), outputs_of(DESIGNS["wide"])[:10], 0.1)
        assert not found.weights.any()
        assert np.isinf(found.errors).all()

    def test_a_column_without_variance_is_predicted_by_its_mean(self):
        outputs = outputs_of(DESIGNS["wide"])
        outputs[:, 2] = 7.25
        found = fit(DESIGNS["wide"], outputs)
        assert not found.weights[2].any()
        assert found.intercept[2] == 7.25
        assert found.details["r2"][2] == 0


@pytest.mark.filterwarnings("ignore::coar.errors.CoarWarning")
def test_few_rows_of_a_study_are_fitted_in_the_dual_form(tmp_path):
    from coar.testing import SubsetMean

    experiment = SubsetMean(num_points=60)
    design = coar.Bernoulli(ablation_fraction=0.3, seed=2)
    study = coar.Study.create(tmp_path / "s", experiment, design, 20, rows_per_shard=7)
    study.run(progress=False)
    found, direct = coar.fit(study), coar.fit(study, Ridge(algorithm="eigen"))
    assert found.provenance["notes"]["algorithm"] == "dual"
    assert "20 rows" in found.provenance["notes"]["why"]
    np.testing.assert_allclose(found.weights, direct.weights, atol=1e-6 * np.abs(direct.weights).max())
