"""evaluate: perfect attributions are perfect, foreign ones are refused, nothing is run twice."""

from __future__ import annotations

import numpy as np
import pytest

from coar.attributions import Attributions
from coar.axes import Axis
from coar.designs import EVALUATION, Bernoulli
from coar.errors import AxisError, FitError, SettingError
from coar.evaluation import Evaluation, evaluate
from coar.executors.serial import Serial
from coar.experiments.ablation import ComponentAblation
from coar.fingerprints import model_fingerprint
from coar.metrics import pearson
from coar.regression import fit
from coar.study import Study
from coar.testing import SubsetMean, linear_experiment
from tests import cases, naive
from tests.contributions import make_attributions, make_experiment
from tests.refused import refused

RANDOM = np.random.default_rng(0)


class CountingSerial(Serial):
    """Remembers how many items it was asked for."""

    def __init__(self):
        self.items = 0

    def run(self, session, items):
        self.items += len(items)
        yield from super().run(session, items)


def attributions_of(experiment, weights, output="score", **provenance):
    axes = experiment.components, experiment.columns[output]
    return Attributions(weights, np.zeros(len(weights)), *axes, output, provenance=provenance)


def quiet(experiment, methods, fractions=(0.1, 0.3), num_rows=12, seed=1, **more):
    return evaluate(experiment, methods, fractions, num_rows, seed, progress=False, **more)


@pytest.fixture
def linear():
    """An experiment, its true attributions, and others."""
    experiment, weights = linear_experiment()
    noise = np.random.default_rng(0).normal(size=weights.shape)
    return (
        experiment,
        attributions_of(experiment, weights),
        attributions_of(experiment, weights + 0.3 * noise),
    )


# ------------------------------------------------------------------------------------ its numbers


def test_true_attributions_are_perfect(linear):
    experiment, truth, _ = linear
    table = quiet(experiment, {"truth": truth}).table
    assert len(table) == 2 * len(experiment.columns["score"])
    for figure in ("pearson", "spearman", "r2", "slope"):
        assert table[figure].to_numpy() == pytest.approx(1.0, abs=1e-4), figure


def test_twice_the_attributions_correlate_as_well_but_are_not_calibrated(linear):
    experiment, truth, _ = linear
    table = quiet(experiment, {"twice": attributions_of(experiment, 2 * truth.weights)}).table
    assert table.pearson.to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert table.slope.to_numpy() == pytest.approx(0.5, abs=1e-4)
    assert (table.r2 < 1).all()


def test_the_truth_is_that_of_really_ablated_models():
    experiment = cases.make_case("residual").experiment()
    count = len(experiment.components)
    zero = attributions_of(experiment, np.zeros((5, count)), output="margin")
    found = quiet(experiment, {"zero": zero}, fractions=[0.3], num_rows=4, seed=9)
    masks = Bernoulli(ablation_fraction=0.3, seed=9, stream=EVALUATION).masks(range(4), count)
    assert found.truth[0.3] == pytest.approx(naive.rows(experiment, masks)["margin"], abs=1e-5)


def test_means_are_those_of_the_table(linear):
    experiment, truth, noisy = linear
    found = quiet(experiment, {"truth": truth, "noisy": noisy})
    means = found.means().set_index(["method", "ablation_fraction"])
    part = found.table.query("method == 'noisy' and ablation_fraction == 0.3")
    row = means.loc["noisy", 0.3]
    assert row.correlation == pytest.approx(part.pearson.mean())
    assert row.r2 == pytest.approx(part.r2.median())
    assert row.slope == pytest.approx(part.slope.median())
    assert row.low < row.correlation < row.high
    assert found.methods == ["truth", "noisy"]


def test_data_points_go_through_the_same(tmp_path):
    experiment = SubsetMean()
    study = Study.create(tmp_path / "study", experiment, Bernoulli(ablation_fraction=0.3), num_rows=400)
    study.run(progress=False)
    found = quiet(experiment, {"regression": fit(study)}, fractions=[0.3], num_rows=40)
    assert found.table.pearson.min() > 0.95
    assert found.table.slope.to_numpy() == pytest.approx(1.0, abs=0.15)


def test_attributions_of_some_columns_are_compared_with_those_columns(linear):
    experiment, truth, _ = linear
    found = quiet(experiment, {"truth": truth.subset([7, 2])}, fractions=[0.3])
    assert found.columns.names == ("7", "2")
    assert found.table.r2.to_numpy() == pytest.approx(1.0, abs=1e-4)


def test_a_method_compared_with_itself_differs_by_nothing(linear):
    experiment, truth, noisy = linear
    found = quiet(experiment, {"truth": truth, "noisy": noisy}).compare("noisy", "noisy")
    assert found.ablation_fraction.tolist() == [0.1, 0.3]
    assert found[["difference", "low", "high"]].to_numpy().tolist() == [[0.0] * 3] * 2


def test_the_better_method_is_better_and_the_order_gives_the_sign(linear):
    experiment, truth, noisy = linear
    found = quiet(experiment, {"truth": truth, "noisy": noisy})
    forwards, backwards = found.compare("truth", "noisy"), found.compare("noisy", "truth")
    means = found.means().set_index(["ablation_fraction", "method"]).correlation.unstack()
    assert (forwards.low > 0).all()
    assert forwards.difference.to_numpy() == pytest.approx((means.truth - means.noisy).to_numpy())
    assert forwards.difference.to_numpy() == pytest.approx(-backwards.difference.to_numpy())
    assert forwards.low.to_numpy() == pytest.approx(-backwards.high.to_numpy())


def test_constant_outputs_are_counted_and_left_out():
    contributions = RANDOM.normal(size=(4, 8))
    contributions[1] = 0.0
    experiment = make_experiment(contributions)
    found = quiet(experiment, {"truth": make_attributions(contributions, experiment)})
    assert found.means().undefined.tolist() == [1, 1]
    assert found.means().correlation.to_numpy() == pytest.approx(1.0)
    assert "left out: up to 1 constant column" in found.summary()


def test_the_summary_shows_every_method_and_fraction(linear):
    experiment, truth, noisy = linear
    text = quiet(experiment, {"truth": truth, "noisy": noisy}, fractions=[0.05, 0.1, 0.125]).summary()
    for words in ("truth", "noisy", "ablate 5%", "ablate 10%", "ablate 12.5%", "10 columns, 12 held-out"):
        assert words in text
    assert "1.000 [1.000, 1.000]" in text


def test_the_plot_is_of_these_means(linear):
    experiment, truth, _ = linear
    ax = quiet(experiment, {"truth": truth}).plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["truth"]


# ----------------------------------------------------------------------- repetition and resumption


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(linear):
    experiment, _, noisy = linear
    first, again = (quiet(experiment, {"noisy": noisy}).means() for _ in range(2))
    assert first.equals(again)
    assert not first.equals(quiet(experiment, {"noisy": noisy}, seed=2).means())


@pytest.mark.parametrize("toy", ["linear", "subset mean"])
def test_a_directory_changes_no_number(toy, tmp_path):
    experiment = linear_experiment()[0] if toy == "linear" else SubsetMean()
    output = next(iter(experiment.columns))
    shape = len(experiment.columns[output]), len(experiment.components)
    methods = {"random": attributions_of(experiment, RANDOM.normal(size=shape), output)}
    in_memory = quiet(experiment, methods)
    on_disk = quiet(experiment, methods, directory=tmp_path)
    assert in_memory.table.equals(on_disk.table)
    assert in_memory.means().equals(on_disk.means())


def test_rows_in_the_directory_are_used_again(linear, tmp_path):
    experiment, truth, noisy = linear
    counting = CountingSerial()
    first = quiet(experiment, {"noisy": noisy}, directory=tmp_path, executor=counting)
    assert counting.items > 0
    counting.items = 0
    again = quiet(experiment, {"truth": truth, "noisy": noisy}, directory=tmp_path, executor=counting)
    assert counting.items == 0
    seen = [np.asarray(found.predictions["noisy"][0.1]) for found in (first, again)]
    assert np.array_equal(*seen)
    quiet(experiment, {"noisy": noisy}, [0.1, 0.2], directory=tmp_path, executor=counting)
    assert counting.items > 0


@pytest.mark.parametrize("num_rows", [20, 5])
def test_more_rows_are_added_and_fewer_are_the_first_ones(linear, tmp_path, num_rows):
    experiment, _, noisy = linear
    quiet(experiment, {"noisy": noisy}, directory=tmp_path, num_rows=12)
    again = quiet(experiment, {"noisy": noisy}, directory=tmp_path, num_rows=num_rows)
    assert again.table.equals(quiet(experiment, {"noisy": noisy}, num_rows=num_rows).table)


def test_fractions_that_differ_a_little_are_kept_apart(linear, tmp_path):
    experiment, _, noisy = linear
    fractions = [0.3, 0.3000000001]
    on_disk = quiet(experiment, {"noisy": noisy}, fractions, directory=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert on_disk.table.equals(quiet(experiment, {"noisy": noisy}, fractions).table)


def test_the_model_is_not_touched(linear, tmp_path):
    experiment, truth, _ = linear
    model = experiment.task.model
    before = model_fingerprint(model)
    quiet(experiment, {"truth": truth})
    quiet(experiment, {"truth": truth}, directory=tmp_path)
    assert model_fingerprint(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


# --------------------------------------------------------------------------------------- bad input


def test_attributions_of_another_model_are_refused(linear):
    experiment = linear[0]
    foreign = make_attributions(RANDOM.normal(size=(10, 12)))
    foreign.output = "score"
    with refused(AxisError, "components", "attributions 'mine'", "experiment", "model differs"):
        quiet(experiment, {"mine": foreign})


def test_attributions_of_other_components_are_refused(linear):
    experiment, truth, _ = linear
    fewer = ComponentAblation(experiment.task, experiment.component_set.pick(range(5)))
    with refused(AxisError, "components", "attributions 'mine'", "experiment", "12 components", "5 comp"):
        quiet(fewer, {"mine": truth})


def test_attributions_of_other_examples_are_refused(linear):
    other, weights = linear_experiment(num_examples=8)
    with refused(AxisError, "columns", "attributions 'mine'", "experiment", "data differs"):
        quiet(linear[0], {"mine": attributions_of(other, weights)})


def test_methods_of_different_columns_are_refused(linear):
    experiment, truth, noisy = linear
    with refused(AxisError, "columns", "attributions 'noisy'", "attributions 'truth'", "4 columns"):
        quiet(experiment, {"truth": truth, "noisy": noisy.subset(range(4))})


def test_attributions_of_another_output_are_refused(linear):
    experiment, truth, _ = linear
    truth.output = "loss"
    with refused(SettingError, "no such output", "score", "loss"):
        quiet(experiment, {"truth": truth})


def test_rows_that_were_fitted_on_are_refused(linear):
    experiment, truth, _ = linear
    design = {"name": "bernoulli", "ablation_fraction": 0.1, "seed": 1, "stream": EVALUATION}
    fitted = attributions_of(experiment, truth.weights, design=design)
    with refused(SettingError, "'mine' were fitted on the very rows", "seed 1", EVALUATION, "another seed"):
        quiet(experiment, {"mine": fitted})
    assert quiet(experiment, {"mine": fitted}, seed=2).means().correlation.notna().all()


def test_the_seed_of_the_fit_may_be_that_of_the_evaluation(linear):
    """The streams differ, so the rows do."""
    experiment, truth, _ = linear
    design = Bernoulli(ablation_fraction=0.1, seed=1)
    held_out = quiet(
        experiment, {"mine": attributions_of(experiment, truth.weights, design=design.model_dump())}, [0.1]
    )
    fitted = experiment.prepare(experiment.device)(design.masks(range(12), 12))["score"]
    assert not np.array_equal(held_out.truth[0.1], fitted)
    assert np.abs(np.nan_to_num(pearson(held_out.truth[0.1], fitted))).max() < 0.9


@pytest.mark.parametrize("num_rows", [2, 0, -1])
def test_fewer_than_three_rows_are_refused(linear, num_rows):
    with refused(FitError, "a correlation needs rows", "at least 3", str(num_rows)):
        quiet(linear[0], {"truth": linear[1]}, num_rows=num_rows)


def test_nothing_to_evaluate_is_refused(linear):
    with refused(SettingError, "nothing to evaluate", "attributions"):
        quiet(linear[0], {})
    with refused(SettingError, "nothing to evaluate at", "ablation_fractions"):
        quiet(linear[0], {"truth": linear[1]}, fractions=[])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(linear, fraction):
    with refused(SettingError, "ablation_fraction", str(fraction)):
        quiet(linear[0], {"truth": linear[1]}, fractions=[fraction])


def test_comparing_with_an_unknown_method_is_refused(linear):
    found = quiet(linear[0], {"truth": linear[1]})
    with refused(SettingError, "no such method", "truth", "'magic'"):
        found.compare("truth", "magic")


def test_methods_are_compared_over_the_same_columns():
    """B is A with its worse columns made constant: where both are defined they are equal."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 20))
    a = truth + rng.normal(size=(40, 20)) * np.linspace(0.1, 5, 20)
    b = a.copy()
    b[:, 10:] = 1.0
    columns = Axis("columns", [str(i) for i in range(20)], {})
    found = Evaluation(columns, {0.1: truth}, {"A": {0.1: a}, "B": {0.1: b}}, seed=0)
    assert (found.compare("B", "A")[["difference", "low", "high"]].abs() < 1e-12).all(axis=None)


def test_natural_mistakes_are_named(linear):
    with refused(SettingError, "methods have names", '{"ridge": attributions}'):
        evaluate(linear[0], linear[1], [0.1], progress=False)
    assert list(evaluate(linear[0], {"truth": linear[1]}, 0.1, 5, progress=False).truth) == [0.1]
