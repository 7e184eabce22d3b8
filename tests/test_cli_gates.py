"""The command line on a study of gate gradients: from a spec to an edit, and what is refused on the way."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from coar.attributions import Attributions
from coar.editing import Edit
from coar.gradients import GateGradientStudy
from tests.contributions import make_task


def contributions():
    """Eight components, twelve examples; e0 is wrong because of component 3."""
    table = np.random.default_rng(0).uniform(0.1, 0.5, size=(12, 8)).round(3)
    table[:, 3] /= 10
    table[0, 3] = -9.0
    return table


def spec_value(**estimator):
    return {
        "format": 1,
        "experiment": {
            "name": "component_ablation",
            "task": {
                "factory": "tests.contributions:make_task",
                "args": {"contributions": contributions().tolist()},
            },
            "components": {"kinds": ["neuron"], "include": ["hidden"], "exclude": []},
        },
        "estimator": {"name": "gate_gradients", **estimator},
        "design": {"name": "bernoulli", "ablation_fraction": 0.2, "seed": 0},
        "outputs": {"margin": {"dtype": "float32"}},
    }


@pytest.fixture
def write_spec(tmp_path):
    """Writes a spec file, changed as one likes."""

    def write(name="gates.json", change=None, **estimator):
        value = spec_value(**estimator)
        if change:
            change(value)
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture
def spec(write_spec):
    return write_spec(passes=20)


@pytest.fixture
def study(works, spec, tmp_path):
    """A finished one."""
    works("init", spec, tmp_path / "study")
    works("run", tmp_path / "study")
    return tmp_path / "study"


# --------------------------------------------------------------------------------------- the line


def test_from_a_spec_to_an_edit(works, spec, tmp_path):
    study, fix = tmp_path / "study", tmp_path / "fix.json"
    assert "0 of 20 passes, 12 examples" in works("init", spec, study)
    assert "0 of 20 passes" in works("status", study)
    assert "20 of 20 passes" in works("run", study)
    assert "complete" in works("status", study)
    assert "20 of 60 passes" in works("extend", study, "--passes", 60)
    assert "60 of 60 passes" in works("run", study)
    fitted = works("fit", study)
    assert "12 columns x 8 components" in fitted
    assert "60 passes" in fitted
    assert "attributions/gate-gradients" in fitted
    assert "coar check" in fitted
    weights = Attributions.load(GateGradientStudy.open(study).attributions_path("gate-gradients")).weights
    assert weights == pytest.approx(contributions(), abs=1e-5)  # exact: the model is additive
    evaluated = works("evaluate", study, "--num-rows", 9)
    assert "ablate 20%" in evaluated
    assert "gate-gradients" in evaluated
    edited = works("edit", study, "--name", "gate-gradients", "--target", "e0", "--save-to", fix)
    assert "ablating 1 of 8 components: hidden[3]" in edited
    task = make_task(contributions().tolist())
    batch = task.batch([0])
    before, after = (float(model(batch).detach()) for model in (task.model, Edit.load(fix).apply(task.model)))
    assert before < 0 < after


def test_examples_are_added(works, write_spec, tmp_path):
    study = tmp_path / "study"
    works("init", write_spec(passes=20, examples=[0, 1, 2]), study)
    assert "3 examples" in works("run", study)
    assert "0 of 20 passes, 12 examples" in works("extend", study, "--examples", "3:12")
    assert "20 of 20 passes, 12 examples" in works("run", study)
    assert "12 columns x 8 components" in works("fit", study)
    found = Attributions.load(GateGradientStudy.open(study).attributions_path("gate-gradients"))
    assert found.weights == pytest.approx(contributions(), abs=1e-5)


def test_passes_and_examples_are_asked_for_together(works, write_spec, tmp_path):
    study = tmp_path / "study"
    works("init", write_spec(passes=20, examples=[0, 1, 2]), study)
    works("extend", study, "--examples", "3:6", "--passes", 40)
    assert "40 of 40 passes, 6 examples" in works("run", study)


def test_a_command_given_again_goes_on_from_there(works, spec, study):
    files = {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file()}
    assert "20 of 20 passes" in works("init", spec, study)
    assert "complete" in works("run", study)
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file()} == files
    assert works("fit", study) == works("fit", study)


def test_a_spec_with_more_passes_is_the_same_study(works, write_spec, study):
    assert "20 passes" in works("init", write_spec(passes=60), study)
    assert "20 of 20 passes" in works("status", study)


def test_auto_says_that_more_may_come(works, write_spec, tmp_path):
    study = tmp_path / "study"
    assert "more where the target is not met" in works("init", write_spec(passes="auto"), study)
    ran = works("run", study)  # additive: exact after one round
    assert "20 of 20 passes" in ran
    assert "target correlation 0.95 reached: 1 after 20 passes" in ran
    said = works("status", study)  # reads no sums, and therefore judges nothing
    assert "coar run" in said
    for text in (ran, said):
        assert "complete" not in text
        assert "more where" not in text


def test_run_and_fit_say_how_good_weights_are(works, write_spec, tmp_path):
    study = tmp_path / "study"
    assert "35 passes are rounded up to 40: a round of its 4 replicates has 20" in works(
        "init", write_spec(passes=35), study
    )
    assert "complete, with an estimated correlation of 1" in works("run", study)
    assert "50 passes are rounded up to 60" in works("extend", study, "--passes", 50)
    assert "rounded" not in works("extend", study, "--passes", 80)
    fitted = works("fit", study, "--calibrate", 20)
    assert "40 passes, estimated correlation 1.000" in fitted
    assert "40 of 80 passes asked for; `coar run` does the rest" in fitted
    assert re.search(r"calibrated on 20 real ablations: slope 1\.000 \[1\.000, 1\.000\]", fitted)


def test_a_missed_target_is_a_warning_of_one_line(coar, write_spec, tmp_path):
    def curved(value):
        value["experiment"] |= {"task": {"factory": "tests.gate_networks:make_task", "args": {}}}
        value["experiment"]["components"] = {"kinds": ["neuron"]}
        value["outputs"] = {"value": {}}

    study = tmp_path / "study"
    coar("init", write_spec(change=curved, passes=20, target_error=1e-12), study)
    status, out, err = coar("run", study)
    assert status == 0
    assert "20 of 20 passes" in out
    assert "target error 1e-12 not reached: " in out
    assert "complete" not in out
    assert "coar: warning: 20 passes have not reached the target (error 1e-12)" in err
    assert ".py" not in err


@pytest.mark.slow
def test_run_takes_workers(works, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    assert "complete" in works(
        "run", tmp_path / "study", "--workers", 1, "--batch-size", 5, "--device", "cpu"
    )


def test_the_plan_says_time_disk_and_memory_and_writes_nothing(works, write_spec, tmp_path):
    spec = write_spec(passes=35)
    text = works("plan", spec)
    for word in ("40 passes x 12 examples, 8 components", "time ", "disk ", "memory ", "ms a pass"):
        assert word in text
    assert "at most 400 passes" in works("plan", write_spec("auto.json"))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]


def test_pooled_and_calibrated_attributions_have_names_of_their_own(works, fails, study):
    works("fit", study)
    assert "'gate-gradients' exist" in fails("fit", study, "--pool")
    assert "'gate-gradients' exist" in fails("fit", study, "--calibrate", 20)
    works("fit", study, "--pool", "--name", "pooled")
    works("fit", study, "--calibrate", 20, "--name", "calibrated")
    assert "'calibrated' exist" in fails("fit", study, "--name", "calibrated")
    opened = GateGradientStudy.open(study)
    found = {name: Attributions.load(opened.attributions_path(name)) for name in ("pooled", "calibrated")}
    assert found["pooled"].provenance["pooled"] is True
    assert found["calibrated"].provenance["calibration"]["rows"] == 20
    assert found["calibrated"].provenance["calibration"]["slope"] == pytest.approx(1, abs=1e-4)
    text = works("evaluate", study, "--num-rows", 5)
    assert all(name in text for name in ("gate-gradients", "pooled", "calibrated"))


def test_check_can_be_trusted(works, study):
    works("fit", study)
    text = works("check", study, "--num-rows", 20)
    assert "gate-gradients" in text


def test_a_fit_after_an_extension_says_what_to_do(works, fails, study):
    works("fit", study)
    works("extend", study, "--passes", 40)
    works("run", study)
    err = fails("fit", study)
    assert "attributions 'gate-gradients' exist: gate gradients, 20 passes" in err
    assert "40 passes" in err
    assert "--name NAME" in err
    assert "40 passes" in works("fit", study, "--name", "more")


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options",
    [
        ("--solver", "lasso"),
        ("--settings", "fit.yaml"),
        ("--columns", "0:4"),
        ("--memory", "1 GiB"),
        ("--partial",),
        ("--device", "cpu"),
    ],
)
def test_options_of_a_regression_are_named(fails, study, options):
    err = fails("fit", study, *options, status=2)
    assert options[0] in err
    assert "not fitted to rows. Leave it out" in err.replace("\n", " ")
    assert not (study / "attributions").exists()


def test_options_of_gate_gradients_are_refused_for_rows(works, fails, write_spec, tmp_path):
    def rows(value):
        value["estimator"] = {"name": "rows", "num_rows": 20}

    study = tmp_path / "rows"
    works("init", write_spec(change=rows), study)
    for options in (("--passes", 40), ("--examples", "0:2"), ()):
        err = fails("extend", study, *options)
        assert "grows by rows" in err
        assert f"coar extend {study} --num-rows 40" in err
    for options in (("--pool",), ("--calibrate", 60)):
        assert "gate gradients" in fails("fit", study, *options, status=2)


def test_senseless_extensions_are_named(fails, study):
    err = fails("extend", study, "--num-rows", 90)
    assert "no rows" in err
    assert f"coar extend {study} --passes 40" in err
    assert "only grow" in fails("extend", study, "--passes", 20)
    assert "only grow" in fails("extend", study)
    assert "each once" in fails("extend", study, "--examples", "0:3")
    assert "each once" in fails("extend", study, "--examples", "12:13")
    for text in ("3", "3:", "5:3", "a:b", "-1:3"):
        assert "START:STOP" in fails("extend", study, f"--examples={text}")
    assert not (study / "extensions").exists()


def test_what_is_not_there_is_named(works, fails, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    assert "no complete round" in fails("fit", tmp_path / "study")
    assert "coar run" in fails("fit", tmp_path / "study")
    for verb in ("evaluate", "check"):
        assert "coar fit" in fails(verb, tmp_path / "study")
    works("run", tmp_path / "study")
    assert "no such output" in fails("fit", tmp_path / "study", "--output", "loss")
    works("fit", tmp_path / "study")
    assert "one of: gate-gradients" in fails("evaluate", tmp_path / "study", "--name", "ridge")


def test_rows_are_not_exported_from_gate_gradients(fails, study, tmp_path):
    err = fails("export", study, tmp_path / "out", "--layout", "original")
    assert "another kind of study" in err


def test_a_folder_of_another_kind_is_refused(fails, write_spec, study):
    def rows(value):
        value["estimator"] = {"name": "rows", "num_rows": 20}

    err = fails("init", write_spec(change=rows), study)
    assert "another kind of study" in err
    assert "coar init SPEC DIRECTORY" in err
    assert "coar.GateGradientStudy" not in err  # who types commands has folders


def test_pooled_attributions_are_refused_for_edits_for_what_they_are(works, fails, study, tmp_path):
    works("fit", study, "--pool")
    for what in (("--misread",), ("--target", "e0")):
        err = fails("edit", study, *what, "--save-to", tmp_path / "fix.json")
        assert "pooled attributions are not for edits" in err


def test_an_edit_takes_the_only_attributions_and_does_not_choose_among_several(works, fails, study, tmp_path):
    edit = ("edit", study, "--target", "e0", "--save-to", tmp_path / "fix.json")
    assert "make them first: `coar fit" in fails(*edit)
    works("fit", study)
    assert "ablating 1 of 8 components: hidden[3]" in works(*edit)
    works("fit", study, "--name", "second")
    err = fails("edit", study, "--target", "e0", "--save-to", tmp_path / "other.json")
    assert "several attributions" in err
    assert "--name with one of: gate-gradients, second" in err
    works("edit", study, "--target", "e0", "--name", "second", "--save-to", tmp_path / "other.json")


CHANGES = {
    "fraction 0": (lambda v: v["design"].update(ablation_fraction=0.0), "ablation_fraction"),
    "fraction 1": (lambda v: v["design"].update(ablation_fraction=1.0), "ablation_fraction"),
    "unknown key": (lambda v: v["estimator"].update(pases=3), "did you mean 'passes'"),
    "rows": (lambda v: v["estimator"].update(num_rows=3), "num_rows"),
    "no passes": (lambda v: v["estimator"].update(passes=0), "passes"),
    "target": (lambda v: v["estimator"].update(target_correlation=1.5), "target_correlation"),
    "no examples": (lambda v: v["estimator"].update(examples=[]), "examples"),
    "examples": (lambda v: v["estimator"].update(examples=[3, 99]), "positions from 0 to 11"),
    "fixed size": (
        lambda v: v.update(design={"name": "fixed_size", "ablation_fraction": 0.2, "seed": 0}),
        "independent ablations",
    ),
    "leave one out": (lambda v: v.update(design={"name": "leave_one_out"}), "independent ablations"),
    "float16": (lambda v: v["outputs"]["margin"].update(dtype="float16"), "float32"),
    "output": (lambda v: v["outputs"].update(loss={"dtype": "float32"}), "loss"),
    "compiled": (lambda v: v.update(execution={"compiled": True}), "not compiled"),
    "experiment": (
        lambda v: v.update(experiment={"name": "coar.testing:SubsetMean"}, outputs={"mean": {}}),
        "component ablation",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_specs_that_make_no_sense_are_refused_before_anything_is_written(fails, write_spec, tmp_path, name):
    change, word = CHANGES[name]
    spec = write_spec(change=change, passes=20)
    assert word in fails("init", spec, tmp_path / "study")
    assert word in fails("plan", spec)
    assert list(tmp_path.iterdir()) == [spec]


def test_each_kind_of_study_is_opened_as_what_it_is(study):
    import coar as package
    from coar.errors import StudyError

    with pytest.raises(StudyError, match="another kind of study") as error:
        package.Study.open(study)
    assert "coar.GateGradientStudy.open" in error.value.todo
