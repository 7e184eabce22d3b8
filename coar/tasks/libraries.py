"""Optional libraries, imported where a task needs them, and the generator that networks start from."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

from coar.errors import MissingDependencyError, install_hint


def library(name: str, extra: str) -> ModuleType:
    """Import a module of an optional library.

    Args:
        name: for example "torchvision.models".
        extra: the optional part of this package that brings it.

    Raises:
        MissingDependencyError: it is not installed; the error says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this task needs {name.partition('.')[0]}", got=str(error), todo=install_hint(extra)
        ) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator, seeded here and restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
