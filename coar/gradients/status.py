"""GateStatus: how far a study of gate gradients is."""

from __future__ import annotations

from dataclasses import dataclass

from coar.plan import duration, size


@dataclass(frozen=True)
class GateStatus:
    """How far passes are.

    Attributes:
        passes: that every example has had.
        num_passes: asked for so far.
        examples: how many.
        files: finished work items.
        num_files: all of them.
        seconds_left: with one worker, for what was asked for so far.
        bytes: on disk.
        adaptive: whether `run` may ask for more passes, to meet a target.
    """

    directory: str
    passes: int
    num_passes: int
    examples: int
    files: int
    num_files: int
    seconds_left: float
    bytes: int
    adaptive: bool

    @property
    def complete(self) -> bool:
        """Whether all that was asked for so far is there."""
        return self.files == self.num_files

    def summary(self) -> str:
        """A line for people."""
        left = "complete" if self.complete else f"about {duration(self.seconds_left)} left with one worker"
        more = "; more where the target is not met" if self.adaptive else ""
        return (
            f"{self.directory}: {self.passes:,} of {self.num_passes:,} passes{more}, "
            f"{self.examples:,} examples, {self.files} of {self.num_files} files, {size(self.bytes)}; {left}"
        )
