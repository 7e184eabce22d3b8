"""The hybrid: ridge on what a scaled prior leaves, against the same in a few lines of NumPy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import coar
from coar import Bernoulli, Lasso, Ridge, Study
from coar.attributions import Attributions
from coar.baselines import attribution_patching, hybrid, leave_one_out
from coar.errors import AxisError, FitError, SettingError, StoreError
from coar.testing import SubsetMean, linear_experiment
from tests import cases
from tests.refused import refused


def study_of(folder, experiment, rows=60, fraction=0.3, **options):
    study = Study.create(folder, experiment, Bernoulli(ablation_fraction=fraction), num_rows=rows, **options)
    study.run(progress=False)
    return study


def prior_of(study, weights, intercept=None, output=None):
    output = output or next(iter(study.columns))
    columns = study.columns[output]
    intercept = np.zeros(len(columns)) if intercept is None else intercept
    return Attributions(weights, intercept, study.components, columns, output)


def zeros_for(study):
    return prior_of(study, np.zeros((len(next(iter(study.columns.values()))), len(study.components))))


def random_for(study, seed=0):
    shape = len(next(iter(study.columns.values()))), len(study.components)
    return prior_of(study, np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def by_hand(study, prior, columns, penalty):
    """Slope, weights and intercepts: all rows in memory, one formula after the other."""
    masks = np.asarray(study.masks[:], np.float64)
    outputs = np.asarray(study.outputs[prior.output][:], np.float64)[:, columns]
    own = prior.weights.astype(np.float64)
    predictions = masks @ own.T
    centred = predictions - predictions.mean(axis=0)
    slope = (centred * outputs).sum() / (centred**2).sum()
    left = outputs - slope * predictions
    standard = (masks - masks.mean(axis=0)) / masks.std(axis=0)
    matrix = standard.T @ standard / len(masks) + penalty * np.eye(masks.shape[1])
    ridge = np.linalg.solve(matrix, standard.T @ (left - left.mean(axis=0)) / len(masks)).T / masks.std(0)
    return slope, slope * own + ridge, left.mean(axis=0) - ridge @ masks.mean(axis=0)


# ------------------------------------------------------------------------------------ what it is


@pytest.mark.parametrize(
    "experiment", [SubsetMean(), cases.make_case("mlp").experiment()], ids=["mean", "mlp"]
)
def test_it_is_ridge_on_what_a_scaled_prior_leaves(experiment, tmp_path):
    study = study_of(tmp_path / "study", experiment)
    prior = random_for(study)
    found = hybrid(study, prior, Ridge(penalties=0.3))
    slope, weights, intercept = by_hand(study, prior, slice(None), 0.3)
    assert found.provenance["slope"] == pytest.approx(slope, rel=1e-5)
    assert found.weights == pytest.approx(weights, abs=1e-5)
    assert found.intercept == pytest.approx(intercept, abs=1e-5)
    assert found.columns == prior.columns
    assert found.errors.shape == found.weights.shape


@pytest.mark.parametrize(
    ("solver", "rows"),
    [
        (Ridge(), 60),
        (Ridge(choose="loo"), 60),
        (Ridge(penalties=0.2, algorithm="cholesky"), 60),
        (Ridge(penalties=(0.1, 1.0), algorithm="dual"), 40),
        (Ridge(penalties=0.2, algorithm="conjugate_gradient"), 60),
    ],
    ids=["eigen", "loo", "cholesky", "dual", "conjugate gradients"],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_prior_of_zeros_leaves_ridge_to_the_bit(solver, rows, dtype, tmp_path):
    study = study_of(tmp_path / "study", SubsetMean(), rows, dtypes={"mean": dtype})
    found, plain = hybrid(study, zeros_for(study), solver), coar.fit(study, solver)
    assert found.provenance["slope"] == 0
    np.testing.assert_array_equal(found.weights, plain.weights)
    np.testing.assert_array_equal(found.intercept, plain.intercept)
    np.testing.assert_array_equal(found.detail("penalty"), plain.detail("penalty"))
    np.testing.assert_array_equal(found.detail("residual_r2"), plain.detail("r2"))
    if plain.errors is not None:
        np.testing.assert_array_equal(found.errors, plain.errors)


@pytest.mark.parametrize("scale", [1.0, 4.0, -0.5])
def test_a_perfect_prior_stays_perfect_whatever_its_scale(scale, tmp_path):
    experiment, truth = linear_experiment()
    study = study_of(tmp_path / "study", experiment, rows=20)
    found = hybrid(study, prior_of(study, scale * truth))
    assert found.provenance["slope"] == pytest.approx(1 / scale, rel=1e-6)
    assert found.weights == pytest.approx(truth, abs=1e-5)
    assert found.intercept == pytest.approx(np.zeros(len(truth)), abs=1e-5)
    assert np.abs(coar.fit(study, Ridge(penalties=0.1)).weights - truth).max() > 0.01


def test_with_few_rows_a_prior_helps(tmp_path):
    experiment = cases.make_case("mlp").experiment()
    study = study_of(tmp_path / "few", experiment, rows=30, fraction=0.1)
    found = hybrid(study, attribution_patching(experiment, progress=False))
    alone = [coar.fit(study, Ridge(penalties=penalty)) for penalty in (0.01, 0.1, 1.0, 10.0)]
    masks = Bernoulli(ablation_fraction=0.1, seed=1, stream="evaluation").masks(range(200), 13)
    outputs = experiment.prepare(experiment.device)(masks)["margin"]
    best, *others = (np.square(model.predict(masks) - outputs).mean() for model in (found, *alone))
    assert best < 0.7 * min(others)


# ------------------------------------------------------------------------- what must not matter


def test_the_intercept_of_the_prior_does_not_matter(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    prior = random_for(study)
    shifted = prior_of(study, prior.weights, np.full(len(prior.columns), 100.0))
    np.testing.assert_array_equal(hybrid(study, prior).weights, hybrid(study, shifted).weights)


def test_blocks_of_columns_do_not_matter(tmp_path):
    """With 1 MiB each column is a block of its own, for the slope and for the fit."""
    study = study_of(tmp_path / "study", SubsetMean())
    prior = random_for(study)
    whole, small = hybrid(study, prior), hybrid(study, prior, memory="1 MiB")
    assert small.provenance["slope"] == pytest.approx(whole.provenance["slope"], rel=1e-12)
    np.testing.assert_allclose(small.weights, whole.weights, rtol=1e-6)
    np.testing.assert_allclose(small.intercept, whole.intercept, rtol=1e-9)


def test_saved_in_the_study_they_are_the_same(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    prior = random_for(study)
    memory, saved = hybrid(study, prior), hybrid(study, prior, save_as="both", memory="1 MiB")
    again = Attributions.load(study.attributions_path("both"))
    for one in (saved, again):
        np.testing.assert_allclose(one.weights, memory.weights, rtol=1e-6)
        assert one.provenance["method"] == "hybrid"


def test_kept_sums_are_those_of_the_study_alone(tmp_path):
    """What a hybrid leaves in the study is X'X; a fit after it is the fit before it."""
    first, second = (study_of(tmp_path / name, SubsetMean(), rows=2100) for name in ("first", "second"))
    prior = random_for(first)
    before, after = coar.fit(first), hybrid(first, prior)
    alone = hybrid(second, random_for(second))
    np.testing.assert_array_equal(after.weights, alone.weights)
    np.testing.assert_array_equal(coar.fit(second).weights, before.weights)


# ---------------------------------------------------------------------------------- of what kind


def test_a_prior_of_some_columns_gives_those(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    prior = random_for(study).subset([4, 1])
    found = hybrid(study, prior, Ridge(penalties=0.3))
    slope, weights, intercept = by_hand(study, prior, [4, 1], 0.3)
    assert found.provenance["slope"] == pytest.approx(slope, rel=1e-5)
    assert found.columns == prior.columns
    assert found.weights == pytest.approx(weights, abs=1e-5)
    assert found.intercept == pytest.approx(intercept, abs=1e-5)


def test_of_several_outputs_the_priors_is_fitted(tmp_path):
    experiment = cases.make_case("several_outputs").experiment()
    study = study_of(tmp_path / "study", experiment)
    prior = attribution_patching(experiment, output="many", progress=False)
    found = hybrid(study, prior, Ridge(penalties=0.1))
    assert (found.output, found.columns) == ("many", study.columns["many"])
    # Its logits are additive in what patching has its gates on: nothing is left to fit.
    assert found.weights == pytest.approx(prior.weights, abs=1e-4)


def test_the_provenance_says_what_was_spent(tmp_path):
    experiment, truth = linear_experiment()
    study = study_of(tmp_path / "study", experiment, rows=20)
    patched = attribution_patching(experiment, progress=False)
    said = hybrid(study, patched).provenance
    assert {key: said[key] for key in ("method", "rows", "passes", "forwards", "seed")} == {
        "method": "hybrid",
        "rows": 20,
        "passes": 1,
        "forwards": 23,
        "seed": 0,
    }
    assert said["ablation_fraction"] == 0.3
    assert said["prior"] == patched.provenance
    one_out = leave_one_out(experiment, progress=False)
    assert hybrid(study, one_out).provenance["forwards"] == 13 + 20
    assert hybrid(study, prior_of(study, truth)).provenance["forwards"] is None
    passes_alone = prior_of(study, truth)
    passes_alone.provenance["passes"] = 40
    assert hybrid(study, passes_alone).provenance["forwards"] == 120 + 20


# --------------------------------------------------------------------------------------- refused


def test_components_or_columns_of_others_are_refused(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    for other in (SubsetMean(num_points=16), SubsetMean(num_features=7)):
        with refused(AxisError, "prior", "study"):
            hybrid(study, leave_one_out(other, progress=False))


def test_another_output_is_refused(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    prior = Attributions(np.zeros((6, 15)), np.zeros(6), study.components, study.columns["mean"], "median")
    with refused(SettingError, "no such output", "mean", "median"):
        hybrid(study, prior)


def test_what_is_no_study_no_prior_or_no_ridge_is_refused(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    with refused(SettingError, "not a study", "coar.Study", "str"):
        hybrid("runs/study", zeros_for(study))
    with refused(SettingError, "not a prior", "coar.Attributions", "ndarray"):
        hybrid(study, np.zeros((6, 15)))
    with refused(SettingError, "fitted by ridge"):
        hybrid(study, zeros_for(study), Lasso())


def test_rows_that_are_missing_are_refused_unless_told(tmp_path):
    study = Study.create(
        tmp_path / "study", SubsetMean(), Bernoulli(ablation_fraction=0.3), num_rows=40, rows_per_shard=20
    )
    prior = zeros_for(study)
    with refused(FitError, "missing", "40 rows", "0 rows", "partial=True"):
        hybrid(study, prior)
    with refused(FitError, "too few rows"):
        hybrid(study, prior, partial=True)
    worker = study.worker(study.experiment.device)
    worker.do(study.items()[1])
    with warnings.catch_warnings(record=True):
        found, plain = hybrid(study, prior, partial=True), coar.fit(study, partial=True)
    np.testing.assert_array_equal(found.weights, plain.weights)


def test_a_name_that_is_taken_is_refused(tmp_path):
    study = study_of(tmp_path / "study", SubsetMean())
    hybrid(study, random_for(study), save_as="both")
    with refused(StoreError, "both", "nothing was overwritten"):
        hybrid(study, random_for(study, seed=1), save_as="both")
