"""The original fast_l1, kept from its known faults: what it reads, what it calls, when it stops.

Its solver iterates over a data loader until it is content. So all that has to be watched can be watched
from the loader (`Batches`, `Watch`), and from the few names that it calls (`substituted`):

    fault                                          what is done about it here
    the table of gradients is written by a         the "thread" runs at once, after waiting for the
    thread that nobody waits for                   device (`_AtOnce`)
    start penalties stay behind when columns       columns advance together, so none is ever moved
    change places                                  (`Watch.threshold`); every solution is checked after
    no limit on epochs                             the loader stops it (`Stopped`)
    NaN is never "converged": it runs for ever     looked for after every epoch
    Ctrl-C returns half a solution                 Ctrl-C passes through
    CPU tensors indexed on CUDA, as torch once     indices are moved first (`_IndicesFollow`)
    allowed
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from coar.errors import MissingDependencyError
from coar.regression.fast_l1_loader import Batches, Stopped

REPOSITORY = "https://github.com/MadryLab/fast_l1"


class Backend(Protocol):
    """Runs the solver, or replays a recording of it."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def train(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        rows: Batches,
        held_out: Batches | None,
        **settings: Any,
    ) -> torch.Tensor:
        """Solve in place, in standardised coordinates, and return the penalty chosen per column.

        Args:
            weight: float32 [components, columns], where to start; overwritten.
            bias: float32 [columns], likewise.
            rows: what to fit.
            held_out: what chooses the penalty; None where there is nothing to choose.
            settings: those of the original's `train_saga`, under its names.
        """


@dataclass(frozen=True)
class OriginalBackend:
    """The original's module `fast_l1.regressor`, on a device."""

    regressor: Any
    device: torch.device

    @classmethod
    def load(cls, device: torch.device) -> OriginalBackend:
        """Import it.

        Raises:
            MissingDependencyError: no CUDA device, no cupy, no fast_l1, or something else of that name.
        """
        missing = [name for name in ("cupy", "fast_l1") if importlib.util.find_spec(name) is None]
        if device.type != "cuda":
            missing.insert(0, f"CUDA (the fit runs on {device})")
        if missing:
            raise _missing(", ".join(missing))
        try:
            regressor = importlib.import_module("fast_l1.regressor")
        except ImportError as error:
            raise _missing(str(error)) from error
        if not hasattr(regressor, "train_saga"):
            raise _missing("another module of that name: it has no regressor.train_saga")
        return cls(regressor, device)

    def train(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        rows: Batches,
        held_out: Batches | None,
        **settings: Any,
    ) -> torch.Tensor:
        """Run `train_saga`; see `Backend.train`."""
        names = {"Thread": _at_once(self.device), "KeyboardInterrupt": Stopped, "tqdm": iter, "print": _quiet}
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with substituted(self.regressor, names), _IndicesFollow(), on_device, torch.no_grad():
            found: torch.Tensor = self.regressor.train_saga(weight, bias, rows, held_out, **settings)
        return found


def _missing(what: str) -> MissingDependencyError:
    return MissingDependencyError(
        "the original solver cannot run here",
        expected="a CUDA device, cupy, and fast_l1 from its own repository",
        got=f"missing: {what}",
        todo=f'pip install cupy-cuda12x (for CUDA 12) and pip install "git+{REPOSITORY}"; or leave it: '
        "coar.Ridge(penalties=0.0) and coar.Lasso() solve the same problems, on any machine",
    )


@contextlib.contextmanager
def substituted(module: ModuleType, names: dict[str, Any]) -> Iterator[None]:
    """Let a module find other things under these global names, for a while."""
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    vars(module).update(names)
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]
        vars(module).update(before)


def _quiet(*_: Any, **__: Any) -> None:
    """Print nothing."""


def _at_once(device: torch.device) -> type:
    """A stand-in for `threading.Thread` that has done its work when `start` returns."""

    class AtOnce:
        def __init__(self, target: Callable[..., None], args: tuple[Any, ...] = ()) -> None:
            self._work = target, args

        def start(self) -> None:
            if device.type == "cuda":  # what it reads may still be on its way from the device
                torch.cuda.current_stream(device).synchronize()
            target, args = self._work
            target(*args)

        def join(self) -> None:
            pass

    return AtOnce


class _IndicesFollow(TorchFunctionMode):
    """Indices of a CPU tensor may be on another device: torch allowed that when the original was written."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cpu":
            args = (args[0], _on_cpu(args[1]))
        return func(*args, **(kwargs or {}))


def _on_cpu(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_on_cpu, index))
    return index.cpu() if isinstance(index, torch.Tensor) else index
