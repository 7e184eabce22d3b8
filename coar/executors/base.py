"""Executor: decides where work items are done. It knows sessions and items, nothing of what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch

from coar.store import Item
from coar.work import Worker


@runtime_checkable
class Session(Protocol):
    """How a worker gets ready; picklable, so that it can be sent to another process."""

    @property
    def device(self) -> torch.device:
        """Where to run unless the executor chooses."""

    def worker(self, device: torch.device) -> Worker:
        """Rebuild the experiment and prepare it on a device."""


@runtime_checkable
class Executor(Protocol):
    """Runs work items somewhere."""

    def run(self, session: Session, items: Sequence[Item]) -> Iterator[tuple[Item, int]]:
        """Do all items in any order; yield each when it is stored, with its number of failed rows."""
