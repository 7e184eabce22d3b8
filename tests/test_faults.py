"""Faults: real kills, a real full disk, damaged shards. The run resumes, or the fit names the shard."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import coar
from coar.errors import FitError, StoreError
from coar.files import PARTIAL
from coar.testing import SubsetMean

DESIGN = coar.Bernoulli(ablation_fraction=0.3, seed=2)
ROWS = 400
RUN = "import sys, coar; coar.Study.open(sys.argv[1]).run(progress=False)"


@pytest.fixture
def study(tmp_path):
    return coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, ROWS, rows_per_shard=2)


@pytest.fixture
def undisturbed(tmp_path):
    study = coar.Study.create(tmp_path / "undisturbed", SubsetMean(), DESIGN, ROWS, rows_per_shard=50)
    study.run(progress=False)
    return study


def same_rows(study, other):
    np.testing.assert_array_equal(study.masks, other.masks)
    np.testing.assert_array_equal(study.outputs["mean"], other.outputs["mean"])


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_nothing_that_was_finished(tmp_path):
    """A driver is killed again and again while it writes; what it left is whole, and it resumes."""
    study = coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, 3_000, rows_per_shard=1)
    undisturbed = coar.Study.create(tmp_path / "u", SubsetMean(), DESIGN, 3_000, rows_per_shard=500)
    undisturbed.run(progress=False)
    moments = random.Random(0)
    kills = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", RUN, str(study.directory)])
        before = study.status().shards
        while study.status().shards == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for item in study.finished():
            study.store.read(item)  # every file that has a shard's name is whole
    assert kills >= 3
    study.run(progress=False)
    same_rows(study, undisturbed)


def test_a_partial_file_of_a_killed_writer_is_ignored_and_cleared_away(study, undisturbed):
    shards = study.directory / "shards"
    shards.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    mine = shards / f"000000.safetensors{PARTIAL}{host}-{os.getpid()}-{'a' * 32}"
    dead = shards / f"000001.safetensors{PARTIAL}{host}-{gone.pid}-{'b' * 32}"
    elsewhere = shards / f"000002.safetensors{PARTIAL}another-host-1-{'c' * 32}"
    for path in (mine, dead, elsewhere):
        path.write_bytes(b"half a sha")
    study.run(progress=False)
    same_rows(study, undisturbed)
    assert mine.exists()
    assert elsewhere.exists()
    assert not dead.exists()


def test_creating_a_study_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "coar.creation.write_json_once", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(StoreError, match="cannot create"):
        coar.Study.create(tmp_path / "s", SubsetMean(), DESIGN, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_shard_stops_the_fit_and_is_named_and_can_be_redone(study, undisturbed, damage):
    study.run(progress=False)
    path = study.store.path(3)
    data = path.read_bytes()
    middle = len(data) - 20
    path.write_bytes(
        {"truncate": data[:middle], "flip": data[:middle] + b"\x55" + data[middle + 1 :], "empty": b""}[
            damage
        ]
    )
    with pytest.raises(StoreError, match=r"000003\.safetensors") as error:
        coar.fit(coar.Study.open(study.directory))
    assert "run again" in error.value.todo
    path.unlink()
    coar.Study.open(study.directory).run(progress=False)
    same_rows(study, undisturbed)


def test_a_missing_shard_stops_the_fit_and_is_named(study):
    study.run(progress=False)
    study.store.path(5).unlink()
    with pytest.raises(FitError, match=r"000005\.safetensors"):
        coar.fit(study)
    assert coar.fit(study, partial=True).provenance["rows"] == ROWS - 2


def test_a_shard_of_another_study_stops_the_fit(tmp_path, study):
    study.run(progress=False)
    other = coar.Study.create(
        tmp_path / "other", SubsetMean(), DESIGN.model_copy(update={"seed": 3}), ROWS, rows_per_shard=2
    )
    other.run(progress=False)
    shutil.copy(other.store.path(4), study.store.path(4))
    with pytest.raises(StoreError, match="another study"):
        coar.fit(coar.Study.open(study.directory))


def test_a_read_only_folder_gives_a_clear_error(study, monkeypatch):
    """Root may write anywhere, so the refusal of the file system is put in its place."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("coar.files.save_file", refuse)
    with pytest.raises(StoreError, match="Permission denied") as error:
        study.run(progress=False)
    assert "run again" in error.value.todo


@pytest.mark.system
def test_a_full_disk_gives_a_clear_error_and_the_run_resumes(tmp_path, undisturbed, require):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mounted = (
        mounted
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    require("tmpfs", bool(mounted), "mounting a small tmpfs needs root and mount")
    try:
        study = coar.Study.create(disk / "s", SubsetMean(), DESIGN, ROWS, rows_per_shard=2)
        with pytest.raises(StoreError, match=r"No space left|full"):
            study.run(progress=False)
        finished = study.finished()
        assert 0 < len(finished) < len(study.items())
        for item in finished:
            study.store.read(item)
        assert not list((disk / "s/shards").glob(f"*{PARTIAL}*"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        study.run(progress=False)
        same_rows(study, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_two_drivers_on_one_study_lose_nothing(study, undisturbed):
    command = [sys.executable, "-c", RUN, str(study.directory)]
    drivers = [subprocess.Popen(command) for _ in range(2)]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert study.status().complete
    same_rows(study, undisturbed)
