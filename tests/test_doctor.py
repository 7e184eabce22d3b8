"""doctor: says what is fine, what is missing, what is broken; leaves nothing behind."""

from __future__ import annotations

import re

import pytest
import torch

from coar import doctor
from coar.doctor import Finding, examine


@pytest.fixture
def no_extras(monkeypatch):
    """Only the checks that every installation must pass."""
    monkeypatch.setattr(doctor, "EXTRAS", {})


def problems(findings):
    return [finding.what for finding in findings if finding.state == "problem"]


def test_this_installation_is_fit_for_use(tmp_path):
    findings = examine(tmp_path)
    assert problems(findings) == []
    said = "\n".join(map(str, findings))
    for words in ("torch 2", "cores", "random masks", "first writer wins", "known attributions"):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_every_line_begins_with_its_state():
    assert str(Finding("ok", "all is well")).split() == ["ok", "all", "is", "well"]
    assert str(Finding("problem", "no")).startswith("problem ")


@pytest.mark.usefixtures("no_extras")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    (found,) = problems(examine(tmp_path / "missing"))
    assert "not so: files are written whole" in found
    assert "missing" in found


@pytest.mark.usefixtures("no_extras")
def test_other_random_words_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "words", lambda *_: [1, 2])
    (found,) = problems(examine())
    assert "not so: random masks" in found
    assert "Philox" in found
    assert str(doctor.GOLDEN_WORDS) in found


@pytest.mark.usefixtures("no_extras")
def test_a_file_that_can_be_overwritten_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "write_json_once", lambda *_: True)
    (found,) = problems(examine())
    assert "a second writer replaced" in found


@pytest.mark.usefixtures("no_extras")
def test_an_ablation_with_other_numbers_is_a_problem(monkeypatch):
    experiment, weights = doctor.linear_experiment()
    monkeypatch.setattr(doctor, "linear_experiment", lambda: (experiment, weights + 1))
    (found,) = problems(examine())
    assert "not so: ablation of a linear model" in found


def test_a_missing_extra_is_a_note_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"ghosts": ("numpy", "no_such_module_at_all")})
    found = examine()[-1]
    assert found.state == "note"
    assert "no_such_module_at_all not installed" in found.what
    assert "numpy" not in found.what
    assert 'pip install "torch-coar[ghosts]"' in found.what


def test_an_extra_that_is_there_is_named_with_its_version(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"numbers": ("numpy",)})
    found = examine()[-1]
    assert found.state == "ok"
    assert re.search(r"numbers: numpy \d+\.\d+", found.what)


def test_a_folder_that_happens_to_have_the_name_of_an_extra_is_none(monkeypatch, tmp_path):
    (tmp_path / "no_such_module_at_all").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "EXTRAS", {"ghosts": ("no_such_module_at_all",)})
    assert examine()[-1].state == "note"


def test_the_solvers_are_optional_parts():
    said = "\n".join(map(str, examine()))
    assert "optional part lasso: numba" in said
    assert "optional part fast_l1: " in said
    assert not torch.cuda.is_available() or "no CUDA device" not in said


def test_without_a_gpu_or_cupy_it_says_how_to_get_the_original_solver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    (found,) = (finding for finding in examine() if "fast_l1" in finding.what)
    assert found.state == "note"
    assert "no CUDA device, cupy not installed, fast_l1 not installed" in found.what
    assert "pip install cupy-cuda12x" in found.what


def test_a_broken_numba_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"lasso": ("numpy",)})
    monkeypatch.setattr(doctor.coordinate_descent, "why_not", lambda: "numba cannot be imported (so)")
    assert examine()[-1].state == "note"
    assert "numba cannot be imported (so)" in examine()[-1].what
