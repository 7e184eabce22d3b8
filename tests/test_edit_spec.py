"""An edit as one file: read strictly, built, made from Python and by the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import coar
from coar.editing.edit_spec import EditSpec
from coar.errors import SpecError
from tests.refused import refused

SPEC = {
    "format": 1,
    "experiment": {
        "task": {"factory": "tests.contributions:make_labelled_task", "args": {}},
        "components": {"kinds": ["neuron"], "include": ["hidden"]},
    },
    "parts": {
        "targets": "kind == 'held back'",
        "references": "kind == 'other'",
        "num_targets": 3,
        "num_references": 4,
    },
    "edit": {"sizes": [1, 2], "passes": 8},
}


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "edit.json"
    path.write_text(json.dumps(SPEC), encoding="utf-8")
    return path


def test_a_file_makes_the_edit_that_python_makes(spec):
    read = EditSpec.load(spec)
    assert EditSpec.from_json(read.to_json()) == read
    experiment, parts = read.build()
    found = coar.make_edit(experiment, parts, **read.edit.arguments())
    drawn = coar.draw_parts(experiment.task, **SPEC["parts"])
    direct = coar.make_edit(experiment, drawn, **SPEC["edit"])
    assert found.edit == direct.edit
    assert set(found.edit.names) == {"hidden[0]", "hidden[1]"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": {"targets": "a"}}, ("references",)),
        ({"edit": {"direction": "up"}}, ("direction", "raise")),
        ({"edit": {"sizees": [1]}}, ("sizees", "sizes")),
        ({"edit": {"max_accuracy_drop": 5}}, ("max_accuracy_drop",)),
        ({"format": 2}, ("format",)),
        ({"design": {}}, ("design",)),
        ({"experiment": {"name": "coar.testing:SubsetMean", "args": {}}}, ("ablates components",)),
    ],
)
def test_what_is_no_edit_is_refused(change, words):
    with refused(SpecError, *words):
        EditSpec.from_json(SPEC | change).build()


def test_the_command_makes_it_and_compares(works, spec, tmp_path):
    out = works(
        "make-edit", spec, "--save-to", tmp_path / "fix.json", "--compare", "--figure", tmp_path / "curve.png"
    )
    assert "ablating 2 of 5 components" in out
    assert re.search(r"gate_gradients +2 .* 0\.0% -> 100\.0%", out)
    assert "fine_tuning" in out
    edit = coar.Edit.load(tmp_path / "fix.json")
    assert set(edit.names) == {"hidden[0]", "hidden[1]"}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    works("make-edit", spec, "--save-to", tmp_path / "fix.json")  # the same again


def test_the_command_refuses_what_cannot_be_done(fails, spec, tmp_path):
    value = SPEC | {"edit": {"sizes": [5], "passes": 8}}
    spec.write_text(json.dumps(value), encoding="utf-8")
    err = fails("make-edit", spec, "--save-to", tmp_path / "fix.json")
    assert "nothing was applied" in err
    assert not (tmp_path / "fix.json").exists()


def test_another_seed_draws_other_examples(works, spec, tmp_path):
    works("make-edit", spec, "--save-to", tmp_path / "1.json", "--seed", "1")
    works("make-edit", spec, "--save-to", tmp_path / "2.json", "--seed", "2")
    one, two = (coar.Edit.load(tmp_path / f"{seed}.json").provenance["targets"] for seed in (1, 2))
    assert one != two


PAGE = Path(__file__).parents[1] / "docs/editing.md"


@pytest.mark.slow
def test_the_page_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S):
        exec(compile(example, str(PAGE), "exec"), names)
    result = names["result"]
    assert result.judged.accuracy_after < result.judged.accuracy_before / 2
    table = names["comparison"].table.set_index("method")
    assert table.targets_after["gate_gradients"] < table.targets_after["random"]
    assert names["smaller"].parameters_after < names["smaller"].parameters_before
    assert "gate_gradients" in capsys.readouterr().out
