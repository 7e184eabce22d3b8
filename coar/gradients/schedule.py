"""Schedule: how many rounds of passes, and when weights are good enough."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any, Literal

from coar.errors import CoarWarning, SettingError
from coar.gradients.draws import GateDraws
from coar.gradients.layout import FEWEST_REPLICATES, REPLICATES
from coar.gradients.weights import Progress
from coar.settings import whole_number

ENOUGH = 0.95  # correlation with the predictions of exact weights at which passes="auto" stops
MOST_PASSES = 400  # of passes="auto"
FEW_PASSES = 40  # fewer surprise nobody, however few were asked for

Passes = int | Literal["auto"]


class Schedule:
    """Rounds per replicate: a number, or doubled until a target is met.

    Args:
        draws: of the gates; a round is so many passes, for each of four replicates.
        passes: how many, rounded up to whole rounds; with a target, at most so many; "auto" is a target
            correlation of 0.95 where none is given, and at most 400.
        target_correlation: stop where `Progress.correlation` is as large.
        target_error: stop where `Progress.error` is as small.
        replicates: of a study that has some already; None = four with a target, else `replicates_for`.

    >>> schedule = Schedule(GateDraws(0.05, seed=0, num_components=8), passes=100)
    >>> schedule.first, schedule.passes(schedule.first)
    (3, 120)
    """

    def __init__(
        self,
        draws: GateDraws,
        passes: Passes = "auto",
        target_correlation: float | None = None,
        target_error: float | None = None,
        replicates: int | None = None,
    ) -> None:
        if isinstance(passes, str) and passes != "auto":
            raise SettingError("passes", expected='a whole number above 0, or "auto"', got=repr(passes))
        _require(target_correlation, "target_correlation", 1.0, "0.95 is usual; passes=N takes so many")
        _require(target_error, "target_error", float("inf"), "in output units: what an effect may be off by")
        most = MOST_PASSES if passes == "auto" else whole_number(passes, "passes")
        if passes == "auto" and target_correlation is None and target_error is None:
            target_correlation = ENOUGH
        self.correlation, self.error = target_correlation, target_error
        few = REPLICATES if self.adaptive else replicates_for(-(-most // draws.passes_per_round))
        self.replicates = replicates or few
        self.per_round = self.replicates * draws.passes_per_round
        self.most = -(-most // self.per_round)
        if replicates is None:  # who goes on with a study was told when it was made
            self._warn_of_large_rounds(most, draws)

    @property
    def adaptive(self) -> bool:
        """Whether anything but the number of passes counts."""
        return self.correlation is not None or self.error is not None

    @property
    def first(self) -> int:
        """Rounds to begin with."""
        return 1 if self.adaptive else self.most

    def passes(self, rounds: int) -> int:
        """Passes of so many rounds."""
        return rounds * self.per_round

    def met(self, found: Progress) -> bool:
        """Whether weights are as good as was asked for."""
        good = self.correlation is None or found.correlation >= self.correlation
        return self.adaptive and good and (self.error is None or found.error <= self.error)

    def next(self, rounds: int, found: Progress) -> int | None:
        """Rounds to go on to; None to stop."""
        if not self.adaptive or rounds >= self.most or self.met(found):
            return None
        return min(2 * rounds, self.most)

    def _warn_of_large_rounds(self, asked: int, draws: GateDraws) -> None:
        """Warn where the least that there can be is far more than was asked for."""
        spent = self.most * self.per_round
        if spent > max(3 * asked, FEW_PASSES):
            # Located here, whoever asks: a study makes several schedules, and one warning is shown.
            warnings.warn(
                f"{spent:,} passes will be made, not {asked:,}: at an ablation fraction of "
                f"{draws.ablation_fraction:g} a round takes {draws.passes_per_round:,} passes, and there are "
                f"{self.replicates} replicates. A larger ablation_fraction takes fewer",
                CoarWarning,
                stacklevel=1,
            )

    def warn_missed(self, rounds: int, found: Progress) -> None:
        """Warn if passes ended before the target."""
        if self.adaptive and not self.met(found):
            wanted = [f"correlation {self.correlation}"] if self.correlation is not None else []
            wanted += [f"error {self.error:g}"] if self.error is not None else []
            warnings.warn(
                f"{self.passes(rounds)} passes have not reached the target ({', '.join(wanted)}): {found}. "
                f"More passes: passes={2 * self.passes(rounds)}",
                CoarWarning,
                stacklevel=4,
            )


def replicates_for(rounds: int) -> int:
    """Four; three or two where few rounds are asked for and fewer would then be run than with four.

    >>> [replicates_for(rounds) for rounds in range(1, 10)]
    [2, 2, 3, 4, 3, 3, 4, 4, 4]
    """
    if rounds <= FEWEST_REPLICATES or rounds >= 2 * REPLICATES:
        return FEWEST_REPLICATES if rounds <= FEWEST_REPLICATES else REPLICATES
    return min((REPLICATES, 3), key=lambda count: -(-rounds // count) * count)


def _require(value: Any, name: str, below: float, todo: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is None or (number and 0 < value < below):
        return
    raise SettingError(
        f"{name} out of range", expected=f"a number above 0 and below {below:g}", got=repr(value), todo=todo
    )
