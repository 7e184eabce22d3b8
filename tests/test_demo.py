"""The demo: small here. A second run does nothing again and says the same."""

from __future__ import annotations

import functools
import re
import warnings
from types import SimpleNamespace

import pytest
from safetensors.torch import save_model

from coar import demo
from coar.attributions import Attributions
from coar.editing import Edit
from coar.errors import CoarWarning
from coar.report import figures
from coar.study import Study
from coar.tasks import digits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_task):
    """Folder, what two runs of a small demo said, and the files that each left.

    The network is the one that the session has trained already.
    """
    folder = tmp_path_factory.mktemp("demo")
    weights = str(tmp_path_factory.mktemp("weights") / "digits.safetensors")
    save_model(digits_task.model, weights)
    small = functools.partial(digits.make_task, num_examples=150, weights=weights)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", CoarWarning)  # few rows: the fit says so
        patch.setattr(demo, "NUM_ROWS", 340)
        patch.setattr(demo, "TEST_ROWS", 6)
        patch.setattr(demo, "CHECK_ROWS", 30)
        patch.setattr(demo, "MAX_DROP", 0.5)  # so few rows fix nothing for less
        patch.setattr(demo, "digits", SimpleNamespace(make_task=small))
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
        "gate gradients minus regression",
        "fresh ablations of 10%",
        "no problem found",
        "so few are rough",
    ):
        assert words in text


def test_costs_are_in_one_currency(runs):
    lines = runs[1][0].split("Cost, in forward passes", 1)[1].splitlines()[1:]
    found = dict(
        re.match(r"  (\S.*\S) +([\d,]+)(?:;|$)", line).groups() for line in lines if "all" not in line
    )
    assert {name.strip(): int(count.replace(",", "")) for name, count in found.items()} == {
        "gate gradients": 3 * 20,
        "regression": 340,
        "leave-one-out": 312 + 1,
        "gradient x parameter": 3,
        "held-out ablations": 3 * 6,
    }


def test_a_second_run_gives_the_same_numbers(runs):
    first, second = (comparable(text) for text in runs[1])
    assert first == second


def comparable(text):
    """Without how it began (training or resuming) and how long it took."""
    text = re.sub(r"(?m)^(Training|Resuming).*\n", "", text)
    return re.sub(r"(;| all together) [^;\n]*this time", "", text)


def test_a_second_run_runs_no_row_again(runs):
    first, second = runs[2]
    assert first == second
    assert any(path.parent.name == "shards" for path in first)


def test_a_digit_is_drawn_with_its_label(digits_task):
    ax = figures.new_figure()[1][0]
    digits_task.show(digits_task.dataset[3], ax)
    image, label = digits_task.dataset[3]
    assert ax.images[0].get_array().tolist() == image[0].tolist()
    assert ax.get_title() == f"a {int(label)}"


def test_what_it_names_is_there(runs):
    folder, said, _ = runs
    lines = said[0].split("Written", 1)[1].split("Cost", 1)[0].split("\n")
    named = dict(line.strip().split(maxsplit=1) for line in lines if line.strip())
    assert Study.open(named["study"]).status().complete
    assert len(Attributions.load(named["attributions"]).columns) == 150
    fixed = " -> " in said[0]  # an image was; if none is, there is nothing to draw and to save
    assert set(named) == {"study", "attributions"} | ({"edit", "figure"} if fixed else set())
    if fixed:
        assert Edit.load(named["edit"]).names
        assert (folder / "figures" / "demo.png").read_bytes().startswith(b"\x89PNG")
