"""Serial: all items in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from coar.executors.base import Session, SomeItem


class Serial:
    """Run in this process, on the experiment's device.

    >>> Serial()
    Serial()
    """

    def __repr__(self) -> str:
        return "Serial()"

    def run(self, session: Session, items: Sequence[SomeItem]) -> Iterator[tuple[SomeItem, int]]:
        """Do the items in order."""
        worker = session.worker(session.device)
        for item in items:
            yield item, worker.do(item)
