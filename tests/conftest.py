"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from coar import cli
from coar.task import Task

# The models are tiny: threads that wait for each other on a busy machine take ten times as long as one.
torch.set_num_threads(1)
# The same examples in every run, however slow the machine: a red test stays red until it is mended.
settings.register_profile("coar", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("coar")


@pytest.fixture(scope="session")
def digits_task() -> Task:
    """120 held-out digits and a network trained on others, once per session (8 seconds)."""
    from coar.tasks import digits

    return digits.make_task(num_examples=120)


@pytest.fixture
def coar(monkeypatch, capsys):
    """`coar("run", folder)` is that command; returns exit status, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["coar", *map(str, words)])
        with warnings.catch_warnings():  # the command line prints them instead
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as ended:
                cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def works(coar):
    """As `coar`, for commands that must succeed; returns standard output."""

    def call(*words):
        status, out, err = coar(*words)
        assert status == 0, err
        return out

    return call


@pytest.fixture
def fails(coar):
    """As `coar`, for commands that must not; returns standard error, which is no traceback."""

    def call(*words, status=1):
        found, out, err = coar(*words)
        assert found == status, (found, out, err)
        assert "Traceback" not in err
        assert status != 1 or err.startswith("coar: ")
        return err

    return call


@pytest.fixture
def require() -> Callable[[str, bool, str], None]:
    """`require(name, available, reason)` skips a test, but fails it where COAR_REQUIRE lists the name.

    COAR_REQUIRE is comma-separated: the machine that sets it promises to have these things.
    """
    return require_or_skip


def require_or_skip(name: str, available: bool, reason: str) -> None:
    if available:
        return
    promised = {part.strip() for part in os.environ.get("COAR_REQUIRE", "").split(",")}
    if name in promised:
        pytest.fail(f"COAR_REQUIRE promises {name!r}, but {reason}")
    pytest.skip(f"{name}: {reason}")
