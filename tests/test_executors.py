"""Executors: the same bits everywhere; a worker's death costs its item's work and nothing else."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import coar
from coar.errors import ExecutorError, SettingError, StudyError
from coar.experiments.ablation import ComponentAblation
from coar.testing import SubsetMean, check_executor, linear_task

DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)


def test_serial_keeps_the_contract():
    check_executor(coar.Serial())


@pytest.mark.slow
def test_processes_keep_the_contract():
    check_executor(coar.Processes(workers=2))


@pytest.mark.slow
def test_outputs_are_bit_identical_for_equal_execution_records(tmp_path, digits_task):
    experiment = ComponentAblation(digits_task, coar.find_components(digits_task.model))
    threads = torch.get_num_threads()
    studies = [coar.Study.create(tmp_path / name, experiment, DESIGN, 12, rows_per_shard=4) for name in "ab"]
    studies[0].run(progress=False)
    studies[1].run(coar.Processes(workers=2, threads=threads), progress=False)
    records = [study.store.read(study.items()[0]).record for study in studies]
    assert records[0] == records[1]
    np.testing.assert_array_equal(studies[0].outputs["margin"], studies[1].outputs["margin"])


class Deadly(SubsetMean):
    """Kills its process in a given row: once, or every time."""

    def __init__(self, marker, always=False):
        super().__init__()
        self.marker, self.always = str(marker), always

    def to_spec(self):
        return {"name": "tests.test_executors:Deadly", "args": {"marker": self.marker, "always": self.always}}

    def prepare(self, device, batch_size=None, precision="float32"):
        runner = super().prepare(device, batch_size, precision)
        deadly_mask = DESIGN.masks([8], len(self.components))[0]
        marker, always = self.marker, self.always

        class Runner:
            record = staticmethod(runner.record)

            def __call__(self, masks):
                in_worker = os.environ.get("DEADLY_PARENT") != str(os.getpid())
                if in_worker and (masks == deadly_mask).all() and (always or not os.path.exists(marker)):  # noqa: PTH110
                    open(marker, "w").close()  # noqa: PTH123
                    os.kill(os.getpid(), signal.SIGKILL)
                return runner(masks)

        return Runner()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_item_done_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADLY_PARENT", str(os.getpid()))
    study = coar.Study.create(tmp_path / "s", Deadly(tmp_path / "killed"), DESIGN, 20, rows_per_shard=5)
    assert study.run(coar.Processes(workers=2), progress=False).complete
    assert (tmp_path / "killed").exists()
    reference = coar.Study.create(tmp_path / "r", SubsetMean(), DESIGN, 20)
    reference.run(progress=False)
    np.testing.assert_array_equal(study.outputs["mean"], reference.outputs["mean"])


@pytest.mark.slow
def test_an_item_that_kills_three_workers_is_named_and_the_others_are_done(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADLY_PARENT", str(os.getpid()))
    experiment = Deadly(tmp_path / "killed", always=True)
    study = coar.Study.create(tmp_path / "s", experiment, DESIGN, 20, rows_per_shard=5)
    with pytest.raises(ExecutorError, match=r"rows 5 to 10"):
        study.run(coar.Processes(workers=2), progress=False)
    assert study.status().shards == 3


@pytest.mark.slow
def test_an_error_in_a_worker_reaches_the_driver_with_its_class_and_parts(tmp_path):
    study = coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, 20)
    spec = (tmp_path / "s/spec.json").read_text()
    (tmp_path / "s/spec.json").write_text(spec.replace('"num_points": 15', '"num_points": 14'))
    with pytest.raises(StudyError, match="data") as error:
        study.run(coar.Processes(workers=1), progress=False)
    assert error.value.todo is not None


@pytest.mark.slow
def test_a_task_in_memory_is_sent_once(tmp_path):
    task = linear_task()
    task.recipe = None
    experiment = ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["hidden"]))
    study = coar.Study.create(tmp_path / "s", experiment, DESIGN, 20, rows_per_shard=5)
    assert study.run(coar.Processes(workers=2), progress=False).complete


def test_a_task_that_cannot_be_sent_is_refused_with_what_to_write(tmp_path):
    task = linear_task()
    task.recipe = None
    task.outputs = {"score": lambda model, batch: model(batch)}
    experiment = ComponentAblation(task, coar.find_components(task.model, ["neuron"], ["hidden"]))
    study = coar.Study.create(tmp_path / "s", experiment, DESIGN, 20)
    with pytest.raises(ExecutorError, match="task_factory"):
        study.run(coar.Processes(workers=2), progress=False)
    assert study.run(coar.Serial(), progress=False).complete


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_a_senseless_number_of_workers_is_refused(bad):
    with pytest.raises(SettingError, match="workers"):
        coar.Processes(workers=bad)


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import coar
            from coar.testing import SubsetMean

            print("started")
            design = coar.Bernoulli(ablation_fraction=0.3, seed=2)
            study = coar.Study.create({str(tmp_path / "s")!r}, SubsetMean(), design, num_rows=20)
            study.run(coar.Processes(workers=2), progress=False)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1
    assert coar.Study.open(tmp_path / "s").status().complete
