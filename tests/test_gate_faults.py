"""Faults: real kills, workers that die, two drivers, damaged and foreign files of gate gradients."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import coar
from coar.errors import StoreError
from coar.files import PARTIAL
from coar.gradients import GateGradientStudy
from coar.gradients.sums import FileSums
from coar.signed_arrays import read_signed, write_signed
from tests.gate_networks import FRACTION, OPTIONS, make_experiment, same_bits, same_files
from tests.refused import refused

ROOT = Path(__file__).parents[1]
RUN = """
import sys, torch, coar
torch.set_num_threads(1)
coar.GateGradientStudy.open(sys.argv[1]).run(progress=False)
"""


@pytest.fixture(scope="module")
def experiment():
    return make_experiment(12)


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


class TestFaults:
    @pytest.mark.slow
    def test_sigkill_at_any_moment_loses_nothing(self, tmp_path, experiment):
        options = {"passes": 160, "outputs": ["value"], "batch_size": 1}  # 12 blocks x 4 x 4 files
        study = GateGradientStudy.create(tmp_path / "s", experiment, FRACTION, **options)
        moments, kills = random.Random(0), 0
        for _ in range(3):
            process = subprocess.Popen([sys.executable, "-c", RUN, str(study.directory)], cwd=ROOT)
            before = study.status().files
            while study.status().files == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            for item in study.layout.items():
                if item.index in study.sums.present():
                    study.sums.read(item, "value")  # every file of that name is whole
        assert kills >= 2
        assert study.status().files > 0
        study.run(progress=False)
        undisturbed = GateGradientStudy.create(tmp_path / "u", experiment, FRACTION, **options)
        undisturbed.run(progress=False)
        same_files(study, undisturbed)
        same_bits(study.attributions(), undisturbed.attributions())

    @pytest.mark.slow
    def test_a_worker_that_dies_is_replaced(self, create, finished, tmp_path):
        study = create(passes=40)
        executor = _KillsAWorker(tmp_path)
        assert study.run(executor, progress=False).complete
        assert (tmp_path / "died").exists()
        same_files(study, GateGradientStudy.open(finished))

    @pytest.mark.slow
    def test_two_drivers_end_with_the_same_files(self, create):
        study, whole = (create(name, target_correlation=0.99) for name in ("two", "one"))
        command = [sys.executable, "-c", RUN, str(study.directory)]
        drivers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
        assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
        whole.run(progress=False)
        same_files(study, whole)
        same_bits(study.attributions(), whole.attributions())

    def test_a_partial_file_is_ignored_and_cleared_away(self, create, finished):
        study = create(passes=40)
        study.sums.folder.mkdir()
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        dead = study.sums.folder / f"000001.safetensors{PARTIAL}{os.uname().nodename}-{gone.pid}-{'b' * 32}"
        elsewhere = study.sums.folder / f"000002.safetensors{PARTIAL}another-host-1-{'c' * 32}"
        for path in (dead, elsewhere):
            path.write_bytes(b"half")
        assert study.status().files == 0
        study.run(progress=False)
        assert not dead.exists()
        assert elsewhere.exists()
        elsewhere.unlink()
        same_files(study, GateGradientStudy.open(finished))

    def test_another_worker_with_another_batch_size_was_first(self, copied):
        study = GateGradientStudy.open(copied)
        item = study.layout.items()[5]
        study.worker(torch.device("cpu"), batch_size=3).do(item)  # the first stays
        assert read_signed(study.sums.path(5), 1)[0]["record"]["batch_size"] == 4

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
    def test_a_damaged_file_is_named_and_redone_after_removal(self, copied, finished, damage):
        study = GateGradientStudy.open(copied)
        path = study.sums.path(7)
        whole = path.read_bytes()
        middle = len(whole) - 30
        flipped = whole[:middle] + bytes([whole[middle] ^ 0x55]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:middle], "flipped": flipped, "empty": b""}[damage])
        with refused(StoreError, "000007.safetensors", "damaged", "run again"):
            study.attributions()
        path.unlink()
        assert GateGradientStudy.open(copied).run(progress=False).complete
        assert path.read_bytes() == whole
        same_bits(study.attributions(), GateGradientStudy.open(finished).attributions())

    @pytest.mark.parametrize("index", [0, 20])
    def test_a_renamed_file_is_named(self, copied, index):
        study = GateGradientStudy.open(copied)
        shutil.copy(study.sums.path(11), study.sums.path(index))
        with refused(StoreError, f"{index:06d}.safetensors", "damaged", "run again"):
            study.attributions()

    def test_a_file_of_another_study_is_named(self, create, copied):
        other = create(passes=20, seed=1)
        other.run(progress=False)
        study = GateGradientStudy.open(copied)
        shutil.copy(other.sums.path(3), study.sums.path(3))
        with refused(StoreError, "000003.safetensors", "another study", "remove"):
            study.attributions()

    def test_a_file_of_a_newer_format_is_refused(self, copied):
        study = GateGradientStudy.open(copied)
        path = study.sums.path(2)
        header, found = read_signed(path, 1)
        path.unlink()
        del header["digests"]
        write_signed(path, found, header | {"format": 2})
        with refused(StoreError, "000002.safetensors", "newer version", "upgrade"):
            study.attributions()

    def test_a_file_of_other_outputs_is_refused(self, copied):
        study = GateGradientStudy.open(copied)
        sums = FileSums(copied, study.digest, ["value", "loss"], 12, 4)
        with refused(StoreError, "000000.safetensors", "damaged"):
            sums.read(study.layout.items()[0], "value")

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("{", "not a readable extension"),
            ("[]", "damaged"),
            ('{"format": 2, "rounds": 9}', "newer version"),
            ('{"format": 1, "rounds": 9}', "examples"),
            ('{"format": 1, "rounds": 1, "examples": []}', "2 rounds or more"),
            ('{"format": 1, "rounds": 9.5, "examples": []}', "rounds"),
            ('{"format": 1, "rounds": 9, "examples": [3]}', "positions"),
            ('{"format": 1, "rounds": 9, "examples": [99]}', "positions"),
            ('{"format": 1, "rounds": 9, "examples": ["a"]}', "positions"),
            ('{"format": 1, "rounds": 9, "examples": [1.5]}', "positions"),
        ],
    )
    def test_a_damaged_extension_is_named(self, copied, text, word):
        (copied / "extensions").mkdir()
        (copied / "extensions" / "000001.json").write_text(text)
        study = GateGradientStudy.open(copied)
        for use in (study.status, study.attributions):
            with refused(StoreError, "000001.json", word):
                use()

    def test_a_lost_extension_is_named(self, copied):
        study = GateGradientStudy.open(copied)
        for passes in (80, 120):
            study.extend(passes)
        (copied / "extensions" / "000001.json").unlink()
        with refused(StoreError, "000001.json is missing", "000002.json"):
            study.run(progress=False)


class _KillsAWorker:
    """Processes whose first worker to come to item 15 dies there, once."""

    def __init__(self, folder):
        self.folder = folder

    def run(self, session, items):
        return coar.Processes(workers=2, threads=1).run(_Deadly(session, str(self.folder / "died")), items)


class _Deadly:
    def __init__(self, session, marker):
        self.session, self.marker, self.device = session, marker, session.device

    def worker(self, device):
        return _DeadlyWorker(self.session.worker(device), Path(self.marker))


class _DeadlyWorker:
    def __init__(self, worker, marker):
        self.inner, self.marker = worker, marker

    def do(self, item):
        if item.index == 15 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.do(item)
