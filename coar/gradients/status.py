"""GateStatus: how far a study of gate gradients is."""

from __future__ import annotations

from dataclasses import dataclass

from coar.gradients.schedule import Schedule
from coar.gradients.weights import Progress
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
        adaptive: whether `run` may ask for more passes, to meet a target; it judges that, not the count of
            files.
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
        return f"{self._counts()}; {self._left()}"

    def _counts(self) -> str:
        return (
            f"{self.directory}: {self.passes:,} of {self.num_passes:,} passes, "
            f"{self.examples:,} examples, {self.files} of {self.num_files} files, {size(self.bytes)}"
        )

    def _left(self) -> str:
        if self.complete:
            more = "done so far; `coar run` goes on if the target is not met (run() in Python)"
            return more if self.adaptive else "complete"
        left = f"about {duration(self.seconds_left)} left with one worker"
        return left + ("; more where the target is not met" if self.adaptive else "")

    def after_run(self, found: Progress, schedule: Schedule) -> str:
        """The same after `run`, which has judged the target.

        Args:
            found: how good weights are.
            schedule: what was asked for.
        """
        said = []
        wanted = ("correlation", schedule.correlation), ("error", schedule.error)
        for name, target in wanted:
            if target is not None:
                value = getattr(found, name)
                reached = value >= target if name == "correlation" else value <= target
                verb = "reached" if reached else "not reached"
                said.append(f"target {name} {target:.3g} {verb}: {value:.3g} after {self.passes:,} passes")
        said = said or [f"complete, with an estimated correlation of {found.correlation:.3g}"]
        return f"{self._counts()}; {', '.join(said)}"
