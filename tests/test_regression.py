"""Regression: equal to the slow definitions, independent of how rows were stored, honest about doubt."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

import coar
from coar.attributions import Attributions
from coar.errors import CoarWarning, FitError, SettingError
from coar.regression.problem import Problem
from coar.testing import SubsetMean, linear_experiment
from tests import naive

DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)


def run_study(path, experiment, num_rows, design=DESIGN, **kwargs):
    study = coar.Study.create(path, experiment, design, num_rows, **kwargs)
    study.run(progress=False)
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """300 rows of a mean over 15 points: nearly linear in the mask, with real residuals."""
    return run_study(tmp_path_factory.mktemp("study") / "s", SubsetMean(), 300)


def data(study):
    (values,) = study.outputs.values()
    return np.asarray(study.masks), np.asarray(values, dtype=np.float64)


def test_without_a_penalty_it_is_least_squares(study):
    fitted = coar.fit(study, coar.Ridge(penalties=0.0))
    weights, intercept = naive.least_squares(*data(study))
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-6)
    np.testing.assert_allclose(fitted.intercept, intercept, atol=1e-6)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 3.0])
def test_with_a_penalty_it_is_ridge_on_standardised_masks(study, penalty):
    fitted = coar.fit(study, coar.Ridge(penalties=penalty))
    weights, intercept = naive.ridge(*data(study), penalty)
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-6)
    np.testing.assert_allclose(fitted.intercept, intercept, atol=1e-6)


def test_scikit_learn_gives_the_same_weights(study):
    masks, outputs = data(study)
    deviation = masks.std(axis=0)
    peer = SklearnRidge(alpha=0.2 * len(masks)).fit((masks - masks.mean(axis=0)) / deviation, outputs)
    fitted = coar.fit(study, coar.Ridge(penalties=0.2))
    np.testing.assert_allclose(fitted.weights, peer.coef_ / deviation, atol=1e-6)


def test_exact_leave_one_out_is_refitting_without_each_row(tmp_path):
    study = run_study(tmp_path / "s", SubsetMean(num_points=8, num_features=3), 40)
    penalties = (0.01, 0.3)
    errors = np.stack(
        [np.mean(naive.leave_one_row_out_errors(*data(study), p) ** 2, axis=0) for p in penalties]
    )
    for number, penalty in enumerate(penalties):
        fitted = coar.fit(study, coar.Ridge(penalties=penalty, choose="loo"))
        np.testing.assert_allclose(fitted.detail("score"), errors[number], rtol=1e-5)
    chosen = coar.fit(study, coar.Ridge(penalties=penalties, choose="loo")).detail("penalty")
    np.testing.assert_array_equal(chosen, np.array(penalties)[errors.argmin(axis=0)])


def test_gcv_is_close_to_exact_leave_one_out(study):
    for penalty in (1e-3, 0.1, 1.0):
        gcv = coar.fit(study, coar.Ridge(penalties=penalty)).detail("score")
        loo = coar.fit(study, coar.Ridge(penalties=penalty, choose="loo")).detail("score")
        np.testing.assert_allclose(gcv, loo, rtol=0.05)


def test_each_column_chooses_its_own_penalty_as_if_alone(study):
    together = coar.fit(study)
    grid = coar.Ridge().grid
    scores = np.stack([coar.fit(study, coar.Ridge(penalties=p)).detail("score") for p in grid])
    np.testing.assert_array_equal(together.detail("penalty"), np.array(grid)[scores.argmin(axis=0)])


def test_known_attributions_of_a_linear_model_are_found(tmp_path):
    experiment, truth = linear_experiment()
    fitted = coar.fit(run_study(tmp_path / "s", experiment, 60))
    np.testing.assert_allclose(fitted.weights, truth, atol=1e-3)
    assert fitted.detail("r2").min() > 0.999


def test_predictions_are_in_output_units_from_raw_masks(study):
    masks, outputs = data(study)
    fitted = coar.fit(study)
    error = np.mean((fitted.predict(masks) - outputs) ** 2, axis=0)
    np.testing.assert_allclose(1 - error / outputs.var(axis=0), fitted.detail("r2"), atol=1e-4)
    np.testing.assert_allclose(fitted.predict(masks).mean(axis=0), outputs.mean(axis=0), atol=1e-6)


def test_standard_errors_match_the_spread_over_repeated_noise():
    """Least squares on one design and fresh noise: the weights scatter as the errors say."""
    rng = np.random.default_rng(0)
    masks = rng.random((200, 5)) < 0.7
    outputs = masks @ rng.normal(size=(5, 1)) + rng.normal(size=(200, 400))
    fitted = fit_arrays(masks, outputs, coar.Ridge(penalties=0.0))
    np.testing.assert_allclose(fitted.weights.std(axis=0), fitted.errors.mean(axis=0), rtol=0.15)


def fit_arrays(masks, outputs, solver):
    problem = Problem.from_arrays(masks, outputs)
    return solver.prepare(problem).fit(problem.column_slices[0])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_a_large_offset_of_the_outputs_costs_no_accuracy(offset):
    rng = np.random.default_rng(0)
    masks = rng.random((3_000, 20)) < 0.9
    outputs = (masks @ rng.normal(size=(20, 4)) + rng.normal(size=(3_000, 4)) + offset).astype(np.float32)
    fitted = fit_arrays(masks, outputs, coar.Ridge(penalties=0.0))
    weights, _ = naive.least_squares(masks, outputs)
    # Against the standard error: what rounding costs is a hundredth of what the noise costs.
    assert (np.abs(fitted.weights - weights) < 0.01 * fitted.errors).all()
    centre = fitted.weights @ masks.mean(axis=0) + fitted.intercept
    np.testing.assert_allclose(centre, outputs.mean(axis=0, dtype=float), rtol=1e-7)


def test_the_size_of_shards_does_not_change_a_single_bit(tmp_path, monkeypatch):
    for module in ("collection", "problem", "study_rows"):  # so that blocks and shards interleave
        monkeypatch.setattr(f"coar.regression.{module}.BLOCK_ROWS", 64)
    monkeypatch.setattr("coar.regression.collection.RANGE_ROWS", 128)
    found = []
    for size in (1, 50, 64, 300):
        study = run_study(tmp_path / str(size), SubsetMean(), 300, rows_per_shard=size)
        found.append(coar.fit(study))
    for other in found[1:]:
        np.testing.assert_array_equal(other.weights, found[0].weights)
        np.testing.assert_array_equal(other.errors, found[0].errors)


def test_blocks_of_columns_on_disk_do_not_matter(study, monkeypatch):
    whole = coar.fit(study)
    monkeypatch.setattr("coar.regression.problem.BLOCK_COLUMN_BYTES", 0)
    monkeypatch.setattr("coar.regression.problem.COLUMN_SHARE", 2.5 * 8 * 15 / 2**30)
    saved = coar.fit(study, save_as="blocks", memory="1 GiB")
    assert len(saved.ranges) == 3  # of two columns
    np.testing.assert_allclose(saved.weights, whole.weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(saved.errors, whole.errors, rtol=1e-5, atol=1e-7)
    assert Attributions.load(study.attributions_path("blocks")).columns == whole.columns


@pytest.mark.parametrize("num_rows", [10, 15, 16])
def test_no_penalty_with_too_few_rows_is_refused(tmp_path, num_rows):
    study = run_study(tmp_path / "s", SubsetMean(), num_rows, coar.Bernoulli(ablation_fraction=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoarWarning)
        with pytest.raises(FitError, match="penalty of 0") as error:
            coar.fit(study, coar.Ridge(penalties=0.0))
    assert f"{num_rows} rows" in error.value.got


def test_few_rows_give_a_warning_with_the_reason(tmp_path):
    study = run_study(tmp_path / "s", SubsetMean(), 12)
    with pytest.warns(CoarWarning, match="12 rows for 15 components"):
        coar.fit(study)


def test_a_component_that_never_varies_gets_weight_zero_and_infinite_error(tmp_path):
    design = coar.Bernoulli(ablation_fraction=0.02, seed=0)
    study = run_study(tmp_path / "s", SubsetMean(num_points=10), 40, design)
    constant = np.asarray(study.masks).all(axis=0)
    assert 0 < constant.sum() < 10
    with pytest.warns(CoarWarning, match=f"{constant.sum()} of 10 components"):
        fitted = coar.fit(study)
    assert (fitted.weights[:, constant] == 0).all()
    assert np.isinf(fitted.errors[:, constant]).all()
    assert np.isfinite(fitted.errors[:, ~constant]).all()


def test_columns_at_the_edge_of_the_grid_are_mentioned(study):
    with pytest.warns(CoarWarning, match="widen"):
        coar.fit(study, coar.Ridge(penalties=(10.0, 20.0, 40.0)))


def test_an_incomplete_study_is_refused_unless_asked(tmp_path):
    study = coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, 100, rows_per_shard=10)
    with pytest.raises(FitError, match="10 of 10 shards"):
        coar.fit(study)
    with pytest.raises(FitError, match="too few rows"):
        coar.fit(study, partial=True)


def test_more_rows_sharpen_the_fit(tmp_path):
    study = run_study(tmp_path / "s", SubsetMean(), 60)
    before = coar.fit(study)
    study.extend(600)
    study.run(progress=False)
    after = coar.fit(study)
    assert after.provenance["rows"] == 600
    assert np.median(after.errors) < 0.5 * np.median(before.errors)


@pytest.mark.parametrize("penalties", [-1.0, (), (0.1, -0.1), float("nan"), float("inf"), "0.1"])
def test_senseless_penalties_are_refused(penalties):
    with pytest.raises(SettingError, match="penalties"):
        coar.Ridge(penalties=penalties)


def test_an_unknown_output_or_a_bad_name_is_refused(study):
    with pytest.raises(SettingError, match="mean"):
        coar.fit(study, output="loss")
    with pytest.raises(SettingError, match="folder"):
        coar.fit(study, save_as="../x")


@pytest.mark.parametrize("penalty", [1e-4, 0.1])
@pytest.mark.parametrize(
    ("design", "num_rows"),
    [(coar.FixedSize(ablation_fraction=0.2, seed=0), 200), (DESIGN, 10), (coar.LeaveOneOut(), 15)],
    ids=["sets of one size", "fewer rows than components", "leave-one-out"],
)
@pytest.mark.filterwarnings("ignore::coar.errors.CoarWarning")
def test_masks_that_do_not_determine_the_weights_give_exact_ridge_all_the_same(
    tmp_path, design, num_rows, penalty
):
    study = run_study(tmp_path / "s", SubsetMean(), num_rows, design)
    fitted = coar.fit(study, coar.Ridge(penalties=penalty))
    weights, intercept = naive.ridge(*data(study), penalty)
    np.testing.assert_allclose(fitted.weights, weights, atol=1e-6)
    np.testing.assert_allclose(fitted.intercept, intercept, atol=1e-6)


def test_sets_of_one_size_are_warned_about_and_refused_without_a_penalty(tmp_path):
    design = coar.FixedSize(ablation_fraction=0.2, seed=0)
    study = run_study(tmp_path / "s", SubsetMean(), 200, design)
    with pytest.warns(CoarWarning, match="14 directions, not 15"):
        coar.fit(study)
    with pytest.raises(FitError, match="determine every weight") as error:
        coar.fit(study, coar.Ridge(penalties=0.0))
    assert "rank 14" in error.value.got


def test_a_component_that_never_varies_is_as_if_it_were_not_there():
    """It takes no degree of freedom: scores, choices and errors are those of the others alone."""
    rng = np.random.default_rng(0)
    masks = rng.random((60, 30)) < 0.9
    masks[:, 20:] = True
    outputs = masks[:, :20] @ rng.normal(size=(20, 5)) + rng.normal(size=(60, 5))
    fits = []
    for kept in (masks, masks[:, :20]):
        fits.append(fit_arrays(kept, outputs, coar.Ridge()))
    for figure in ("penalty", "score", "r2"):
        np.testing.assert_allclose(fits[0].details[figure], fits[1].details[figure], rtol=1e-9)
    np.testing.assert_allclose(fits[0].weights[:, :20], fits[1].weights, rtol=1e-9)
    np.testing.assert_allclose(fits[0].errors[:, :20], fits[1].errors, rtol=1e-9)


def test_the_code_of_the_page_runs():
    page = (Path(__file__).parents[1] / "docs/regression.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/regression.md", "exec"), {})
