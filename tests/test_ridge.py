"""Ridge: whichever algorithm solves it, the answer is the same; the choice between them says why."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

import coar
from coar.errors import CoarWarning, FitError, SettingError
from coar.regression.algorithms import choose, memory_needed
from coar.regression.cholesky import rank_bound
from coar.regression.fitting import fit_blocks
from coar.regression.memory import memory_bytes
from coar.regression.problem import Problem
from coar.testing import SubsetMean
from tests import naive

PATH = (1e-3, 0.03, 0.3, 3.0)


def rows_of(design, num_rows, components=40, columns=6, seed=0):
    """Linear outputs with pairs that act together, and noise."""
    rng = np.random.default_rng(seed)
    masks = design.masks(range(num_rows), components)
    pairs = masks[:, :5] & masks[:, 5:10]
    outputs = masks @ rng.normal(size=(components, columns)) + pairs @ rng.normal(size=(5, columns)) * 3
    return masks, (outputs + rng.normal(size=outputs.shape)).astype(np.float32)


def fit(masks, outputs, **settings):
    problem = Problem.from_arrays(masks, outputs, budget=settings.pop("budget", None))
    fitter = coar.Ridge(**settings).prepare(problem)
    return fitter.fit(slice(0, outputs.shape[1])), fitter


def require_same(ours, other, tolerance):
    np.testing.assert_allclose(ours.weights, other.weights, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(ours.intercept, other.intercept, rtol=tolerance, atol=tolerance)
    for name in ours.details.keys() & other.details.keys() - {"iterations", "residual"}:
        np.testing.assert_allclose(ours.details[name], other.details[name], rtol=tolerance, atol=tolerance)
    if ours.errors is not None and other.errors is not None:
        np.testing.assert_allclose(ours.errors, other.errors, rtol=tolerance)


@pytest.mark.parametrize("penalties", [0.0, 0.05, PATH], ids=["none", "one", "path"])
@pytest.mark.parametrize("num_rows", [60, 300, 3000])
def test_cholesky_is_eigen(num_rows, penalties):
    data = rows_of(coar.Bernoulli(ablation_fraction=0.1), num_rows)
    eigen, _ = fit(*data, penalties=penalties, algorithm="eigen")
    cholesky, _ = fit(*data, penalties=penalties, algorithm="cholesky")
    require_same(cholesky, eigen, 1e-7)
    assert {"score", "penalty", "r2"} <= cholesky.details.keys()


def test_cholesky_in_float32_is_eigen_almost(monkeypatch):
    monkeypatch.setattr("coar.regression.cholesky.fits_double", lambda *_: False)
    data = rows_of(coar.Bernoulli(ablation_fraction=0.1), 400)
    cholesky, fitter = fit(*data, penalties=PATH, algorithm="cholesky")
    assert fitter.notes["precision"] == "float32"
    eigen, _ = fit(*data, penalties=PATH, algorithm="eigen")
    require_same(cholesky, eigen, 1e-5)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("penalty", [1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("design", ["few rows", "sets of one size", "two alike"])
def test_factors_are_right_or_refused(monkeypatch, design, penalty, double):
    """Where the design leaves directions open, small penalties lose digits: found out, and left to eigen."""
    monkeypatch.setattr("coar.regression.cholesky.fits_double", lambda *_: double)
    masks, outputs = rows_of(coar.Bernoulli(ablation_fraction=0.1), 35 if design == "few rows" else 300)
    if design == "sets of one size":
        masks, outputs = rows_of(coar.FixedSize(ablation_fraction=0.1), 300)
    if design == "two alike":
        masks[:, 1] = masks[:, 0]
    eigen, _ = fit(masks, outputs, penalties=penalty, algorithm="eigen")
    try:
        cholesky, _ = fit(masks, outputs, penalties=penalty, algorithm="cholesky")
    except FitError:
        assert penalty < (1e-4 if double else 0.05)
        automatic, fitter = fit(masks, outputs, penalties=penalty)
        assert fitter.notes["algorithm"] in ("eigen", "dual")
        require_same(automatic, eigen, 1e-9)
        return
    np.testing.assert_allclose(cholesky.weights, eigen.weights, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cholesky.errors, eigen.errors, rtol=2e-3)


@pytest.mark.parametrize("algorithm", ["eigen", "cholesky"])
def test_scikit_learn_agrees(algorithm):
    masks, outputs = rows_of(coar.Bernoulli(ablation_fraction=0.1), 500)
    ours, _ = fit(masks, outputs, penalties=0.2, algorithm=algorithm)
    standard = (masks - masks.mean(axis=0)) / masks.std(axis=0)
    peer = SklearnRidge(alpha=0.2 * len(masks)).fit(standard, outputs)
    np.testing.assert_allclose(ours.weights, peer.coef_ / masks.std(axis=0), atol=1e-6)


def test_scores_are_those_of_the_definition():
    """GCV = mean squared residual / (1 - (1 + df) / rows)^2, with df the trace of the hat matrix."""
    masks, outputs = rows_of(coar.Bernoulli(ablation_fraction=0.1), 90)
    standard = (masks - masks.mean(axis=0)) / masks.std(axis=0)
    centred = outputs.astype(np.float64) - outputs.mean(axis=0, dtype=np.float64)
    hat = standard @ np.linalg.solve(standard.T @ standard / 90 + 0.3 * np.eye(40), standard.T) / 90
    residual = np.mean((centred - hat @ centred) ** 2, axis=0)
    expected = residual / (1 - (1 + np.trace(hat)) / 90) ** 2
    for algorithm in ("eigen", "cholesky"):
        ours, _ = fit(masks, outputs, penalties=0.3, algorithm=algorithm)
        np.testing.assert_allclose(ours.details["score"], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [0.05, 0.5])
def test_sets_of_one_size_have_one_direction_less(size):
    masks, outputs = rows_of(coar.FixedSize(ablation_fraction=size), 300)
    counts = Problem.from_arrays(masks, outputs).masks()
    assert rank_bound(counts) == 39 == np.linalg.matrix_rank(masks - masks.mean(axis=0))
    for algorithm in ("eigen", "cholesky"):
        ours, _ = fit(masks, outputs, penalties=0.1, algorithm=algorithm)
        weights, intercept = naive.ridge(masks, outputs.astype(np.float64), 0.1)
        np.testing.assert_allclose(ours.weights, weights, atol=1e-5)
        np.testing.assert_allclose(ours.intercept, intercept, atol=1e-4)
        with pytest.raises(FitError, match="penalty of 0"):
            fit(masks, outputs, penalties=0.0, algorithm=algorithm)


def test_two_components_that_are_always_ablated_together_are_refused_without_a_penalty():
    masks, outputs = rows_of(coar.Bernoulli(ablation_fraction=0.1), 300)
    masks[:, 1] = masks[:, 0]
    for algorithm in ("eigen", "cholesky"):
        with pytest.raises(FitError, match="determine"):
            fit(masks, outputs, penalties=0.0, algorithm=algorithm)


class TestChoice:
    """auto: from the sizes and the memory."""

    def chosen(self, rows, components, budget="1 GiB", **settings):
        masks = np.zeros((rows, components), bool)
        problem = Problem.from_arrays(masks, np.zeros((rows, 1)), budget=memory_bytes(budget))
        return choose(coar.Ridge(**settings), problem)

    @pytest.mark.parametrize(
        ("rows", "components", "budget", "settings", "expected"),
        [
            (5000, 300, "1 GiB", {"penalties": 0.1}, "cholesky"),
            (5000, 300, "1 GiB", {}, "eigen"),
            (100, 300, "1 GiB", {}, "dual"),
            (200, 300, "1 GiB", {}, "eigen"),
            (5000, 300, "1 MiB", {"penalties": 0.1, "errors": False}, "conjugate_gradient"),
            (5000, 300, "1 MiB", {}, "conjugate_gradient"),
            (5000, 300, "1.5 MiB", {"penalties": 0.1, "errors": False}, "cholesky"),
            (100, 300, "1 GiB", {"choose": "loo"}, "eigen"),
        ],
    )
    def test_it_follows_size_and_memory(self, rows, components, budget, settings, expected):
        found = self.chosen(rows, components, budget, **settings)
        assert found.algorithm == expected
        assert found.why

    def test_what_is_asked_for_is_taken(self):
        assert self.chosen(5000, 300, algorithm="eigen", penalties=0.1).algorithm == "eigen"

    def test_exact_leave_one_out_that_does_not_fit_says_what_would(self):
        with pytest.raises(FitError, match="leave-one-out") as error:
            self.chosen(5000, 300, "1 MiB", choose="loo")
        assert "gcv" in error.value.todo

    def test_the_reason_is_in_the_provenance(self, tmp_path):
        study = coar.Study.create(tmp_path, SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 200)
        study.run(progress=False)
        notes = coar.fit(study, "auto", memory="2 GB").provenance["notes"]
        assert notes["algorithm"] == "eigen"
        assert "20 penalties" in notes["why"]

    def test_estimates_grow_with_the_square_of_the_components(self):
        one, two = (memory_needed(coar.Ridge(), p) for p in (1000, 2000))
        assert [b / a for a, b in zip(one, two, strict=True)] == [4, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1 GiB", 2**30), ("500MB", 500 * 10**6), (2**21, 2**21), ("4g", 2**32), ("1536 kib", 3 * 2**19)],
)
def test_memory_is_read(text, expected):
    assert memory_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1 GiB", 0, "1 GiBs", True, "nan GB", 1.5j])
def test_senseless_memory_is_refused(text):
    with pytest.raises(SettingError, match="memory"):
        memory_bytes(text)


@pytest.mark.parametrize("choice", ["cholesky", "dual", "conjugate_gradient"])
def test_exact_leave_one_out_needs_eigenvectors(choice):
    with pytest.raises(SettingError, match="loo"):
        coar.Ridge(choose="loo", algorithm=choice)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("columns") / "s"
    study = coar.Study.create(path, SubsetMean(), coar.Bernoulli(ablation_fraction=0.3), 200)
    study.run(progress=False)
    return study


class TestColumns:
    """fit(columns=...)"""

    @pytest.mark.parametrize("columns", [[3, 1], [0, 1, 2], range(2, 5), np.array([4])])
    def test_some_columns_are_those_of_a_whole_fit(self, study, columns):
        some, whole = coar.fit(study, columns=columns), coar.fit(study)
        np.testing.assert_allclose(some.weights, whole.rows(list(columns)), rtol=1e-6)
        assert some.columns == whole.columns.subset(np.array(columns))

    def test_by_name(self, study):
        name = study.columns["mean"].names[2]
        assert coar.fit(study, columns=[name]).columns.names == (name,)

    @pytest.mark.parametrize("columns", [3, "01", [1.5], [True, False], slice(0, 3), np.array([True, False])])
    def test_what_are_no_columns_is_refused(self, study, columns):
        with pytest.raises(coar.errors.AxisError, match="columns to fit"):
            coar.fit(study, columns=columns)

    @pytest.mark.parametrize("columns", [[99], [-1], ["nobody"], [], [1, 1]])
    def test_others_are_refused(self, study, columns):
        with pytest.raises(coar.errors.AxisError, match="column"):
            coar.fit(study, columns=columns)


@pytest.mark.parametrize("solver", ["lasagna", coar.Ridge, 3, None])
def test_what_is_no_solver_is_refused(study, solver):
    with pytest.raises(SettingError, match="not a solver"):
        coar.fit(study, solver)


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(SettingError, match="a study") as error:
        coar.fit(tmp_path)
    assert "Study.open" in error.value.todo


def test_edges_are_warned_of_for_every_algorithm():
    masks, outputs = rows_of(coar.Bernoulli(ablation_fraction=0.1), 300)
    for algorithm in ("eigen", "cholesky"):
        problem = Problem.from_arrays(masks, outputs)
        fitter = coar.Ridge(penalties=(10.0, 20.0, 40.0), algorithm=algorithm).prepare(problem)
        with pytest.warns(CoarWarning, match="widen"):
            list(fit_blocks(problem, fitter))
