"""README: every Python block and every command runs exactly as printed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command, folder):
    # `coar` on the command line is the one of this environment
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the specs in it, shared by the examples as a reader's would be."""
    found = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "specs", found / "specs")
    return found


@pytest.mark.slow
def test_the_python_examples_run_as_printed(folder):
    examples = blocks("python")
    assert len(examples) == 4
    for number, code in enumerate(examples):
        script = folder / f"example_{number}.py"
        script.write_text(code)
        run([sys.executable, str(script)], folder)
    assert (folder / "runs/digits/edits/fix.json").exists()
    assert (folder / "runs/mine/attributions/loss/index.json").exists()


@pytest.mark.slow
def test_the_commands_run_as_printed_and_find_the_study_that_python_made(folder):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 7
    printed = [run(shlex.split(line, comments=True), folder) for line in lines]
    assert "4,000 of 4,000 rows" in "".join(printed)
    assert (folder / "runs/digits/edits/fix-misread.json").exists()


def test_every_command_of_make_that_is_named_exists():
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("")), flags=re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]
    assert not missing
