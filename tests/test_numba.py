"""Coordinate descent is used where numba is there and works; else FISTA is, and it is said why."""

import sys

import numpy as np
import pytest

from coar.errors import MissingDependencyError
from coar.regression import coordinate_descent
from coar.regression.lasso import Lasso
from coar.regression.problem import Problem
from tests.refused import refused


@pytest.fixture(autouse=True)
def tried_anew():
    coordinate_descent.why_not.cache_clear()
    yield
    coordinate_descent.why_not.cache_clear()


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A numba that is found, but raises when it is imported."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise SystemError('made for\\nanother numpy')")
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def problem():
    masks = np.random.default_rng(0).random((40, 3)) < 0.5
    return Problem.from_arrays(masks, masks @ np.ones((3, 2)))


@pytest.mark.usefixtures("broken")
def test_a_broken_numba_is_not_used_and_the_reason_is_kept(problem):
    assert not coordinate_descent.available()
    notes = Lasso().prepare(problem).notes
    reason = "numba cannot be imported (SystemError: made for another numpy)"
    assert notes == {"algorithm": "fista", "why": reason}


@pytest.mark.usefixtures("broken")
def test_asked_for_it_says_what_is_wrong(problem):
    words = "got:      numba cannot be imported (SystemError", "pip install numba", "algorithm='fista'"
    with refused(MissingDependencyError, "coordinate descent needs numba", *words):
        Lasso(algorithm="coordinate_descent").prepare(problem)


def test_a_missing_numba_is_called_that(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert "numba" in coordinate_descent.why_not()
    assert not coordinate_descent.available()
