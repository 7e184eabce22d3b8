"""Executor: decides where work items are done. It knows sessions and items, nothing of what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch


class WorkItem(Protocol):
    """What an executor hands to workers; picklable; `str` says what it is, for messages."""

    @property
    def index(self) -> int:
        """Number of the item, and of the file that it becomes."""

    def __len__(self) -> int:
        """How far it moves the progress bar."""


SomeItem = TypeVar("SomeItem", bound=WorkItem)


class ItemWorker(Protocol):
    """Does items of one study."""

    def do(self, item: Any) -> int:
        """Compute an item and store it; return how many of its rows failed."""


@runtime_checkable
class Session(Protocol):
    """How a worker gets ready; picklable, so that it can be sent to another process."""

    @property
    def device(self) -> torch.device:
        """Where to run unless the executor chooses."""

    def worker(self, device: torch.device) -> ItemWorker:
        """Rebuild the experiment and prepare it on a device."""


@runtime_checkable
class Executor(Protocol):
    """Runs work items somewhere."""

    def run(self, session: Session, items: Sequence[SomeItem]) -> Iterator[tuple[SomeItem, int]]:
        """Do all items in any order; yield each when it is stored, with its number of failed rows."""
