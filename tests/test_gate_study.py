"""The study of gate gradients: the same weights however it is cut, run, extended."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import coar
from coar.errors import SettingError, StudyError
from coar.gradients import GateGradientStudy, gate_gradients, plan_gate_gradients
from coar.gradients.draws import GateDraws
from coar.gradients.layout import REPLICATES, GateItem
from coar.gradients.passes import GatePasses
from coar.gradients.sums import MemorySums
from coar.gradients.worker import GateWorker
from coar.signed_arrays import read_signed
from tests.gate_networks import FRACTION, OPTIONS, make_experiment, same_bits, same_files, same_to_rounding
from tests.refused import refused


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(12)


@pytest.fixture(scope="module")
def additive():
    return make_experiment(12, layers=1)


@pytest.fixture
def create(tmp_path, experiment):
    """`create("name", passes=40)` is a study of 12 examples in blocks of 4."""

    def made(name="study", **options):
        return GateGradientStudy.create(tmp_path / name, experiment, FRACTION, **(OPTIONS | options))

    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory, experiment):
    """40 passes, in a folder to copy."""
    folder = tmp_path_factory.mktemp("finished") / "study"
    study = GateGradientStudy.create(folder, experiment, FRACTION, passes=40, **OPTIONS)
    study.run(progress=False)
    return folder


@pytest.fixture
def copied(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


class TestTheSameHoweverItIsRun:
    def test_in_memory_and_serial_are_the_same_bits(self, create, experiment):
        study = create(passes=40)
        assert study.run(progress=False).complete
        found = study.attributions()
        memory = gate_gradients(experiment, FRACTION, passes=40, output="value", batch_size=4, progress=False)
        same_bits(found, memory)
        assert found.provenance == memory.provenance

    def test_with_pooling_too(self, create, experiment):
        study = create(passes=40)
        study.run(progress=False)
        options = {"passes": 40, "output": "value", "batch_size": 4, "progress": False}
        same_bits(study.attributions(pool=True), gate_gradients(experiment, FRACTION, pool=True, **options))
        assert study.attributions(pool=True).provenance["pooled"] is True
        assert not np.array_equal(study.attributions(pool=True).weights, study.attributions().weights)

    def test_the_function_with_a_directory_is_that_study(self, tmp_path, experiment):
        options = {"passes": 40, "output": "value", "batch_size": 4, "progress": False}
        found = gate_gradients(experiment, FRACTION, directory=tmp_path / "s", device="cpu", **options)
        same_bits(found, gate_gradients(experiment, FRACTION, **options))
        study = GateGradientStudy.open(tmp_path / "s")
        assert study.spec.execution.batch_size == 4
        same_bits(study.attributions(), found)

    @pytest.mark.slow
    def test_two_processes_are_the_same_bits(self, create, finished):
        study = create(passes=40)
        assert study.run(coar.Processes(workers=2, threads=1), progress=False).complete
        other = GateGradientStudy.open(finished)
        same_files(study, other)
        same_bits(study.attributions(), other.attributions())

    def test_saved_attributions_are_those_in_memory(self, copied):
        study = GateGradientStudy.open(copied)
        same_bits(study.attributions(save_as="x"), study.attributions())
        assert coar.Attributions.load(study.attributions_path("x")).provenance["passes"] == 40
        same_bits(study.attributions(save_as="x"), study.attributions())  # equal ones may be there

    def test_the_batch_size_does_not_matter_but_for_rounding(self, create, finished):
        study = create(passes=40, batch_size=4)
        study.run(batch_size=3, progress=False)
        assert study.sums.means(study.layout.by_block(2)[0], "value").probe.shape == (REPLICATES, 4, 12)
        assert read_signed(study.sums.path(0), 1)[0]["record"]["batch_size"] == 3
        same_to_rounding(study.attributions(), GateGradientStudy.open(finished).attributions())

    @pytest.mark.parametrize(("examples", "seconds"), [(3, 60.0), (5, 1e-9), (100, 1e-9)])
    def test_blocks_and_items_do_not_matter_but_for_rounding(
        self, create, experiment, monkeypatch, examples, seconds
    ):
        """Sums are float32: cut elsewhere, they are added in another order."""
        monkeypatch.setattr("coar.gradients.planning._block_examples", lambda count, *_: min(count, examples))
        monkeypatch.setattr("coar.gradients.planning.ITEM_SECONDS", seconds)
        study = create(passes=80)
        study.run(progress=False)
        blocks = -(-12 // examples)
        cuts = 3 if seconds == 60.0 else 4  # 0-1, 1-2, 2-4, or one by one
        assert study.status().num_files == blocks * REPLICATES * cuts
        memory = gate_gradients(experiment, FRACTION, passes=80, output="value", batch_size=4, progress=False)
        same_to_rounding(study.attributions(), memory)

    def test_the_progress_bar_changes_nothing(self, create, finished):
        study = create(passes=40)
        study.run(progress=True)
        same_bits(study.attributions(), GateGradientStudy.open(finished).attributions())


class TestExtend:
    def test_twice_as_many_passes_are_those_at_once(self, create, copied):
        """Bit for bit: 2 rounds, and then 2 to 4, are where 4 rounds are cut."""
        study = GateGradientStudy.open(copied)
        study.extend(80)
        assert study.status().passes == 40
        assert study.status().num_passes == 80
        study.run(progress=False)
        whole = create(passes=80)
        whole.run(progress=False)
        same_files(study, whole)
        same_bits(study.attributions(), whole.attributions())
        assert study.attributions().provenance["passes"] == 80

    def test_from_another_number_to_rounding(self, create):
        """3 rounds are no power of two: sums are cut at 3 as well, and added up in another order."""
        study, whole = create(passes=60), create("whole", passes=80)
        study.run(progress=False)
        study.extend(80)
        study.run(progress=False)
        whole.run(progress=False)
        same_to_rounding(study.attributions(), whole.attributions())

    def test_creating_it_with_more_passes_goes_on_to_them(self, create):
        create(passes=20).run(progress=False)
        study = create(passes=40)
        assert study.status().num_passes == 20  # not before it runs
        assert study.run(progress=False).passes == 40
        assert GateGradientStudy.open(study.directory).status().num_passes == 40

    def test_with_fewer_passes_nothing_is_lost_or_claimed(self, create, copied):
        shutil.copytree(copied, copied.parent / "study")
        study = create(passes=20)
        before = sorted(study.sums.folder.iterdir())
        status = study.run(progress=False)
        assert (status.passes, status.num_passes, status.complete) == (40, 40, True)
        assert study.attributions().provenance["passes"] == 40
        assert sorted(study.sums.folder.iterdir()) == before

    def test_attributions_of_what_is_complete_while_more_is_asked_for(self, copied):
        study = GateGradientStudy.open(copied)
        before = study.attributions()
        study.extend(80)
        same_bits(study.attributions(), before)
        assert study.attributions().provenance["passes"] == 40

    def test_further_examples_catch_up_and_are_those_of_a_whole_run(self, tmp_path, additive):
        """The outputs are additive: there is no noise, and mixing has nothing to share between examples."""
        options = {"passes": 40, **OPTIONS}
        study = GateGradientStudy.create(tmp_path / "s", additive, FRACTION, examples=range(5, 10), **options)
        study.run(progress=False)
        study.extend(examples=[3, 10, 11, 2])
        with refused(StudyError, "no complete round", "16 of", "run it"):
            study.attributions()
        study.run(progress=False)
        found = study.attributions()
        chosen = [*range(5, 10), 2, 3, 10, 11]
        whole = gate_gradients(additive, FRACTION, output="value", passes=40, progress=False)
        assert found.columns == whole.columns.subset(np.array(chosen))
        np.testing.assert_allclose(found.weights, whole.weights[chosen], atol=1e-5)
        np.testing.assert_allclose(found.intercept, whole.intercept[chosen], atol=1e-5)

    def test_means_of_examples_are_the_same_bits_whenever_they_were_asked_for(self, create, finished):
        study = create(passes=20, examples=range(4, 8))
        study.run(progress=False)
        study.extend(40, [*range(4), *range(8, 12)])
        study.run(progress=False)
        whole = GateGradientStudy.open(finished)
        places = {block: number for number, block in enumerate(whole.layout.blocks)}
        for number, block in enumerate(study.layout.blocks):
            items = study.layout.by_block(2)[number], whole.layout.by_block(2)[places[block]]
            found, theirs = (s.sums.means(i, "value") for s, i in zip((study, whole), items, strict=True))
            np.testing.assert_array_equal(found.probe, theirs.probe)
            np.testing.assert_array_equal(found.kept, theirs.kept)
            np.testing.assert_array_equal(found.values, theirs.values)

    @pytest.mark.parametrize(
        ("passes", "examples"), [(40, None), (20, None), (None, None), (80, [3]), (None, [12]), (0, None)]
    )
    def test_it_only_grows(self, copied, passes, examples):
        study = GateGradientStudy.open(copied)
        with pytest.raises((StudyError, SettingError)):
            study.extend(passes, examples)
        assert study.status().num_passes == 40
        assert not (copied / "extensions").exists()

    def test_a_slip_of_the_finger_is_refused_before_it_is_written(self, create, monkeypatch):
        """What is written once stays: so many items would be counted for ever after."""
        monkeypatch.setattr("coar.gradients.planning.ITEM_SECONDS", 1e-9)  # as where passes take minutes
        study = create(passes=20)
        with refused(SettingError, "too many files", "fewer passes"):
            study.extend(20_000_000)
        assert study.status().num_passes == 20
        with refused(SettingError, "too many files"):
            create("other", passes=20_000_000)
        assert not (study.directory.parent / "other").exists()

    def test_a_second_run_does_nothing(self, copied):
        before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
        GateGradientStudy.open(copied).run(progress=False)
        assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before

    def test_a_name_of_other_passes_or_columns_is_taken(self, tmp_path, additive):
        study = GateGradientStudy.create(
            tmp_path / "s", additive, FRACTION, passes=20, examples=range(8), **OPTIONS
        )
        study.run(progress=False)
        study.attributions(save_as="x")
        with refused(StudyError, "'x' exist", "20 passes", "pooled", "--name"):
            study.attributions(save_as="x", pool=True)
        study.extend(examples=range(8, 12))
        study.run(progress=False)
        with refused(StudyError, "'x' exist", "8 columns", "12 columns", "--name"):
            study.attributions(save_as="x")
        study.extend(40)
        study.run(progress=False)
        with refused(StudyError, "'x' exist", "20 passes", "40 passes"):
            study.attributions(save_as="x")
        assert study.attributions(save_as="y").provenance["passes"] == 40


class Counting(nn.Sequential):
    """Counts forward passes, of copies too."""

    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


class TestOutputs:
    def test_several_outputs_share_a_forward_pass(self, create, experiment):
        study = create(passes=20, outputs=None)
        assert set(study.spec.outputs) == {"value", "both"}
        study.run(progress=False)
        with refused(SettingError, "which output?", "value, both"):
            study.attributions()
        for name, columns in (("value", 12), ("both", 24)):
            alone = gate_gradients(experiment, FRACTION, passes=20, output=name, batch_size=4, progress=False)
            assert alone.weights.shape == (columns, 12)
            same_to_rounding(study.attributions(name), alone)
        assert study.progress().correlation == min(
            study.progress(name).correlation for name in ("value", "both")
        )

    def test_the_model_runs_once_for_all_outputs(self):
        task = make_experiment(12).task
        task = coar.Task(Counting(*task.model).eval(), task.dataset, task.outputs, device="cpu")
        experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["neuron"]))
        axes = {name: axis.fields["example"] for name, axis in experiment.columns.items()}
        counts = {}
        for names in (("value",), ("value", "both")):
            passes = GatePasses(experiment, names, torch.device("cpu"), batch_size=4)
            draws = GateDraws(FRACTION, 0, 12)
            store = MemorySums(REPLICATES)
            worker = GateWorker(
                passes, draws, {n: axes[n] for n in names}, experiment.components.names, store
            )
            Counting.calls = 0
            worker.do(GateItem(0, 0, tuple(range(12)), 0, 0, 2))
            counts[names] = Counting.calls
            assert store.means(0, names[-1], 2).probe.shape == (REPLICATES, 12 * len(names), 12)
        assert counts["value",] == counts["value", "both"] == 3 * 2 * draws.passes_per_round

    def test_the_plan_counts_backward_passes(self, experiment):
        text = plan_gate_gradients(experiment, FRACTION, passes=50, batch_size=4).summary()
        assert "60 passes x 12 examples, 12 components" in text
        assert "3 backward passes for each forward pass" in text
        assert "at most" not in text
        assert "at most 400 passes" in plan_gate_gradients(experiment, FRACTION, outputs=["value"]).summary()
        with refused(SettingError, "no such output", "loss"):
            plan_gate_gradients(experiment, FRACTION, outputs=["loss"])

    def test_the_plan_counts_the_files_that_come(self, create, experiment):
        study = create(passes=60)
        study.run(progress=False)
        text = plan_gate_gradients(experiment, FRACTION, passes=60, outputs=["value"], batch_size=4).summary()
        assert f"in {study.status().files} files" in text
