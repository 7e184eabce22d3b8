"""Designs: how the masks of a study are drawn. Row i depends on (seed, stream, i) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from coar.errors import SettingError
from coar.randomness import half_words, words
from coar.settings import Setting

Fraction = Annotated[float, Field(gt=0, lt=1, description="ablation fraction, above 0 and below 1")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Stream = Annotated[str, Field(min_length=1, max_length=64)]

FIT = "fit"  # stream of rows that attributions are fitted on
EVALUATION = "evaluation"  # stream of held-out rows


class Bernoulli(Setting):
    """Each component is ablated independently with probability `ablation_fraction`.

    >>> Bernoulli(ablation_fraction=0.25, seed=1).masks([5], 8).shape
    (1, 8)
    """

    name: Literal["bernoulli"] = "bernoulli"
    ablation_fraction: Fraction
    seed: Seed = 0
    stream: Stream = FIT

    def masks(self, rows: Sequence[int] | np.ndarray, num_components: int) -> np.ndarray:
        """Keep masks, bool [rows, components], True = kept."""
        threshold = np.uint64(round(self.ablation_fraction * 2**32))
        masks = np.empty((len(rows), num_components), dtype=bool)
        for position, row in enumerate(rows):
            masks[position] = half_words(self.seed, self.stream, int(row), num_components) >= threshold
        return masks

    def check(self, num_components: int, num_rows: int) -> None:
        """Any number of rows can be drawn."""


class FixedSize(Setting):
    """Exactly `round(ablation_fraction * components)` components are ablated, all sets equally likely."""

    name: Literal["fixed_size"] = "fixed_size"
    ablation_fraction: Fraction
    seed: Seed = 0
    stream: Stream = FIT

    def masks(self, rows: Sequence[int] | np.ndarray, num_components: int) -> np.ndarray:
        """Keep masks, bool [rows, components], True = kept."""
        size = self._size(num_components)
        masks = np.ones((len(rows), num_components), dtype=bool)
        for position, row in enumerate(rows):
            draws = words(self.seed, self.stream, int(row), num_components)
            masks[position, np.argsort(draws, kind="stable")[:size]] = False
        return masks

    def check(self, num_components: int, num_rows: int) -> None:  # noqa: ARG002 - all designs' signature
        """Refuse a size that rounds to no component, or to all of them."""
        if not 0 < self._size(num_components) < num_components:
            raise SettingError(
                "a fixed-size design must ablate some components and keep some",
                expected=f"a fraction that rounds to 1..{num_components - 1} of {num_components} components",
                got=self.ablation_fraction,
            )

    def _size(self, num_components: int) -> int:
        return round(self.ablation_fraction * num_components)


class LeaveOneOut(Setting):
    """Row i ablates component i alone."""

    name: Literal["leave_one_out"] = "leave_one_out"

    def masks(self, rows: Sequence[int] | np.ndarray, num_components: int) -> np.ndarray:
        """Keep masks, bool [rows, components], True = kept."""
        return np.arange(num_components)[None, :] != np.asarray(rows)[:, None]

    def check(self, num_components: int, num_rows: int) -> None:
        """There is one row per component."""
        if num_rows > num_components:
            raise SettingError(
                "a leave-one-out study has one row per component",
                expected=f"at most {num_components} rows",
                got=num_rows,
            )


class ImportedMasks(Setting):
    """The masks came with their rows from elsewhere (`coar.interop`): none can be drawn."""

    name: Literal["imported"] = "imported"
    num_rows: Annotated[int, Field(ge=1)]

    def masks(self, rows: Sequence[int] | np.ndarray, num_components: int) -> np.ndarray:  # noqa: ARG002
        """Refused: how the masks were drawn is not known."""
        raise SettingError(
            "the masks of an imported study cannot be drawn again",
            todo="a shard that is lost: import again; more rows: a new study, with a design of its own",
        )

    def check(self, num_components: int, num_rows: int) -> None:  # noqa: ARG002 - all designs' signature
        """There are the rows that were imported, and no others."""
        if num_rows != self.num_rows:
            raise SettingError(
                "an imported study has the rows that were imported, and can get no others",
                expected=f"{self.num_rows} rows",
                got=num_rows,
                todo="import again when there are more, or make a new study with a design of its own",
            )


Design = Bernoulli | FixedSize | LeaveOneOut | ImportedMasks
