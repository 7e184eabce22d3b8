"""Published attributions and stores are evaluated like any others, on a real small network."""

import numpy as np
import pytest
import torch

import coar
from coar.errors import AxisError, OutputError
from coar.interop import export_store, import_store, load_weights, save_weights
from coar.saved_attributions import saved_attributions
from coar.tasks.cifar import make_task
from tests.refused import refused

FRACTION, ROWS, HELD_OUT = 0.1, 300, 20


@pytest.fixture(scope="module")
def experiment():
    task = make_task("resnet8", small=True, num_examples=6)
    return coar.ComponentAblation(task, coar.find_components(task.model, published="cifar_resnet"))


@pytest.fixture(scope="module")
def study(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop") / "study"
    found = coar.Study.create(folder, experiment, coar.Bernoulli(ablation_fraction=FRACTION), ROWS)
    found.run(progress=False)
    return found


@pytest.fixture(scope="module")
def ridge(study):
    return coar.fit(study, coar.Ridge(penalties=[1.0]))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return tmp_path_factory.mktemp("held-out")


@pytest.fixture
def judge(experiment, held_out):
    """Evaluates attributions on the same ablations, which are run once."""

    def evaluate(**methods):
        options = {"num_rows": HELD_OUT, "directory": held_out, "progress": False}
        return coar.evaluate(experiment, methods, FRACTION, **options)

    return evaluate


@pytest.fixture
def named(study):
    return {"components": study.components, "columns": study.columns["margin"], "output": "margin"}


def as_published(study, ridge, path, dtype=torch.float32):
    """A file by run_regression.py: weights per standard deviation of a mask, the bias a mean output."""
    masks = np.asarray(study.masks[:], dtype=np.float64)
    weight = ridge.weights.astype(np.float64) * masks.std(axis=0)
    bias = ridge.intercept + ridge.weights.astype(np.float64) @ masks.mean(axis=0)
    tensors = {"weight": torch.tensor(weight.T).to(dtype), "bias": torch.tensor(bias).to(torch.float32)}
    torch.save(tensors | {"lam": torch.ones(len(bias))}, path)
    return tensors


@pytest.mark.slow
class TestWeights:
    def test_of_a_file_of_ours_score_as_they_did(self, ridge, judge, named, tmp_path):
        save_weights(ridge, tmp_path / "ours.pt")
        save_weights(ridge, tmp_path / "half.pt", dtype="float16")
        found = judge(
            ours=load_weights(tmp_path / "ours.pt", **named),
            half=load_weights(tmp_path / "half.pt", **named),
            ridge=ridge,
        )
        means = found.means().set_index("method")
        assert means.correlation["ridge"] > 0.3
        figures = ["correlation", "spearman", "r2", "slope", "low", "high"]
        np.testing.assert_allclose(means.loc["ours", figures], means.loc["ridge", figures], rtol=1e-9)
        assert means.correlation["half"] == pytest.approx(means.correlation["ridge"], abs=1e-3)
        assert np.isnan(means.forwards["ours"])  # the file does not say what it cost
        assert means.family["ours"] == "imported"

    def test_of_the_published_solver_score_as_they_did_once_they_are_scaled_back(
        self, study, ridge, judge, named, tmp_path
    ):
        tensors = as_published(study, ridge, tmp_path / "published.pt")
        assert tensors["weight"].shape == (len(study.components), 6)
        found = judge(
            scaled=load_weights(tmp_path / "published.pt", standardised_by=FRACTION, **named),
            unscaled=load_weights(tmp_path / "published.pt", standardised_by="none", **named),
            ridge=ridge,
        )
        means = found.means().set_index("method")
        assert means.correlation["scaled"] == pytest.approx(means.correlation["ridge"], abs=0.02)
        assert means.slope["scaled"] == pytest.approx(means.slope["ridge"], rel=0.1)
        # Without it, order survives and size does not: by the deviation of a mask, 0.3
        assert means.correlation["unscaled"] == pytest.approx(means.correlation["ridge"], abs=1e-3 + 0.02)
        assert means.slope["unscaled"] == pytest.approx(means.slope["ridge"] / 0.3, rel=0.15)
        assert means.r2["unscaled"] < means.r2["scaled"]

    def test_with_nan_are_refused_set_to_zero_or_left_out(self, study, ridge, judge, named, tmp_path):
        tensors = as_published(study, ridge, tmp_path / "published.pt")
        tensors["weight"][3, 2] = float("nan")
        torch.save(tensors, tmp_path / "nan.pt")
        asked = {"standardised_by": FRACTION, **named}
        with refused(OutputError, "nan.pt", "1 weights", "column 2, component 3", 'nan="zero"'):
            load_weights(tmp_path / "nan.pt", **asked)
        whole = judge(
            zero=load_weights(tmp_path / "nan.pt", nan="zero", **asked),
            before=load_weights(tmp_path / "published.pt", **asked),
        )
        others = whole.table[whole.table.column != study.columns["margin"].names[2]]
        pearson = {name: part.pearson.to_numpy() for name, part in others.groupby("method")}
        np.testing.assert_allclose(pearson["zero"], pearson["before"], rtol=1e-12)
        fewer = judge(drop=load_weights(tmp_path / "nan.pt", nan="drop", **asked))
        assert len(fewer.columns) == 5
        np.testing.assert_allclose(fewer.table.pearson, pearson["before"], rtol=1e-9)

    def test_can_be_put_beside_those_of_a_study(self, study, ridge, judge, named, tmp_path):
        save_weights(ridge, tmp_path / "theirs.pt")
        load_weights(tmp_path / "theirs.pt", **named).save(study.attributions_path("theirs"))
        saved = saved_attributions(study)
        assert list(saved) == ["theirs"]
        found = judge(**saved, ridge=ridge).means()
        assert found.correlation[0] == pytest.approx(found.correlation[1])

    def test_without_the_names_of_the_experiment_are_refused(self, ridge, judge, tmp_path):
        save_weights(ridge, tmp_path / "ours.pt")
        remedy = "pass components=study.components, columns=study.columns[OUTPUT] to load_weights"
        with refused(AxisError, "attributions 'ours'", "components without weights (experiment)", remedy):
            judge(ours=load_weights(tmp_path / "ours.pt", output="margin"))
        names = {"components": ridge.components, "columns": list(ridge.columns.names)}  # of which model?
        with refused(AxisError, "attributions 'ours'", "a file knows the columns of no model", remedy):
            judge(ours=load_weights(tmp_path / "ours.pt", output="margin", **names))

    def test_dropped_columns_are_left_out_of_the_others_as_the_page_says(
        self, study, ridge, judge, named, tmp_path
    ):
        tensors = as_published(study, ridge, tmp_path / "published.pt")
        tensors["weight"][3, 2] = float("nan")
        torch.save(tensors, tmp_path / "nan.pt")
        found = load_weights(tmp_path / "nan.pt", nan="drop", standardised_by=FRACTION, **named)
        both = judge(theirs=found, ridge=ridge.subset(found.columns.names))
        assert len(both.columns) == 5
        assert both.means().correlation[0] == pytest.approx(both.means().correlation[1], abs=0.02)


@pytest.mark.slow
def test_a_store_of_the_original_code_is_fitted_and_evaluated_on_its_model(
    study, experiment, judge, ridge, tmp_path
):
    export_store(study, tmp_path / "store")
    axes = {"components": experiment.components, "columns": experiment.columns["margin"]}
    imported = import_store(tmp_path / "store", tmp_path / "imported", **axes)
    found = judge(imported=coar.fit(imported, coar.Ridge(penalties=[1.0])), ridge=ridge)
    means = found.means().set_index("method")
    assert means.correlation["imported"] == pytest.approx(means.correlation["ridge"], abs=1e-3)
    assert means.slope["imported"] == pytest.approx(means.slope["ridge"], rel=1e-3)
    assert means.forwards["imported"] == means.forwards["ridge"] == ROWS
