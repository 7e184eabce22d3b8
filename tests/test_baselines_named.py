"""Baselines by name: those of the functions, saved in a study, once."""

import numpy as np
import pytest

import coar
from coar import baselines
from coar.baselines.named import BASELINES, make, make_baseline, report, wanted_baselines
from coar.errors import CoarError, FitError, SettingError, StudyError
from coar.executors.serial import Serial
from coar.testing import linear_experiment
from tests import gate_networks
from tests.refused import refused

STEPS = {"passes": 4}
FUNCTIONS = {name: getattr(baselines, name.replace("-", "_"), None) for name in BASELINES}


@pytest.fixture
def study(tmp_path):
    design = coar.Bernoulli(ablation_fraction=0.25)
    return coar.Study.create(tmp_path / "study", linear_experiment()[0], design, num_rows=20)


def made(study, name, **options):
    return make_baseline(study, name, progress=False, **options)


def reported(study, *names, **options):
    """What the command line prints."""
    return [report(one, make(one)) for one in wanted_baselines(study, names, progress=False, **options)]


SAMPLED = ("kept-mean", "uniform-gradient-sampling")
OF_THE_STUDY = ("gate-gradients", "hybrid", *SAMPLED)


def test_all_that_the_package_has_are_there():
    assert set(BASELINES) == {name.replace("_", "-") for name in baselines.__all__} | {"gate-gradients"}


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in OF_THE_STUDY])
def test_is_what_the_function_makes(study, name):
    found, quiet = made(study, name), {} if "random" in name or "norm" in name else {"progress": False}
    expected = FUNCTIONS[name](study.experiment, **quiet)
    np.testing.assert_array_equal(found.weights, expected.weights)
    np.testing.assert_array_equal(found.intercept, expected.intercept)
    assert found.provenance == expected.provenance
    assert (study.attributions_path(name) / "index.json").exists()


def test_gate_gradients_are_for_the_fraction_of_the_study(study):
    found = made(study, "gate-gradients", passes=40)
    expected = coar.gate_gradients(study.experiment, 0.25, passes=40, progress=False)
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert found.provenance["ablation_fraction"] == 0.25


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("passes", [None, 40])
def test_plain_means_are_for_the_fraction_of_the_study(study, name, passes):
    found = made(study, name, passes=passes)
    expected = FUNCTIONS[name](study.experiment, 0.25, passes or 100, progress=False)
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert found.provenance == expected.provenance


def test_a_hybrid_is_of_the_rows_of_the_study_and_a_prior_near_its_masks(study):
    with refused(FitError, "rows of", "are missing"):
        made(study, "hybrid")
    assert not study.attributions_path("hybrid").exists()
    study.run(progress=False)
    found = made(study, "hybrid")
    prior = coar.attribution_patching(study.experiment, gates=0.75, progress=False)
    expected = coar.hybrid(study, prior)
    np.testing.assert_array_equal(found.weights, expected.weights)
    assert found.provenance["prior"]["ablation_fraction"] == 0.25
    assert made(study, "hybrid").provenance == found.provenance
    study.extend(30)
    study.run(progress=False)
    with refused(StudyError, "hybrid", "from 30 rows", "the same from 20 rows", "another name"):
        made(study, "hybrid")
    assert made(study, "hybrid", save_as="more").provenance["rows"] == 30


@pytest.mark.parametrize("name", ["neuron-conductance", "internal-influence", "integrated-gradients"])
def test_passes_are_steps_along_a_path(study, name):
    assert made(study, name, passes=3).provenance["passes"] == 3


@pytest.mark.parametrize("name", ["leave-one-out", "gate-gradients", "neuron-conductance"])
def test_is_made_once(study, name):
    first = made(study, name)
    index = study.attributions_path(name) / "index.json"
    before = index.stat().st_mtime_ns
    again = made(study, name)
    np.testing.assert_array_equal(again.weights, first.weights)
    assert index.stat().st_mtime_ns == before


def test_rows_of_an_interrupted_leave_one_out_are_kept(study):
    class Stopping(Serial):
        def run(self, session, items):
            for number, done in enumerate(super().run(session, items)):
                yield done
                if number == 0:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(study, "leave-one-out", executor=Stopping())
    shards = {
        path: path.stat().st_mtime_ns for path in study.directory.glob("baselines/leave-one-out-*/shards/*")
    }
    assert shards
    made(study, "leave-one-out")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_more_passes_need_another_name(study):
    made(study, "neuron-conductance", passes=3)
    assert made(study, "neuron-conductance", passes=2).provenance["passes"] == 3  # there is better
    with refused(StudyError, "neuron-conductance", "from 5 steps", "from 3 steps", "another name"):
        made(study, "neuron-conductance", passes=5)
    assert made(study, "neuron-conductance", passes=5, save_as="finer").provenance["passes"] == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("internal-influence", ("from 50 steps (the default)", "from 3 steps", "--passes 3")),
        ("integrated-gradients", ("from 20 steps (the default)", "from 3 steps")),
    ],
)
def test_fewer_than_the_default_are_not_taken_for_it(study, name, words):
    made(study, name, passes=3)
    with refused(StudyError, *words, "another name"):
        made(study, name)
    assert made(study, name, passes=3).provenance["passes"] == 3
    assert made(study, name, save_as="whole").provenance["passes"] > 3


def test_gate_gradients_are_taken_where_they_are_as_good_as_they_would_be_made(tmp_path):
    design = coar.Bernoulli(ablation_fraction=0.25)
    study = coar.Study.create(tmp_path / "study", gate_networks.make_experiment(), design, num_rows=20)
    value = {"output": "value"}
    few = made(study, "gate-gradients", passes=3, **value)
    assert few.provenance["correlation"] < 0.95  # else this test shows nothing
    with refused(StudyError, "an estimated correlation of 0.95", f"the same from {few.provenance['passes']}"):
        made(study, "gate-gradients", **value)
    good = made(study, "gate-gradients", save_as="good", **value)  # not made of the few passes that there are
    assert good.provenance["correlation"] >= 0.95
    more = made(study, "gate-gradients", passes=good.provenance["passes"] + 1, save_as="more", **value)
    assert more.provenance["passes"] > good.provenance["passes"]
    again = made(study, "gate-gradients", save_as="good", **value)
    assert again.provenance == good.provenance


def test_what_was_there_is_said(study):
    path = study.attributions_path("internal-influence")
    assert reported(study, "internal-influence")[0][1:] == [f"internal-influence: in {path}"]
    said = f"internal-influence: in {path} (already there: 50 steps)"
    assert reported(study, "internal-influence")[0][1:] == [said]
    assert reported(study, "internal-influence", passes=3)[0][1:] == [said]
    reported(study, "weight-norm")
    assert reported(study, "weight-norm")[0][-1].endswith("/weight-norm (already there)")


@pytest.mark.parametrize("name", ["gate-gradients", *SAMPLED])
def test_passes_that_were_rounded_up_are_said(study, name):
    (lines,) = reported(study, name, passes=41)
    spent = made(study, name, passes=41).provenance["passes"]
    assert spent > 41
    assert lines[1] == f"41 passes are rounded up to {spent}: gates are drawn in whole rounds"
    assert len(reported(study, name, passes=spent, save_as="whole")[0]) == 2


def test_all_names_are_checked_before_anything_is_made(study):
    for bad in ("random", "", "lasso"):
        with refused(SettingError, "no such baseline", repr(bad)):
            reported(study, "weight-norm", bad)
    with refused(SettingError, "weight-norm has no passes"):
        reported(study, "internal-influence", "weight-norm", passes=2)
    made(study, "random-attributions", save_as="weight-norm")
    with refused(StudyError, "'weight-norm'"):
        reported(study, "gradient-x-parameter", "weight-norm")
    assert [path.name for path in (study.directory / "attributions").iterdir()] == ["weight-norm"]


def test_names_may_have_underscores_and_typos_are_understood(study):
    found = reported(study, "weight_norm", "weight-norm", "gradient_x_parameter")
    assert [lines[-1].split(":")[0] for lines in found] == ["weight-norm", "gradient-x-parameter"]
    for asked, meant in (("random", "random-attributions"), ("leave_one_uot", "leave-one-out")):
        with refused(SettingError, f"{asked!r}; did you mean {meant!r}?"):
            made(study, asked)


def test_other_attributions_of_that_name_are_refused(study):
    made(study, "weight-norm", save_as="leave-one-out")
    with refused(StudyError, "'leave-one-out'", "weight_norm", "another name"):
        made(study, "leave-one-out")


def test_bad_input_is_refused_before_work(study, tmp_path):
    with refused(SettingError, "no such baseline", "leave-one-out", "'loo'"):
        made(study, "loo")
    with refused(SettingError, "leave-one-out has no passes", "gate-gradients"):
        made(study, "leave-one-out", passes=3)
    for passes in (0, -1, 2.5, True):
        with refused(SettingError, "passes (--passes) must be a whole number"):
            made(study, "neuron-conductance", passes=passes)
    with refused(CoarError, "output"):
        made(study, "leave-one-out", output="loss")
    single = coar.Study.create(tmp_path / "single", linear_experiment()[0], coar.LeaveOneOut())
    for name in OF_THE_STUDY:
        with refused(SettingError, f"{name}: made for an ablation fraction", "leave_one_out"):
            made(single, name)
    gates = coar.GateGradientStudy.create(tmp_path / "gates", linear_experiment()[0], 0.25, passes=20)
    with refused(SettingError, "hybrid is fitted to rows", "sums"):
        made(gates, "hybrid")
    assert not (study.directory / "attributions").exists()


def test_zero_passes_are_refused_where_attributions_are_there(study):
    made(study, "neuron-conductance", passes=2)
    with refused(SettingError, "--passes", "0"):
        made(study, "neuron-conductance", passes=0)
