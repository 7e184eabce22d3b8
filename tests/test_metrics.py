"""Figures per column against scipy, scikit-learn and NumPy; what the bootstrap promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import r2_score

from coar import metrics
from coar.metrics import bootstrap_means, interval, pearson, per_column


@pytest.fixture
def data():
    """Truth and prediction, [rows, columns], with ties as real outputs have them."""
    random = np.random.default_rng(3)
    predicted = random.normal(size=(40, 7))
    return (2 * predicted + random.normal(size=(40, 7)) + 5).round(1), predicted.round(1)


def test_pearson_is_that_of_numpy(data):
    truth, predicted = data
    expected = [np.corrcoef(y, p)[0, 1] for y, p in zip(truth.T, predicted.T, strict=True)]
    assert pearson(truth, predicted) == pytest.approx(expected, abs=1e-6)


def test_every_figure_is_that_of_a_library(data):
    truth, predicted = data
    found = per_column(truth, predicted)
    for column, (y, p) in enumerate(zip(truth.T, predicted.T, strict=True)):
        assert found["pearson"][column] == pytest.approx(stats.pearsonr(y, p)[0], abs=1e-6)
        assert found["spearman"][column] == pytest.approx(stats.spearmanr(y, p)[0], abs=1e-6)
        assert found["r2"][column] == pytest.approx(r2_score(y, p), abs=1e-6)
        assert found["slope"][column] == pytest.approx(stats.linregress(p, y).slope, abs=1e-6)


def test_float32_far_from_zero_loses_nothing(data):
    truth, predicted = (array.astype(np.float32) + np.float32(1000) for array in data)
    pairs = zip(truth.T.astype(float), predicted.T.astype(float), strict=True)
    expected = [stats.pearsonr(y, p)[0] for y, p in pairs]
    assert pearson(truth, predicted) == pytest.approx(expected, abs=1e-6)


def test_a_constant_truth_has_no_correlation_and_no_r2(data):
    truth, predicted = data
    truth[:, 2] = 0.1  # its mean over rows is not 0.1 to the last bit
    found = per_column(truth, predicted)
    assert np.flatnonzero(np.isnan(found["pearson"])).tolist() == [2]
    assert np.flatnonzero(np.isnan(found["spearman"])).tolist() == [2]
    assert np.flatnonzero(np.isnan(found["r2"])).tolist() == [2]
    assert np.flatnonzero(np.isnan(found["slope"])).tolist() == [2]  # or dead columns would be its median


def test_a_constant_prediction_has_no_correlation_and_no_slope(data):
    truth, predicted = data
    predicted[:, 2] = 0.1
    found = per_column(truth, predicted)
    assert np.flatnonzero(np.isnan(found["pearson"])).tolist() == [2]
    assert np.flatnonzero(np.isnan(found["slope"])).tolist() == [2]
    assert found["r2"][2] <= 0


def test_the_bootstrap_leaves_constant_columns_out(data):
    """Among equal columns the mean is that of any of them, so a constant one must change nothing."""
    truth, predicted = np.tile(data[0][:, :1], 5), np.tile(data[1][:, :1], 5)
    expected = bootstrap_means(truth, predicted, seed=0, draws=50)
    truth[:, 3] = 7.0
    found = bootstrap_means(truth, predicted, seed=0, draws=50)
    assert found == pytest.approx(expected, abs=1e-12)


def test_only_constant_columns_have_no_mean():
    drawn = bootstrap_means(np.ones((5, 2)), np.ones((5, 2)), seed=0, draws=10)
    assert np.isnan(drawn).all()
    assert np.isnan(interval(drawn)).all()


def test_a_draw_is_the_plain_mean_of_resampled_correlations(data):
    """By hand: repeat rows and columns as drawn, and average NumPy's correlations."""
    truth, predicted = data
    drawn = bootstrap_means(truth, predicted, seed=4, draws=3)
    for draw in range(3):
        rows = metrics.integers(4, "bootstrap rows", draw, 40, below=40)
        columns = metrics.integers(4, "bootstrap columns", draw, 7, below=7)
        literal = [np.corrcoef(truth[rows, c], predicted[rows, c])[0, 1] for c in columns]
        assert drawn[draw] == pytest.approx(np.mean(literal), abs=1e-9)


def test_the_bootstrap_repeats_and_depends_on_the_seed(data):
    first = bootstrap_means(*data, seed=1, draws=20)
    assert np.array_equal(first, bootstrap_means(*data, seed=1, draws=20))
    assert not np.array_equal(first, bootstrap_means(*data, seed=2, draws=20))


def test_more_draws_begin_with_the_fewer(data):
    """So that two methods, and two calls, are compared on the same draws."""
    assert np.array_equal(bootstrap_means(*data, 1, 30)[:20], bootstrap_means(*data, 1, 20))


@pytest.mark.parametrize("block", [1, 3, 7])
def test_blocks_of_columns_change_no_number(data, block, monkeypatch):
    whole = bootstrap_means(*data, seed=1, draws=20)
    monkeypatch.setattr(metrics, "COLUMN_BLOCK", block)
    assert bootstrap_means(*data, seed=1, draws=20) == pytest.approx(whole, abs=1e-12)


def test_an_interval_holds_so_many_of_the_draws():
    drawn = np.arange(1001) / 1000
    assert interval(drawn) == pytest.approx((0.025, 0.975))
    assert interval(drawn, level=0.5) == pytest.approx((0.25, 0.75))


def test_intervals_cover_the_true_mean_correlation():
    """Truth = prediction + equal noise: correlation sqrt(1/2). Conservative, but not without end."""
    covered, widths, means = [], [], []
    for simulation in range(60):
        random = np.random.default_rng(simulation)
        predicted = random.normal(size=(60, 20))
        truth = predicted + random.normal(size=(60, 20))
        low, high = interval(bootstrap_means(truth, predicted, seed=simulation, draws=100))
        covered.append(low <= np.sqrt(0.5) <= high)
        widths.append(high - low)
        means.append(pearson(truth, predicted).mean())
    assert np.mean(covered) >= 0.9
    assert 1.0 <= np.mean(widths) / (3.92 * np.std(means)) <= 2.5
