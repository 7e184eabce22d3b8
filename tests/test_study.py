"""Study: created whole, resumed where it stopped, the same bits whatever ran it."""

import json

import numpy as np
import pytest
import torch

import coar
from coar.errors import CoarError, OutputError, SettingError, StoreError, StudyError
from coar.spec import ExecutionSpec, StudySpec
from coar.testing import SubsetMean, linear_experiment, linear_task

DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)


@pytest.fixture(params=["linear", "subset mean"])
def experiment(request):
    return linear_experiment()[0] if request.param == "linear" else SubsetMean()


def make(path, experiment, num_rows=20, **kwargs):
    return coar.Study.create(path, experiment, DESIGN, num_rows, **{"rows_per_shard": 6} | kwargs)


def only(study):
    """The one output of a study, as an array [rows, columns]."""
    (values,) = study.outputs.values()
    return np.asarray(values)


class InterruptError(Exception):
    """Stands for whatever ends a process."""


class StopAfter:
    """An executor that does a few items and is then interrupted."""

    def __init__(self, count):
        self.count = count

    def run(self, session, items):
        worker = session.worker(session.device)
        for item in items[: self.count]:
            yield item, worker.do(item)
        raise InterruptError


def test_rows_are_the_experiments_outputs_under_the_designs_masks(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    study.run(progress=False)
    masks = DESIGN.masks(range(20), len(experiment.components))
    np.testing.assert_array_equal(study.masks, masks)
    (expected,) = experiment.prepare(experiment.device)(masks).values()
    np.testing.assert_array_equal(only(study), expected)


def test_stored_arrays_index_like_arrays(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    study.run(progress=False)
    (values,) = study.outputs.values()
    whole = np.asarray(values)
    assert values.shape == whole.shape
    np.testing.assert_array_equal(values[7], whole[7])
    np.testing.assert_array_equal(values[-1], whole[-1])
    np.testing.assert_array_equal(values[3:15:4], whole[3:15:4])
    np.testing.assert_array_equal(values[[19, 0, 7]], whole[[19, 0, 7]])
    np.testing.assert_array_equal(values[:, 2], whole[:, 2])
    np.testing.assert_array_equal(study.example(2).outputs, whole[:, 2])
    with pytest.raises(IndexError):
        values[20]


def test_a_run_that_was_interrupted_goes_on_and_gives_the_same_rows(tmp_path, experiment):
    undisturbed = make(tmp_path / "a", experiment)
    undisturbed.run(progress=False)
    study = make(tmp_path / "b", experiment)
    with pytest.raises(InterruptError):
        study.run(StopAfter(2), progress=False)
    assert study.status().shards == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b/shards").iterdir()}
    assert study.run(progress=False).complete
    np.testing.assert_array_equal(only(study), only(undisturbed))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_the_size_of_shards_does_not_matter(tmp_path, experiment):
    found = []
    for size in (1, 7, 20, 100):
        study = make(tmp_path / str(size), experiment, rows_per_shard=size)
        study.run(progress=False)
        found.append(only(study))
    assert all(np.array_equal(found[0], other) for other in found)


def test_creating_the_same_study_again_opens_it(tmp_path, experiment):
    make(tmp_path / "s", experiment).run(progress=False)
    again = make(tmp_path / "s", experiment)
    assert again.status().complete


@pytest.mark.parametrize(
    ("design", "num_rows", "words"),
    [
        (coar.Bernoulli(ablation_fraction=0.3, seed=9), 20, "design.seed: 9, not 2"),
        (coar.FixedSize(ablation_fraction=0.3, seed=2), 20, "design.name"),
        (DESIGN, 30, "estimator.num_rows: 30, not 20"),
    ],
)
def test_another_spec_in_the_same_folder_is_refused_naming_the_difference(
    tmp_path, experiment, design, num_rows, words
):
    make(tmp_path / "s", experiment)
    with pytest.raises(StudyError, match=words):
        coar.Study.create(tmp_path / "s", experiment, design, num_rows)


def test_another_precision_is_refused_another_batch_size_is_recorded(tmp_path):
    experiment = linear_experiment()[0]
    study = make(tmp_path / "s", experiment)
    with pytest.raises(StudyError, match=r"execution\.precision: float64, not float32"):
        make(tmp_path / "s", experiment, execution=ExecutionSpec(precision="float64"))
    study.run(batch_size=3, progress=False)
    assert study.store.read(study.items()[0]).record["batch_size"] == 3


def test_another_model_is_refused_naming_what_differs(tmp_path):
    make(tmp_path / "s", linear_experiment()[0])
    other = linear_experiment()[0]
    other.task.model.hidden.weight.data.add_(1)
    other = coar.ComponentAblation(other.task, other.component_set)
    with pytest.raises(StudyError, match="model"):
        coar.Study.open(tmp_path / "s", other)


def test_other_data_are_refused_naming_what_differs(tmp_path):
    make(tmp_path / "s", linear_experiment(num_examples=10)[0])
    with pytest.raises(StudyError, match="data"):
        coar.Study.open(tmp_path / "s", linear_experiment(num_examples=9)[0])


def test_a_study_with_a_factory_opens_and_runs_from_its_folder_alone(tmp_path):
    make(tmp_path / "s", linear_experiment()[0])
    study = coar.Study.open(tmp_path / "s")
    assert study.run(progress=False).complete


def test_a_study_of_a_task_in_memory_needs_it_to_run_but_not_to_be_read(tmp_path):
    task = linear_task()
    task.recipe = None
    experiment = coar.ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["hidden"]))
    make(tmp_path / "s", experiment).run(progress=False)
    study = coar.Study.open(tmp_path / "s")
    assert only(study).shape == (20, 10)
    with pytest.raises(CoarError, match="in memory"):
        study.experiment  # noqa: B018 - building it is what is refused
    assert coar.Study.open(tmp_path / "s", experiment).experiment is experiment


def test_a_study_from_a_spec_file_is_the_one_from_python(tmp_path, experiment):
    study = make(tmp_path / "a", experiment)
    study.run(progress=False)
    again = coar.Study.from_spec(tmp_path / "b", StudySpec.load(tmp_path / "a/spec.json"))
    again.run(progress=False)
    np.testing.assert_array_equal(only(again), only(study))
    assert again.spec.digest == study.spec.digest


def test_a_spec_whose_outputs_are_not_the_tasks_is_refused(tmp_path, experiment):
    study = make(tmp_path / "a", experiment)
    spec = study.spec.to_json() | {"outputs": {"loss": {"dtype": "float32"}}}
    with pytest.raises(SettingError, match="outputs"):
        coar.Study.from_spec(tmp_path / "b", StudySpec.from_json(spec))
    assert not (tmp_path / "b").exists()


def test_extending_keeps_what_is_there_and_gives_the_rows_of_a_larger_study(tmp_path, experiment):
    small = make(tmp_path / "small", experiment, num_rows=20)
    small.run(progress=False)
    small.extend(33)
    assert not small.status().complete
    small.run(progress=False)
    large = make(tmp_path / "large", experiment, num_rows=33)
    large.run(progress=False)
    np.testing.assert_array_equal(only(small), only(large))
    assert coar.Study.open(tmp_path / "small").num_rows == 33
    with pytest.raises(StudyError, match="only grow"):
        small.extend(33)


def test_leave_one_out_cannot_have_more_rows_than_components(tmp_path, experiment):
    count = len(experiment.components)
    study = coar.Study.create(tmp_path / "s", experiment, coar.LeaveOneOut())
    assert study.num_rows == count
    with pytest.raises(SettingError, match=str(count)):
        study.extend(count + 1)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, experiment):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StudyError, match=r"thesis\.tex"):
        make(tmp_path, experiment)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_opening_a_folder_without_a_study_says_so(tmp_path):
    with pytest.raises(StudyError, match="no study"):
        coar.Study.open(tmp_path)


@pytest.mark.parametrize("name", ["spec.json", "provenance.json", "untouched.safetensors"])
@pytest.mark.parametrize("contents", [b"", b"{}", b"[]", b"\xff\xfe", b'{"format": 1}'])
def test_a_damaged_study_file_is_named(tmp_path, name, contents):
    make(tmp_path / "s", linear_experiment()[0])
    (tmp_path / "s" / name).write_bytes(contents)
    with pytest.raises(CoarError, match=name.replace(".", r"\.")):
        coar.Study.open(tmp_path / "s")


def test_a_damaged_extension_is_named(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    study.extend(40)
    (tmp_path / "s/extensions/000001.json").write_text(json.dumps({"num_rows": "many"}))
    with pytest.raises(StoreError, match="000001"):
        coar.Study.open(tmp_path / "s").status()


def test_float16_outputs_are_differences_and_come_back_close(tmp_path):
    experiment = linear_experiment()[0]
    exact = make(tmp_path / "a", experiment)
    half = make(tmp_path / "b", experiment, dtypes={"score": "float16"})
    for study in (exact, half):
        study.run(progress=False)
    assert half.store.read(half.items()[0]).outputs["score"].dtype == np.float16
    error = np.abs(only(half) - only(exact))
    assert error.max() <= 2**-11 * np.abs(only(exact) - exact.untouched["score"]).max()


def test_an_unknown_or_unsupported_dtype_is_refused(tmp_path, experiment):
    (name,) = experiment.columns
    with pytest.raises(SettingError, match="loss"):
        make(tmp_path / "s", experiment, dtypes={"loss": "float32"})
    with pytest.raises(SettingError, match="int8"):
        make(tmp_path / "s", experiment, dtypes={name: "int8"})


class Sometimes:
    """A subset mean whose outputs are bad in some rows."""

    def __new__(cls, bad_value, when):
        experiment = SubsetMean()
        prepare = experiment.prepare

        def prepare_bad(*args, **kwargs):
            runner = prepare(*args, **kwargs)

            class Runner:
                record = staticmethod(runner.record)

                def __call__(self, masks):
                    outputs = runner(masks)
                    for mask, values in zip(masks, outputs["mean"], strict=True):
                        if when(mask):
                            values[4] = bad_value
                    return outputs

            return Runner()

        experiment.prepare = prepare_bad
        return experiment


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")])
def test_a_row_that_cannot_be_stored_is_recorded_and_all_others_are_kept(tmp_path, value, dtype):
    experiment = Sometimes(value, when=lambda mask: not mask[0])
    study = make(tmp_path / "s", experiment, dtypes={"mean": dtype})
    bad = np.flatnonzero(~DESIGN.masks(range(20), 15)[:, 0])
    assert 0 < len(bad) < 20
    with pytest.raises(OutputError, match="feature 4") as error:
        study.run(progress=False)
    assert f"row {bad[0]}" in str(error.value)
    assert study.status().failed_rows == tuple(bad)
    assert study.status().complete
    assert len(study.masks) == 20 - len(bad)
    assert np.isfinite(only(study)).all()
    study.run(progress=False)  # nothing is left to do, and nothing new has failed


def test_a_model_that_is_nan_to_begin_with_is_refused_before_any_work(tmp_path):
    with pytest.raises(OutputError, match="feature 4"):
        make(tmp_path / "s", Sometimes(np.nan, when=lambda mask: mask.all()))
    assert not (tmp_path / "s").exists()


def test_status_and_plan_say_what_is_left(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    assert "0 of 20 rows" in study.status().summary()
    study.run(progress=False)
    assert "complete" in study.status().summary()


def test_memory_of_a_fit_does_not_grow_with_rows(tmp_path):
    """Peak of NumPy's own allocations while fitting ten times the rows."""
    import tracemalloc

    experiment = SubsetMean(num_points=64, num_features=200)
    peaks = []
    for rows in (2_000, 20_000):
        study = coar.Study.create(tmp_path / str(rows), experiment, DESIGN, rows, rows_per_shard=500)
        study.run(progress=False)
        tracemalloc.start()
        coar.fit(study)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("bad", [40.0, "40", True, -5, 2**60])
def test_rows_that_are_no_number_of_rows_are_refused_before_anything_is_written(tmp_path, experiment, bad):
    study = make(tmp_path / "s", experiment)
    with pytest.raises(CoarError, match=r"rows"):
        study.extend(bad)
    assert study.status().num_rows == 20
    with pytest.raises(SettingError, match="rows"):
        make(tmp_path / "t", experiment, num_rows=bad)
    with pytest.raises(SettingError, match="rows_per_shard"):
        make(tmp_path / "u", experiment, rows_per_shard=bad)


def test_numbers_of_numpy_count_as_numbers(tmp_path, experiment):
    study = make(tmp_path / "s", experiment, num_rows=np.int64(20), rows_per_shard=np.int64(5))
    study.extend(np.int32(30))
    assert study.run(progress=False).rows == 30


def test_names_changed_behind_the_digest_of_the_provenance_are_refused(tmp_path, experiment):
    make(tmp_path / "s", experiment)
    path = tmp_path / "s/provenance.json"
    value = json.loads(path.read_text())
    value["components"]["names"].reverse()
    path.write_text(json.dumps(value))
    with pytest.raises(StoreError, match=r"provenance\.json is damaged"):
        coar.Study.open(tmp_path / "s")


@pytest.mark.parametrize("record", [{"num_rows": -5}, {"num_rows": True}, {"num_rows": 40, "format": 2}])
def test_an_extension_that_makes_no_sense_is_named(tmp_path, experiment, record):
    study = make(tmp_path / "s", experiment)
    study.extend(40)
    (tmp_path / "s/extensions/000001.json").write_text(json.dumps({"format": 1} | record))
    with pytest.raises(StoreError, match="000001"):
        study.status()


def test_a_shard_that_is_damaged_after_it_was_read_is_noticed(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    study.run(progress=False)
    only(study)
    path = study.store.path(1)
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    with pytest.raises(StoreError, match="000001"):
        study.store.read(study.items()[1])


class Doubled(SubsetMean):
    """Inherits fingerprint and spec from its parent, but computes something else."""

    def prepare(self, *args, **kwargs):
        runner = super().prepare(*args, **kwargs)

        class Runner:
            record = staticmethod(runner.record)

            def __call__(self, masks):
                return {name: 2 * values for name, values in runner(masks).items()}

        return Runner()


def test_a_subclass_is_not_mistaken_for_its_parent(tmp_path):
    make(tmp_path / "s", Doubled())
    with pytest.raises(StudyError, match="class"):
        coar.Study.open(tmp_path / "s", SubsetMean())
    with pytest.raises(StudyError, match="class"):
        coar.Study.open(tmp_path / "s").run(progress=False)


@pytest.mark.slow
def test_a_subclass_runs_in_other_processes_as_here(tmp_path):
    study = make(tmp_path / "s", Doubled())
    study.run(coar.Processes(workers=1), progress=False)
    np.testing.assert_allclose(only(study), 2 * SubsetMean().prepare(None)(study.masks[:])["mean"], rtol=1e-6)


def test_natural_mistakes_are_named(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    with pytest.raises(SettingError, match=r"coar\.Processes\(workers=2\)"):
        study.run(2)
    with pytest.raises(SettingError, match=r"coar\.Ridge\(\)"):
        coar.fit(study, "ridge")
    with pytest.raises(SettingError, match="auto, cpu"):
        study.run(device="gpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        make(tmp_path / "file", experiment)
    with pytest.raises(CoarError, match=r"coar\.Task"):
        coar.ComponentAblation(torch.nn.Linear(2, 2), coar.find_components(torch.nn.Conv2d(1, 2, 3)))


def test_files_have_the_rights_of_any_new_file(tmp_path, experiment):
    study = make(tmp_path / "s", experiment)
    study.run(progress=False)
    (tmp_path / "plain").write_text("")
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "s").rglob("*") if path.is_file()} == {expected}
