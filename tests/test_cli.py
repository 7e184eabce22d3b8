"""The command line: every verb explains itself, the line runs, errors are short and exit with 1."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas
import pytest

from coar import cli
from coar.attributions import Attributions
from coar.editing import Edit
from coar.errors import StudyError
from coar.study import Study
from tests.contributions import make_task

VERBS = [
    *("demo", "doctor", "components", "plan", "init", "run", "status", "extend", "fit", "evaluate", "edit"),
    *("import", "export", "check", "baseline", "make-edit"),
]


def contributions():
    """Twelve components, forty examples; e0 is wrong because of component 3."""
    table = np.random.default_rng(0).uniform(0.1, 0.5, size=(40, 12)).round(3)
    table[:, 3] /= 10
    table[0, 3] = -9.0
    return table


def spec_value():
    """Of a spec whose task is a linear model."""
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
        "estimator": {"name": "rows", "num_rows": 60},
        "design": {"name": "bernoulli", "ablation_fraction": 0.2, "seed": 0},
        "outputs": {"margin": {"dtype": "float32"}},
    }


@pytest.fixture
def spec(tmp_path):
    """A spec file."""
    path = tmp_path / "toy.json"
    path.write_text(json.dumps(spec_value()))
    return path


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_of_itself(works, verb):
    text = works(verb, "--help")
    assert f"coar {verb} [OPTIONS]" in text
    assert f"Example: coar {verb}" in text


def test_the_help_lists_every_verb(works):
    text = works("--help")
    assert all(f"  {verb} " in text for verb in VERBS)


def test_the_list_of_verbs_here_is_complete():
    named = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert sorted(named) == sorted(VERBS)


# --------------------------------------------------------------------------------------- the line


def test_from_a_spec_to_an_edit(works, spec, tmp_path):
    study, fix = tmp_path / "study", tmp_path / "fix.json"
    assert "0 of 60 rows" in works("init", spec, study)
    assert "0 of 60 rows" in works("status", study)
    assert "60 of 60 rows" in works("run", study)
    assert "complete" in works("status", study)
    assert "60 of 90 rows" in works("extend", study, "--num-rows", 90)
    assert "90 of 90 rows" in works("run", study)
    fitted = works("fit", study)
    assert "40 columns x 12 components" in fitted
    assert "from 90 of 90 rows, on which the median R2 is 1.000" in fitted
    evaluated = works("evaluate", study, "--fraction", 0.1, "--fraction", 0.2, "--num-rows", 9)
    assert "ablate 10%" in evaluated
    assert "ablate 20%" in evaluated
    assert "9 held-out rows" in evaluated
    edited = works("edit", study, "--target", "e0", "--save-to", fix)
    assert "ablating 1 of 12 components: hidden[3]" in edited
    assert str(fix) in edited
    assert_edit_fixes_the_target(fix)
    weights = Attributions.load(Study.open(study).attributions_path("ridge")).weights
    assert weights == pytest.approx(contributions(), abs=0.05)


def test_an_edit_has_a_direction_and_a_guard(works, fails, spec, tmp_path):
    study = tmp_path / "study"
    for words in (("init", spec, study), ("run", study), ("fit", study)):
        works(*words)
    edit = ("edit", study, "--target", "e0", "--save-to", tmp_path / "fix.json")
    assert "max_accuracy_drop is a fraction" in fails(*edit, "--max-accuracy-drop", -1)
    assert "nothing to edit" in fails(*edit, "--direction", "lower", "--max-accuracy-drop", 1)
    assert not (tmp_path / "fix.json").exists()


def assert_edit_fixes_the_target(path):
    task = make_task(contributions().tolist())
    edited = Edit.load(path).apply(task.model)
    batch = task.batch([0])
    before, after = (float(model(batch).detach()) for model in (task.model, edited))
    assert before < 0 < after
    assert after - before == pytest.approx(9.0, abs=1e-5)


def test_a_command_given_again_goes_on_from_there(works, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    assert "0 of 60 rows" in works("init", spec, tmp_path / "study")
    works("run", tmp_path / "study")
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "shards").iterdir()}
    works("run", tmp_path / "study")
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_run_takes_a_batch_size_and_a_device(works, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    assert "complete" in works("run", tmp_path / "study", "--batch-size", 7, "--device", "cpu")
    study = Study.open(tmp_path / "study")
    assert study.store.read(study.items()[0]).record["batch_size"] == 7


@pytest.mark.slow
def test_run_takes_workers(works, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    assert "complete" in works("run", tmp_path / "study", "--workers", 1)


def test_attributions_of_several_names_are_evaluated_together(works, spec, tmp_path):
    study = tmp_path / "study"
    works("init", spec, study)
    works("run", study)
    works("fit", study)
    works("fit", study, "--name", "second")
    text = works("evaluate", study, "--name", "ridge", "--name", "second", "--num-rows", 5)
    assert "ridge" in text
    assert "second" in text
    assert "ablate 20%" in text  # the fraction of the study, where none is given


def test_all_attributions_are_evaluated_where_none_is_named(works, fails, spec, tmp_path):
    study = tmp_path / "study"
    works("init", spec, study)
    works("run", study)
    assert "coar fit" in fails("evaluate", study)
    fitted = works("fit", study, "--solver", "lasso", "--name", "sparse")
    assert "nonzero weights: " in fitted
    assert f"see `coar evaluate {study} --name sparse`" in fitted
    works("fit", study, "--columns", "0:4", "--name", "few")
    text = works("evaluate", study, "--num-rows", 5)
    assert "sparse" in text
    assert "few" in text


@pytest.mark.slow
def test_baselines_are_made_by_name_and_evaluated_with_the_others(works, fails, coar, spec, tmp_path):
    study, figure, table = tmp_path / "study", tmp_path / "figures/found.png", tmp_path / "tables/found.csv"
    for words in (("init", spec, study), ("run", study), ("fit", study)):
        works(*words)
    assert "neuron-conductance, random-attributions" in fails("baseline", study, "weight-norm", "loo")
    assert "did you mean 'random-attributions'?" in fails("baseline", study, "weight-norm", "random")
    assert "attributions: ridge\n" in works("status", study)
    assert "has no passes" in fails("baseline", study, "leave-one-out", "--passes", 3)
    status, _, err = coar("baseline", study, "leave-one-out", "weight-norm", "--name", "mine")
    assert (status, "--name is for one baseline" in err) == (2, True)
    text = works("baseline", study, "leave-one-out", "gradient-x-parameter")
    assert "40 columns x 12 components, output='margin', by leave_one_out" in text
    assert f"leave-one-out: in {study}/attributions/leave-one-out" in text
    assert "by gate gradients, 10 passes" in works("baseline", study, "gate-gradients", "--passes", 10)
    works("baseline", study, "internal-influence", "--passes", 2, "--name", "influence")
    influence = ("baseline", study, "internal-influence", "--name", "influence")
    assert f"influence: in {study}/attributions/influence (already there: 2 steps)" in works(
        *influence, "--passes", 2
    )
    assert "from 50 steps (the default)" in fails(*influence)
    assert "3 passes are rounded up to " in works(
        "baseline", study, "kept_mean", "--passes", 3, "--name", "means"
    )
    assert "by hybrid" in works("baseline", study, "hybrid")
    files = ("--figure", figure, "--table", table)
    assert "ends in .png" in fails("evaluate", study, "--figure", tmp_path / "found.jpg")
    text = works("evaluate", study, "--fraction", 0.1, "--fraction", 0.2, "--num-rows", 20, *files)
    assert f"written to {figure}\nwritten to {table}" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = pandas.read_csv(table)
    methods = {"ridge", "leave-one-out", "gradient-x-parameter", "gate-gradients", "influence", "means"}
    methods.add("hybrid")
    assert set(found.method) == methods
    assert f"attributions: {', '.join(sorted(methods))}\n" in works("status", study)
    assert set(found.ablation_fraction) == {0.1, 0.2}
    assert len(found) == 7 * 2 * 40
    exact = found[found.method == "leave-one-out"]  # of a linear model
    assert exact.pearson.to_numpy() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_check_leaves_out_what_knows_no_fraction_and_says_so(works, fails, coar, spec, tmp_path):
    study = tmp_path / "study"
    for words in (("init", spec, study), ("run", study), ("baseline", study, "leave-one-out")):
        works(*words)
    check = ("check", study, "--num-rows", 20)
    err = fails(*check)
    assert "leave-one-out: made for no ablation fraction" in err
    assert "--name leave-one-out --fraction 0.1" in err
    works("fit", study)
    works("baseline", study, "weight-norm", "gradient-x-parameter")
    text = works(*check)
    left = "gradient-x-parameter, leave-one-out, weight-norm"
    assert f"not checked: {left} know no ablation fraction: --name NAME --fraction 0.1\n" in text
    assert "ridge\ncheck of attributions" in text
    assert "20 fresh ablations of 20%" in text
    text = works(*check, "--name", "leave-one-out", "--fraction", 0.1)
    assert "20 fresh ablations of 10%" in text
    assert "not checked" not in text
    assert "--fraction" in fails(*check, "--name", "ridge", "--name", "leave-one-out")
    assert "above 0 and below 1" in fails(*check, "--fraction", 1)
    status, text, _ = coar(*check, "--fraction", 0.1)
    assert (status, text.count("check of attributions")) == (1, 4)  # norms of weights predict nothing


def test_a_file_in_place_of_a_study_is_named(fails, spec, tmp_path):
    for verb in ("run", "status", "fit", "evaluate", "check"):
        err = fails(verb, spec)
        assert f"{spec} is a file, and no folder of a study" in err
        assert f"coar init {spec} {tmp_path / 'toy'}" in err
    err = fails("init", spec, spec)
    assert "a new folder" in err
    assert "coar init" not in err


@pytest.fixture
def two_outputs(works, tmp_path):
    """A finished study with two outputs, fitted for each."""
    value = spec_value()
    value["experiment"]["task"]["factory"] = "tests.contributions:make_task_of_two_outputs"
    value["outputs"] = {"margin": {"dtype": "float32"}, "twice": {"dtype": "float32"}}
    path, study = tmp_path / "two.json", tmp_path / "two"
    path.write_text(json.dumps(value))
    for words in (("init", path, study), ("run", study)):
        works(*words)
    return study


def test_of_several_outputs_one_is_named_by_an_option(works, fails, two_outputs):
    for words in (("fit",), ("baseline", "weight-norm"), ("export", "out.beton", "--layout", "beton")):
        verb, *rest = words
        err = fails(verb, two_outputs, *rest)
        assert "which output?" in err
        assert "--output with one of: margin, twice" in err
        assert "did you mean 'twice'?" in fails(verb, two_outputs, *rest, "--output", "twic")
    works("fit", two_outputs, "--output", "margin", "--name", "first")
    only_first = "output 'margin'"
    evaluate = ("evaluate", two_outputs, "--num-rows", 5)
    assert only_first in works(*evaluate)
    err = fails(*evaluate, "--output", "twice")
    assert "no attributions of output 'twice'" in err
    assert "--output twice --name NAME" in err
    works("fit", two_outputs, "--output", "twice", "--name", "second")
    text = works(*evaluate)
    assert [line for line in text.splitlines() if line.startswith("output ")] == [
        only_first,
        "output 'twice'",
    ]
    text = works(*evaluate, "--output", "twice")
    assert "second" in text
    assert "first" not in text
    assert "no attributions of output 'twice' among first" in fails(
        *evaluate, "--output", "twice", "--name", "first"
    )
    assert "did you mean 'margin'?" in fails(*evaluate, "--output", "margn")


def test_files_that_cannot_be_written_are_refused_before_anything_is_computed(works, fails, spec, tmp_path):
    study = tmp_path / "study"
    for words in (("init", spec, study), ("run", study), ("fit", study)):
        works(*words)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for path in ("/proc/x/t.csv", tmp_path / "folder.csv", tmp_path / "file/t.csv"):
        assert f"cannot write {path}" in fails("evaluate", study, "--num-rows", 5, "--table", path)
    assert "cannot write /proc/x/f.png" in fails("evaluate", study, "--figure", "/proc/x/f.png")
    assert not (study / "held-out").exists()
    table = tmp_path / "new/t.csv"
    table.parent.mkdir()
    table.write_text("mine")
    assert "at least 3" in fails("evaluate", study, "--num-rows", 1, "--table", table)
    assert table.read_text() == "mine"


@pytest.mark.slow
def test_attributions_of_other_columns_have_files_of_their_own(works, spec, tmp_path):
    study, table = tmp_path / "study", tmp_path / "found.csv"
    for words in (("init", spec, study), ("run", study), ("fit", study)):
        works(*words)
    works("fit", study, "--columns", "0:4", "--name", "few")
    works("evaluate", study, "--num-rows", 5, "--table", table)
    written = [path for path in tmp_path.glob("found*.csv") if not path.stem.endswith("-means")]
    lengths = {path.name: len(pandas.read_csv(path)) for path in written}
    assert sorted(lengths.values()) == [4, 40]
    assert set(lengths) == {"found.csv", "found-2.csv"}


def test_the_published_settings_are_kept_for_the_published_solver(coar, spec, tmp_path, monkeypatch):
    for words in (("init", spec, tmp_path / "study"), ("run", tmp_path / "study")):
        coar(*words)
    path, asked = tmp_path / "published.yaml", []
    path.write_text("data: {}\ncfg: {k: 1, lr: 0.25, manual_max_lambda: 0}\n")

    def found(_, settings, **__):
        asked.append(settings)
        raise StudyError("stop here")

    monkeypatch.setattr("coar.regression.fit_file_run.fit_with", found)
    _, _, err = coar("fit", tmp_path / "study", "--settings", path, "--solver", "fast_l1")
    assert "stop here" in err
    assert (asked[0].solver.learning_rate, asked[0].solver.num_penalties) == (0.25, 0)
    assert asked[0].name == "published"
    _, _, err = coar("fit", tmp_path / "study", "--settings", path, "--solver", "lasso")
    assert f"--solver lasso replaces solver ridge of {path}: its penalties are not used" in err


def test_rows_may_be_missing_where_one_says_so(works, fails, spec, tmp_path):
    study = tmp_path / "study"
    works("init", spec, study)
    works("run", study)
    works("extend", study, "--num-rows", 90)
    assert "90 rows" in fails("fit", study)
    assert "40 columns" in works("fit", study, "--partial")


def test_components_are_listed(works, spec):
    text = works("components", spec)
    assert "12 components in 1 groups" in text
    assert "neuron" in text
    assert "hidden" in text


def test_the_plan_says_time_disk_and_memory_and_writes_nothing(works, spec, tmp_path):
    text = works("plan", spec)
    for word in ("60 rows x 40 columns, 12 components", "time ", "disk ", "memory ", "ms a row"):
        assert word in text
    assert list(tmp_path.iterdir()) == [spec]


def test_the_doctor_reports(works):
    assert "random masks are those of every other machine" in works("doctor")


def test_the_doctor_exits_with_1_where_there_is_a_problem(coar, tmp_path):
    status, out, _ = coar("doctor", tmp_path / "missing")
    assert status == 1
    assert "problem" in out


# ----------------------------------------------------------------------------------------- errors


def test_imports_that_are_not_allowed_are_refused(works, fails, spec, tmp_path):
    for words in (("components", spec), ("plan", spec), ("init", spec, tmp_path / "study")):
        err = fails(*words, "--allow-import", "elsewhere")
        assert "SpecError" in err
        assert "tests.contributions" in err
        assert "a module under elsewhere" in err
        assert "--allow-import" in err
    assert not (tmp_path / "study").exists()
    works("init", spec, tmp_path / "study", "--allow-import", "tests", "--allow-import", "elsewhere")
    assert "tests.contributions" in fails("run", tmp_path / "study", "--allow-import", "elsewhere")
    works("run", tmp_path / "study", "--allow-import", "tests.contributions")


def test_a_missing_study_is_named(fails, tmp_path):
    for verb in ("run", "status", "fit", "evaluate"):
        err = fails(verb, tmp_path / "nothing")
        assert "no study in" in err
        assert "nothing" in err
        assert "coar init" in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_broken_spec_is_named(fails, tmp_path):
    assert "toy.json is missing" in fails("components", tmp_path / "toy.json")
    (tmp_path / "toy.json").write_text('{"format": 1, "desing": {}}')
    assert "'desing'" in fails("init", tmp_path / "toy.json", tmp_path / "study")


def test_a_folder_that_holds_another_study_is_refused(works, fails, spec, tmp_path):
    works("init", spec, tmp_path / "study")
    value = json.loads(spec.read_text())
    value["design"]["seed"] = 5
    spec.write_text(json.dumps(value))
    err = fails("init", spec, tmp_path / "study")
    assert "another spec" in err
    assert "design.seed: 5, not 0" in err


def test_unreasonable_values_are_refused(works, fails, spec, tmp_path):
    study = tmp_path / "study"
    works("init", spec, study)
    works("run", study)
    works("fit", study)
    assert "only grow" in fails("extend", study, "--num-rows", 60)
    err = fails("evaluate", study, "--fraction", 5)
    assert "ablation_fraction (--fraction) out of range" in err
    assert "above 0 and below 1" in err
    assert "at least 3" in fails("evaluate", study, "--num-rows", 1)
    assert "save_as: 1-100 letters" in fails("fit", study, "--name", "../x")
    assert "positions, STOP not included" in fails("fit", study, "--columns", "e0")
    assert "coar fit --columns 0:41: no such columns" in fails("fit", study, "--columns", "0:41")
    assert 'write "4 GiB"' in fails("fit", study, "--memory", "4")
    assert "attributions 'ridge' exist: " in fails("fit", study, "--columns", "0:4")
    assert "no such output" in fails("fit", study, "--output", "loss")
    err = fails("evaluate", study, "--name", "ridgee")
    assert "no attributions 'ridgee'" in err
    assert "did you mean 'ridge'?" in err
    assert "one of: ridge" in err
    assert "unknown: 'nobody'" in fails("edit", study, "--target", "nobody", "--save-to", "fix.json")
    assert not (tmp_path / "fix.json").exists()


def test_a_word_that_is_no_verb_is_a_usage_error(coar):
    status, _, err = coar("explain")
    assert status == 2
    assert "No such command 'explain'" in err


def test_warnings_are_one_line(coar, spec, tmp_path):
    value = json.loads(spec.read_text())
    value["estimator"]["num_rows"] = 8
    spec.write_text(json.dumps(value))
    for words in (("init", spec, tmp_path / "study"), ("run", tmp_path / "study")):
        coar(*words)
    status, _, err = coar("fit", tmp_path / "study")
    assert status == 0
    assert "coar: warning: 8 rows for 12 components" in err
    assert ".py" not in err


def test_an_interrupt_says_that_nothing_is_lost(coar, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("coar.doctor.examine", interrupted)
    status, _, err = coar("doctor")
    assert status == 130
    assert "what is finished is kept" in err


@pytest.mark.slow
def test_in_a_shell_an_error_is_a_message_and_exit_status_1(tmp_path):
    command = [sys.executable, "-c", "from coar.cli import main; main()", "status", str(tmp_path / "none")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("coar: StudyError: no study in")
    assert "Traceback" not in found.stderr
