"""What an evaluation reads and computes as it goes: on disk, in a temporary folder, block by block."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

import coar
from coar import metrics
from coar.attributions import Attributions
from coar.baselines import leave_one_out
from coar.designs import Bernoulli
from coar.errors import CoarWarning, FitError, OutputError, SettingError
from coar.evaluation import evaluate, held_out
from coar.evaluation.predicted import Chosen, PackedMasks, Predicted
from coar.regression import fit
from coar.regression.problem import Problem
from coar.study import Study
from coar.testing import SubsetMean, linear_experiment
from tests.refused import refused


def random_attributions(experiment, output, seed=0, **provenance):
    axes = experiment.components, experiment.columns[output]
    weights = np.random.default_rng(seed).normal(size=(len(axes[1]), len(axes[0])))
    return Attributions(weights, np.arange(len(axes[1])), *axes, output, provenance=provenance)


def quiet(experiment, methods, fractions=(0.1, 0.3), num_rows=12, **more):
    return evaluate(experiment, methods, fractions, num_rows, progress=False, **more)


@pytest.fixture
def subset():
    experiment = SubsetMean()
    return experiment, {str(seed): random_attributions(experiment, "mean", seed) for seed in range(2)}


# ----------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "key",
    [
        np.s_[:],
        np.s_[2:5],
        np.s_[:, 1],
        np.s_[:, -1],
        np.s_[:, 1:3],
        np.s_[1:3, [4, 0]],
        np.s_[3],
        np.s_[:, np.array([True, False, True, False, False, False])],
    ],
    ids=str,
)
def test_lazy_tables_are_indexed_like_arrays(subset, key):
    experiment, methods = subset
    masks = np.random.default_rng(1).random((7, len(experiment.components))) < 0.8
    predicted = methods["0"].predict(masks)
    assert np.array_equal(Predicted(methods["0"], PackedMasks.of([masks]))[key], predicted[key])
    whole = np.random.default_rng(2).normal(size=(9, 12))
    positions = np.array([11, 0, 3, 4, 8, 2])
    assert np.array_equal(Chosen(whole, positions, 7)[key], whole[:7, positions][key])


def test_predictions_of_some_columns_are_those_of_all(subset, tmp_path):
    experiment, methods = subset
    masks = np.random.default_rng(1).random((7, len(experiment.components))) < 0.8
    found = methods["0"]
    found.save(tmp_path / "found")
    for one in (found, Attributions.load(tmp_path / "found")):
        for columns in (slice(1, 4), np.array([5, 0, 2]), np.arange(6)[::-1]):
            # A product with fewer columns may be rounded differently.
            assert one.predict(masks, columns) == pytest.approx(found.predict(masks)[:, columns], abs=1e-12)


@pytest.mark.parametrize("block", [1, 4, 4096])
def test_blocks_of_columns_change_no_figure(subset, monkeypatch, block):
    experiment, methods = subset
    expected = quiet(experiment, methods)
    monkeypatch.setattr(metrics, "COLUMN_BLOCK", block)
    found = quiet(experiment, methods)
    for ours, theirs in (
        (found.means(), expected.means()),
        (found.compare("0", "1"), expected.compare("0", "1")),
    ):
        ours, theirs = (table.select_dtypes("number").to_numpy() for table in (ours, theirs))
        assert ours == pytest.approx(theirs, abs=1e-9, nan_ok=True)


def test_too_many_outputs_go_to_a_temporary_folder_that_goes_with_the_evaluation(subset, monkeypatch):
    experiment, methods = subset
    expected = quiet(experiment, methods)
    monkeypatch.setattr(held_out, "MEMORY_BYTES", 0)
    found = quiet(experiment, methods)
    folders = [folder.path for folder in found._kept]
    assert len(folders) == 2
    assert all(folder.exists() for folder in folders)
    assert found.means().equals(expected.means())
    del found
    gc.collect()
    assert not any(folder.exists() for folder in folders)


def test_a_figure_is_computed_once(subset):
    experiment, methods = subset
    found = quiet(experiment, methods)
    first = found.means()
    found.predictions = {name: dict.fromkeys(found.truth) for name in methods}  # nothing to compute from
    assert found.means().equals(first)


# ------------------------------------------------------------------------------------ one example


def test_an_example_is_a_column_of_truth_and_prediction(subset):
    experiment, methods = subset
    found = quiet(experiment, methods)
    for column in (2, found.columns.names[2]):
        truth, predicted = found.example(column, "1", 0.3)
        assert np.array_equal(truth, np.asarray(found.truth[0.3])[:, 2])
        assert predicted == pytest.approx(np.asarray(found.predictions["1"][0.3])[:, 2])
    assert np.array_equal(found.example(0)[0], np.asarray(found.truth[0.1])[:, 0])
    for wrong, words in (
        ((2, "2"), ("no such method", "0, 1")),
        ((2, "0", 0.2), ("not evaluated at this fraction", "0.1, 0.3")),
        (("nobody",), ("no such column", "nobody")),
        ((99,), ("no such column", "99")),
    ):
        with refused(SettingError, *words):
            found.example(*wrong)


# ----------------------------------------------------------------------------------------- costs


def test_means_say_what_made_a_method_and_what_it_cost():
    experiment, weights = linear_experiment()
    axes = experiment.components, experiment.columns["score"]
    methods = {
        "loo": leave_one_out(experiment, progress=False),
        "gates": coar.gate_gradients(experiment, 0.1, passes=40, progress=False),
        "mine": Attributions(weights, np.zeros(len(weights)), *axes, "score"),
    }
    means = quiet(experiment, methods, [0.1]).means().set_index("method")
    assert means.family.tolist() == ["leave_one_out", "gate gradients", "by hand"]
    assert means.forwards["loo"] == len(experiment.components) + 1
    assert means.forwards["gates"] == 3 * methods["gates"].provenance["passes"]
    assert np.isnan(means.forwards["mine"])


def test_rows_that_attributions_were_calibrated_on_are_refused(subset):
    experiment, _ = subset
    seen = {"ablation_fraction": 0.1, "seed": 1, "stream": "evaluation"}
    calibrated = random_attributions(experiment, "mean", calibration=seen)
    with refused(SettingError, "'mine' were calibrated on the very rows", "seed 1", "another seed"):
        quiet(experiment, {"mine": calibrated})


def test_a_hybrid_whose_prior_was_fitted_to_these_rows_is_refused(subset):
    experiment, _ = subset
    prior = {"design": {"ablation_fraction": 0.1, "seed": 1, "stream": "evaluation"}}
    with refused(SettingError, "'mine' were fitted on the very rows", "seed 1"):
        quiet(experiment, {"mine": random_attributions(experiment, "mean", prior=prior)})


def test_rows_that_failed_are_not_left_out_of_an_evaluation(tmp_path):
    """An evaluation on the rows that went well would be one on rows chosen by their outputs."""
    task = coar.Task(
        Fragile().eval(), [torch.ones(4) for _ in range(3)], outputs={"score": run}, device="cpu"
    )
    experiment = coar.ComponentAblation(
        task, coar.find_components(task.model, kinds=["neuron"], include=["hidden"])
    )
    methods = {"zero": random_attributions(experiment, "score")}
    for _ in range(2):  # the second finds the rows of the first
        with refused(OutputError, "cannot be stored"):
            quiet(experiment, methods, [0.3], num_rows=30, directory=tmp_path)
    assert len(list((tmp_path / "fraction-0.3-seed-1" / "failures").iterdir())) > 0


class Fragile(torch.nn.Module):
    """Infinite where the first unit is away."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(4, 6)
        torch.nn.init.constant_(self.hidden.weight, 1.0)
        torch.nn.init.constant_(self.hidden.bias, 0.0)

    def forward(self, x):
        hidden = self.hidden(x)
        return hidden.sum(dim=1) + torch.where(hidden[:, 0] == 0, torch.inf, 0.0)


def run(model, batch):
    return model(batch)


def test_natural_mistakes_are_named(subset):
    experiment, methods = subset
    cases = {
        "the first argument is an experiment": (object(), methods, [0.1]),
        "method 'a' is no attributions": (experiment, {"a": np.ones(3)}, [0.1]),
        "ablation_fractions out of range": (experiment, methods, [10]),
    }
    for words, arguments in cases.items():
        with refused(SettingError, words):
            quiet(*arguments)
    for wrong in (None, "0.1", [0.1, None], [True]):
        with refused(SettingError, "ablation_fractions out of range", "0.05 to 0.1 is usual"):
            quiet(experiment, methods, wrong)
    assert list(quiet(experiment, methods, np.float32(0.25)).truth) == [0.25]
    with refused(SettingError, "num_rows"):
        quiet(experiment, methods, num_rows="x")
    for column in (1.5, True, None):
        with refused(SettingError, "no such column"):
            quiet(experiment, methods).example(column)


def test_masks_that_ablate_nothing_are_warned_of(subset):
    experiment, methods = subset
    with pytest.warns(CoarWarning, match=r"a mask ablates 0.015 of 15 components on average"):
        quiet(experiment, methods, [0.001])


def test_a_fraction_comes_once(subset):
    with refused(SettingError, "a fraction comes twice", "each once"):
        quiet(*subset, fractions=[0.1, 0.1])


# ------------------------------------------------------------------------ fits to some of the rows


@pytest.mark.parametrize("rows", [150, range(40, 171), range(200)])
def test_a_fit_to_some_rows_is_that_of_these_rows(tmp_path, rows):
    design = Bernoulli(ablation_fraction=0.3)
    study = Study.create(tmp_path / "study", SubsetMean(), design, 200, rows_per_shard=30)
    study.run(progress=False)
    found = fit(study, rows=rows)
    here = slice(0, rows) if isinstance(rows, int) else slice(rows.start, rows.stop)
    apart = Problem.from_arrays(np.asarray(study.masks)[here], np.asarray(study.outputs["mean"])[here])
    expected = coar.Ridge().prepare(apart).fit(slice(0, len(study.columns["mean"])))
    assert found.weights == pytest.approx(expected.weights, abs=1e-6)
    assert found.provenance["rows"] == here.stop - here.start
    assert found.provenance["row_numbers"] == [here.start, here.stop]
    assert fit(study).provenance["rows"] == 200  # nothing of it was kept


def test_rows_need_not_all_be_there_for_a_fit_to_the_first(tmp_path):
    design = Bernoulli(ablation_fraction=0.3)
    study = Study.create(tmp_path / "study", SubsetMean(), design, 90, rows_per_shard=30)
    study.run(progress=False)
    expected = fit(study, rows=60)
    study.store.path(2).unlink()
    assert np.array_equal(fit(study, rows=60).weights, expected.weights)
    with refused(FitError, "1 of 3 shards", "61 rows"):
        fit(study, rows=61)


@pytest.mark.parametrize("rows", [0, 1, 91, range(80, 91), range(0, 90, 2), range(-5, 10), range(5, 6)])
def test_rows_that_are_not_there_are_refused(tmp_path, rows):
    study = Study.create(tmp_path / "study", SubsetMean(), Bernoulli(ablation_fraction=0.3), 90)
    study.run(progress=False)
    with refused((FitError, SettingError), "rows"):
        fit(study, rows=rows)
