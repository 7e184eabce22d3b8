"""Baselines by name: those of the functions, saved in a study, once."""

import numpy as np
import pytest

import coar
from coar import baselines
from coar.baselines.named import BASELINES, make_baseline
from coar.errors import CoarError, SettingError, StudyError
from coar.executors.serial import Serial
from coar.testing import linear_experiment
from tests.refused import refused

STEPS = {"passes": 4}
FUNCTIONS = {name: getattr(baselines, name.replace("-", "_"), None) for name in BASELINES}


@pytest.fixture
def study(tmp_path):
    design = coar.Bernoulli(ablation_fraction=0.25)
    return coar.Study.create(tmp_path / "study", linear_experiment()[0], design, num_rows=20)


def make(study, name, **options):
    return make_baseline(study, name, progress=False, **options)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "gate-gradients"])
def test_is_what_the_function_makes(study, name):
    found, quiet = make(study, name), {} if "random" in name or "norm" in name else {"progress": False}
    made = FUNCTIONS[name](study.experiment, **quiet)
    np.testing.assert_array_equal(found.weights, made.weights)
    np.testing.assert_array_equal(found.intercept, made.intercept)
    assert found.provenance == made.provenance
    assert (study.attributions_path(name) / "index.json").exists()


def test_gate_gradients_are_for_the_fraction_of_the_study(study):
    found = make(study, "gate-gradients", passes=40)
    made = coar.gate_gradients(study.experiment, 0.25, passes=40, progress=False)
    np.testing.assert_array_equal(found.weights, made.weights)
    assert found.provenance["ablation_fraction"] == 0.25


@pytest.mark.parametrize("name", ["neuron-conductance", "internal-influence", "integrated-gradients"])
def test_passes_are_steps_along_a_path(study, name):
    assert make(study, name, passes=3).provenance["passes"] == 3


@pytest.mark.parametrize("name", ["leave-one-out", "gate-gradients", "neuron-conductance"])
def test_is_made_once(study, name):
    first = make(study, name)
    index = study.attributions_path(name) / "index.json"
    before = index.stat().st_mtime_ns
    again = make(study, name)
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
        make(study, "leave-one-out", executor=Stopping())
    shards = {
        path: path.stat().st_mtime_ns for path in study.directory.glob("baselines/leave-one-out-*/shards/*")
    }
    assert shards
    make(study, "leave-one-out")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_more_passes_need_another_name(study):
    make(study, "neuron-conductance", passes=3)
    assert make(study, "neuron-conductance", passes=2).provenance["passes"] == 3  # there is better
    with refused(StudyError, "neuron-conductance", "from 5 passes", "from 3 passes", "another name"):
        make(study, "neuron-conductance", passes=5)
    assert make(study, "neuron-conductance", passes=5, save_as="finer").provenance["passes"] == 5


def test_other_attributions_of_that_name_are_refused(study):
    make(study, "weight-norm", save_as="leave-one-out")
    with refused(StudyError, "'leave-one-out'", "weight_norm", "another name"):
        make(study, "leave-one-out")


def test_bad_input_is_refused_before_work(study, tmp_path):
    with refused(SettingError, "no such baseline", "leave-one-out", "'loo'"):
        make(study, "loo")
    with refused(SettingError, "leave-one-out has no passes", "gate-gradients"):
        make(study, "leave-one-out", passes=3)
    with refused(CoarError, "output"):
        make(study, "leave-one-out", output="loss")
    single = coar.Study.create(tmp_path / "single", linear_experiment()[0], coar.LeaveOneOut())
    with refused(SettingError, "ablation fraction", "leave_one_out"):
        make(single, "gate-gradients")
    assert not (study.directory / "attributions").exists()
