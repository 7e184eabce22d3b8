"""The demo: small here. A second run does nothing again and says the same."""

from __future__ import annotations

import functools
import re
import warnings
from types import SimpleNamespace

import pytest

from coar import demo
from coar.attributions import Attributions
from coar.edit import Edit
from coar.errors import CoarWarning
from coar.study import Study
from coar.tasks import digits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder, what two runs of a small demo said, and the files that each left."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", CoarWarning)  # few rows: the fit says so
        patch.setattr(demo, "NUM_ROWS", 340)
        patch.setattr(demo, "TEST_ROWS", 6)
        patch.setattr(
            demo, "digits", SimpleNamespace(make_task=functools.partial(digits.make_task, num_examples=150))
        )
        said, files = [], []
        for _ in range(2):
            paragraphs: list[str] = []
            demo.run_demo(folder, paragraphs.append)
            said.append("\n".join(paragraphs))
            files.append({path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")})
    return folder, said, files


def test_it_says_what_a_person_wants_to_read(runs):
    text = runs[1][0]
    for words in (
        "Training",
        "150 test images, accuracy",
        "312 filters",
        "regression",
        "leave-one-out",
        "gradient x parameter",
        "ablate 5%",
        "ablate 10%",
        "ablate 20%",
        "95 % interval",
        "misread images, each by itself",
        "Written",
        "Cost: 340 ablated models",
        "18 held out",
    ):
        assert words in text


def test_a_second_run_gives_the_same_numbers(runs):
    first, second = (comparable(text) for text in runs[1])
    assert first == second


def comparable(text):
    """Without how it began (training or resuming) and how long it took."""
    text = re.sub(r"(?m)^(Training|Resuming).*\n", "", text)
    return re.sub(r"; [^;]*this time", "", text)


def test_a_second_run_runs_no_row_again(runs):
    first, second = runs[2]
    assert first == second
    assert any(path.parent.name == "shards" for path in first)


def test_what_it_names_is_there(runs):
    folder, said, _ = runs
    study = Study.open(folder / "study")
    assert study.status().complete
    assert len(Attributions.load(study.attributions_path("ridge")).columns) == 150
    for line in said[0].split("Written", 1)[1].splitlines():
        name, _, path = line.strip().partition("  ")
        if name == "edit":
            assert Edit.load(path.strip()).names
        if name == "figure":
            assert (folder / "figures" / "demo.png").read_bytes().startswith(b"\x89PNG")
