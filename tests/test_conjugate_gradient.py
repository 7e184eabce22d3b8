"""Conjugate gradients: the direct solution without its matrix, each column on its own."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge

import coar
from coar.errors import CoarWarning, FitError
from coar.regression import conjugate_gradient, matrix_free
from coar.regression.conjugate_solve import expected_iterations, solve
from coar.regression.matrix_free import Correlation, unpacked
from coar.regression.problem import PackedMasks, Problem
from coar.regression.ridge import Ridge
from coar.regression.statistics import MaskCounts
from tests import naive

COLUMNS = 6


def bernoulli(rows, components, seed=0):
    return np.random.default_rng(seed).random((rows, components)) < 0.8


def one_size(rows, components):
    masks = np.ones((rows, components), dtype=bool)
    for row, mask in enumerate(masks):
        mask[np.random.default_rng(row).permutation(components)[: components // 5]] = False
    return masks


def outputs_of(masks, noise=1.0, seed=1):
    """Linear in the masks, with noise as large as the signal times `noise`, far away from 0."""
    rng = np.random.default_rng(seed)
    signal = masks @ rng.normal(size=(masks.shape[1], COLUMNS))
    return (signal + noise * signal.std() * rng.normal(size=signal.shape) + 30.0).astype(np.float32)


def pack(masks):
    packed = PackedMasks(np.packbits(masks, axis=1, bitorder="little"), masks.shape[1])
    return packed, MaskCounts(len(masks), masks.sum(axis=0))


def fit(masks, outputs, penalties=0.1, **settings):
    solver = Ridge(penalties=penalties, algorithm="conjugate_gradient", **settings)
    problem = Problem.from_arrays(masks, outputs)
    return solver.prepare(problem).fit(slice(0, outputs.shape[1]))


def far(found, expected):
    """Largest distance between columns, relative to the column expected."""
    distance = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return distance.max()


DESIGNS = {
    "tall": bernoulli(700, 60),
    "square": bernoulli(150, 149),
    "wide": bernoulli(80, 203),
    "sets of one size": one_size(300, 40),
}


@pytest.mark.parametrize("masks", DESIGNS.values(), ids=DESIGNS)
class TestSolution:
    @pytest.mark.parametrize("penalty", [0.02, 1.0])
    def test_is_the_direct_one(self, masks, penalty):
        outputs = outputs_of(masks)
        found = fit(masks, outputs, penalty)
        weights, intercept = naive.ridge(masks, outputs, penalty)
        assert far(found.weights, weights) < 1e-4
        scale = np.abs(weights).sum(axis=1).max()  # what the intercept extrapolates by
        np.testing.assert_allclose(found.intercept, intercept, atol=1e-4 * scale)
        assert (found.details["residual"] < 1.1e-5).all()

    def test_is_that_of_scikit_learn(self, masks):
        outputs = outputs_of(masks)
        standard, scale = naive.standardised(masks)
        peer = SklearnRidge(alpha=0.3 * len(masks)).fit(standard, outputs)
        assert far(fit(masks, outputs, 0.3).weights, peer.coef_ / scale) < 1e-4

    def test_says_how_much_it_explains_also_where_it_stopped_early(self, masks):
        outputs = outputs_of(masks)
        found = fit(masks, outputs, 0.1, tolerance=0.2)
        residual = outputs - found.intercept - masks @ found.weights.T
        r2 = 1.0 - (residual**2).mean(axis=0) / outputs.var(axis=0)
        assert found.details["residual"].max() > 0.01
        np.testing.assert_allclose(found.details["r2"], r2, atol=1e-5)


class TestIterations:
    @pytest.mark.parametrize("rows", [150, 450, 3_000])
    @pytest.mark.parametrize("penalty", [0.05, 1.0])
    def test_are_as_few_as_the_law_of_marchenko_and_pastur_allows(self, rows, penalty):
        masks = bernoulli(rows, 300)
        found = fit(masks, outputs_of(masks), penalty, tolerance=1e-4)
        expected = expected_iterations(300, rows, penalty, 1e-4)
        assert found.details["iterations"].max() <= expected
        assert found.details["iterations"].min() >= expected / 3  # the bound says something

    def test_stop_at_the_cap_with_a_warning_that_counts(self):
        masks = DESIGNS["square"]
        outputs = outputs_of(masks)
        outputs[:, 2] = 5.0  # solved by 0
        with pytest.warns(CoarWarning, match=f"{COLUMNS - 1} of {COLUMNS} columns .* after 4 iterations"):
            found = fit(masks, outputs, 1e-3, max_iterations=4)
        assert (np.delete(found.details["iterations"], 2) == 4).all()
        standard, scale = naive.standardised(masks)
        right = standard.T @ (outputs - outputs.mean(axis=0)) / len(masks)
        weights = (found.weights * scale).T
        missing = right - standard.T @ (standard @ weights) / len(masks) - 1e-3 * weights
        residual = np.linalg.norm(missing, axis=0) - found.details["residual"] * np.linalg.norm(right, axis=0)
        np.testing.assert_allclose(residual, 0.0, atol=1e-4)

    @given(size=st.integers(1, 30), seed=st.integers(0, 99), penalty=st.floats(1e-2, 10.0))
    def test_solve_any_positive_matrix(self, size, seed, penalty):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(size, 2 * size + 1))
        matrix = torch.from_numpy(root @ root.T / size)
        right = rng.normal(size=(size, 3))
        found = solve(lambda v: matrix @ v, right, penalty, tolerance=1e-9)
        missing = right - matrix.numpy() @ found.weights - penalty * found.weights
        assert (np.linalg.norm(missing, axis=0) <= 1.01e-9 * np.linalg.norm(right, axis=0)).all()
        np.testing.assert_allclose(found.remainder, missing, atol=1e-12)


class TestColumns:
    masks = DESIGNS["tall"]
    packed, counts = pack(masks)
    penalties = np.array([10.0, 0.01, 1.0, 0.1, 3.0, 0.3])

    def right(self):
        outputs = outputs_of(self.masks)
        standard, _ = naive.standardised(self.masks)
        return standard.T @ (outputs - outputs.mean(axis=0)) / len(self.masks)

    def test_leave_without_a_trace_in_the_others_each_with_its_penalty(self):
        correlation, right = Correlation(self.packed, self.counts), self.right()
        together = solve(correlation, right, self.penalties)
        assert len(set(together.iterations)) > 3  # they leave at different times
        for column, penalty in enumerate(self.penalties):
            alone = solve(correlation, right[:, [column]], penalty)
            assert alone.iterations[0] == together.iterations[column]
            np.testing.assert_allclose(alone.weights[:, 0], together.weights[:, column], rtol=1e-9)

    def test_start_where_they_are_told_to(self):
        correlation, right = Correlation(self.packed, self.counts), self.right()
        cold = solve(correlation, right, self.penalties)
        start = cold.weights.copy()
        warm = solve(correlation, right, self.penalties, tolerance=1.1e-4, start=start)
        assert (warm.iterations == 0).all()
        np.testing.assert_array_equal(warm.weights, start)

    def test_that_never_vary_get_no_weight(self):
        outputs = outputs_of(self.masks)
        outputs[:, 3] = -2.5
        found = fit(self.masks, outputs)
        assert not found.weights[3].any()
        assert found.intercept[3] == -2.5
        assert found.details["r2"][3] == found.details["residual"][3] == 0


class TestPath:
    grid = (0.003, 0.03, 0.3, 3.0, 30.0)

    def test_each_column_takes_the_penalty_that_predicts_held_out_rows_best(self):
        masks = bernoulli(400, 120)
        outputs = np.hstack([outputs_of(masks, noise)[:, :2] for noise in (0.05, 1.0, 5.0)])
        found = fit(masks, outputs, self.grid, held_out=4)
        away = np.arange(len(masks)) % 4 == 3
        errors = []
        for penalty in self.grid:
            weights, intercept = naive.ridge(masks[~away], outputs[~away], penalty)
            errors.append(((outputs[away] - intercept - masks[away] @ weights.T) ** 2).mean(axis=0))
        best = np.array(self.grid)[np.argmin(errors, axis=0)]
        assert len(set(best)) >= 3
        np.testing.assert_array_equal(found.details["penalty"], best)
        np.testing.assert_allclose(found.details["score"], np.min(errors, axis=0), rtol=1e-4)
        for column, penalty in enumerate(best):
            weights, intercept = naive.ridge(masks, outputs[:, [column]], penalty)
            assert far(found.weights[[column]], weights) < 1e-4
            np.testing.assert_allclose(found.intercept[column], intercept[0], rtol=1e-4)

    def test_blocks_of_columns_do_not_matter(self, monkeypatch):
        masks = bernoulli(200, 50)
        outputs = outputs_of(masks)
        solver = Ridge(penalties=self.grid, algorithm="conjugate_gradient")
        fitter = solver.prepare(Problem.from_arrays(masks, outputs))
        blocks = [fitter.fit(slice(0, 2)), fitter.fit(slice(2, COLUMNS))]
        assert [block.start for block in blocks] == [0, 2]
        monkeypatch.setattr(conjugate_gradient, "AT_ONCE", 4)
        whole = fit(masks, outputs, self.grid)
        joined = np.concatenate([block.weights for block in blocks])
        np.testing.assert_allclose(joined, whole.weights, rtol=1e-9)
        for figure in ("penalty", "iterations"):
            parts = np.concatenate([block.details[figure] for block in blocks])
            np.testing.assert_array_equal(parts, whole.details[figure])

    def test_notes_say_what_is_not_there_and_how_the_penalty_was_chosen(self):
        masks = bernoulli(200, 50)
        problem = Problem.from_arrays(masks, outputs_of(masks))
        fitter = Ridge(penalties=self.grid, algorithm="conjugate_gradient", held_out=7).prepare(problem)
        assert fitter.fit(slice(0, 1)).errors is None
        assert fitter.notes["algorithm"] == "conjugate_gradient"
        assert "none" in fitter.notes["errors"]
        assert "every 7th row" in fitter.notes["penalty"]


class TestProducts:
    @pytest.mark.parametrize("components", [1, 8, 61])
    def test_are_those_with_the_correlation_matrix_and_0_where_constant(self, components):
        masks = bernoulli(500, components + 2)
        masks[:, 0], masks[:, 1] = True, False
        vectors = np.random.default_rng(5).normal(size=(components + 2, 4))
        found = Correlation(*pack(masks))(torch.from_numpy(vectors)).numpy()
        expected = np.corrcoef(masks[:, 2:].T).reshape(components, components) @ vectors[2:]
        np.testing.assert_allclose(found[2:], expected, atol=2e-6)
        assert not found[:2].any()

    def test_do_not_depend_on_the_size_of_blocks(self, monkeypatch):
        correlation = Correlation(*pack(bernoulli(500, 30)))
        vectors = torch.from_numpy(np.random.default_rng(5).normal(size=(30, 4)))
        whole = correlation(vectors)
        monkeypatch.setattr(matrix_free, "BLOCK_BYTES", 0)  # 64 rows at a time, and a rest
        torch.testing.assert_close(correlation(vectors), whole, rtol=0, atol=1e-6)

    @given(rows=st.integers(1, 5), components=st.integers(1, 40), seed=st.integers(0, 99))
    def test_bits_are_unpacked_anywhere(self, rows, components, seed):
        masks = bernoulli(rows, components, seed)
        packed, _ = pack(masks)
        found = unpacked(torch.from_numpy(packed.bits), components)
        np.testing.assert_array_equal(found.numpy(), masks.astype(np.int8))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_are_the_same_on_a_gpu(self):
        packed, counts = pack(bernoulli(500, 61))
        vectors = torch.from_numpy(np.random.default_rng(5).normal(size=(61, 3)))
        found = Correlation(packed, counts, "cuda")(vectors.cuda()).cpu()
        torch.testing.assert_close(found, Correlation(packed, counts)(vectors), rtol=0, atol=1e-6)


class TestBadInput:
    def test_no_penalty_where_the_masks_determine_every_weight_is_least_squares(self):
        masks = DESIGNS["tall"]
        outputs = outputs_of(masks)
        weights, _ = naive.least_squares(masks, outputs)
        assert far(fit(masks, outputs, 0.0).weights, weights) < 1e-4

    @pytest.mark.parametrize("name", ["wide", "square", "sets of one size"])
    def test_no_penalty_where_they_do_not_is_refused(self, name):
        masks = DESIGNS[name]
        with pytest.raises(FitError, match="penalty of 0") as error:
            fit(masks, outputs_of(masks), (0.0, 1.0))
        assert f"{len(masks)} rows" in error.value.got

    def test_numbers_that_are_not_finite_are_refused(self):
        right = np.ones((60, 3))
        right[5, 1] = np.nan
        with pytest.raises(FitError, match="column 1"):
            solve(lambda v: v, right, 0.1)
        with pytest.raises(FitError, match="column 0"):  # not positive: the iteration breaks down
            solve(lambda v: -v, np.ones((4, 1)), 1.0)

    def test_a_component_that_never_varies_gets_weight_0(self):
        masks = DESIGNS["tall"].copy()
        masks[:, 7] = False
        outputs = outputs_of(masks)
        found = fit(masks, outputs)
        assert not found.weights[:, 7].any()
        others = np.arange(masks.shape[1]) != 7
        assert far(found.weights[:, others], fit(masks[:, others], outputs).weights) < 1e-5


@pytest.mark.filterwarnings("ignore::coar.errors.CoarWarning")
def test_a_study_is_fitted_as_by_the_other_algorithms(tmp_path):
    from coar.testing import SubsetMean

    design = coar.Bernoulli(ablation_fraction=0.3, seed=2)
    study = coar.Study.create(tmp_path / "s", SubsetMean(), design, 300, rows_per_shard=70)
    study.run(progress=False)
    fits = {
        name: coar.fit(study, Ridge(penalties=0.1, algorithm=name, tolerance=1e-5))
        for name in ("eigen", "conjugate_gradient")
    }
    assert far(fits["conjugate_gradient"].weights, fits["eigen"].weights) < 1e-4
    assert fits["conjugate_gradient"].errors is None
    assert fits["conjugate_gradient"].provenance["notes"]["algorithm"] == "conjugate_gradient"
