"""The notebooks: their sources run as scripts on small data, and the .ipynb files are of these sources."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

import coar

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
SIZES = {  # examples and layers: enough for every cell, with numbers that mean little
    "cifar_resnet_small": ({"network": "resnet8", "num_examples": 8}, ["*"]),
    "imagenet_resnet50_small": ({"num_examples": 4}, ["layer1*"]),
}
MOST_BYTES = 500_000


def name_of(path):
    return path.stem


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def make_specs(folder):
    """The specs in use, smaller."""
    folder.mkdir()
    for name, (arguments, layers) in SIZES.items():
        spec = json.loads((ROOT / "specs" / f"{name}.json").read_text(encoding="utf-8"))
        spec["experiment"]["task"]["args"] |= arguments
        spec["experiment"]["components"] = {"kinds": ["conv_filter"], "include": layers}
        spec["estimator"]["num_rows"] = 60
        (folder / f"{name}.json").write_text(json.dumps(spec), encoding="utf-8")


def test_there_is_one_of_each_edit_and_of_each_network():
    edits = ["backdoor", "error", "forget_class", "language", "subpopulation", "typographic"]
    expected = [*(f"edit_{name}" for name in edits), "evaluate_cifar", "evaluate_imagenet"]
    assert list(map(name_of, SOURCES)) == expected


EVALUATIONS = [source for source in SOURCES if source.stem.startswith("evaluate_")]
EDITS = [source for source in SOURCES if source.stem.startswith("edit_")]


def run_as_script(source, folder):
    """Run a notebook's source on the small data that come along; returns the finished process."""
    shutil.copy(source, folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    environment["COAR_DATA"] = str(ROOT / "data")
    command = [sys.executable, "-W", "ignore::UserWarning", source.name]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("source", EDITS, ids=name_of)
def test_an_edit_runs_as_a_script(source, tmp_path):
    for module, extra in (("torchvision", "vision"), ("transformers", "language")):
        pytest.importorskip(module, reason=coar.errors.install_hint(extra))
    (tmp_path / "specs").symlink_to(ROOT / "specs")
    out = run_as_script(source, tmp_path).stdout
    assert re.search(r"ablating \d+ of \d+ components", out)  # an edit was made, within its guard


@pytest.mark.slow
@pytest.mark.parametrize("source", EVALUATIONS, ids=name_of)
def test_the_source_runs_as_a_script_and_again(source, tmp_path):
    pytest.importorskip("torchvision", reason=coar.errors.install_hint("vision"))
    make_specs(tmp_path / "specs")
    first, again = (run_as_script(source, tmp_path) for _ in range(2))
    assert "linear ceiling" in first.stdout
    assert again.stdout == first.stdout  # from what lies in runs/
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "specs", "runs"}


@pytest.mark.parametrize("source", EDITS, ids=name_of)
def test_an_edit_is_held_against_alternatives(source):
    book = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    shown = [output for cell in code_cells(book) for output in cell.outputs]
    tables = "".join(str(output.get("data", {}).get("text/plain", "")) for output in shown)
    assert all(name in tables for name in ("gate_gradients", "derivative", "random", "fine_tuning"))


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_notebook_is_of_this_source(source):
    book, text = nbformat.read(source.with_suffix(".ipynb"), as_version=4), jupytext.read(source)
    assert [(cell.cell_type, cell.source) for cell in book.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ], f"make notebooks: {source.name} has changed"


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_notebook_holds_its_outputs_and_nothing_of_the_machine(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size <= MOST_BYTES
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    counts = [cell.execution_count for cell in code_cells(book)]
    assert counts == list(range(1, len(counts) + 1))  # all cells, once, in order
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    # every line that draws has drawn; functions of the notebook may draw more
    text = source.read_text(encoding="utf-8")
    shown = re.findall(r"^(?:plt\.show\(\)|\S.*[\])]\.figure)$", text, flags=re.MULTILINE)
    assert len(pictures) >= max(3, len(shown))
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in texts if re.search(r"(^|[^\w.~])/\w[\w.-]*/\w", text)]  # absolute paths
