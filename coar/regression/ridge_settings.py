"""Settings of ridge regression; `coar.regression.ridge` says what it minimises."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from coar.settings import Setting

DEFAULT_PENALTIES = tuple(float(f"{x:.4g}") for x in np.geomspace(1e-4, 1e2, 20))
Penalty = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Algorithm = Literal["auto", "eigen", "cholesky", "dual", "conjugate_gradient"]


class RidgeSettings(Setting):
    """What `Ridge` is asked to do."""

    name: Literal["ridge"] = "ridge"
    penalties: Annotated[
        Penalty | Annotated[tuple[Penalty, ...], Field(min_length=1, strict=False)],
        Field(description="a number >= 0, or a list of them"),
    ] = DEFAULT_PENALTIES
    choose: Literal["gcv", "loo"] = "gcv"
    errors: bool = True
    algorithm: Algorithm = "auto"
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_iterations: Annotated[int, Field(ge=1)] = 1_000
    held_out: Annotated[int, Field(ge=2)] = 10

    @model_validator(mode="after")
    def _loo_needs_directions(self) -> RidgeSettings:
        if self.choose == "loo" and self.algorithm not in ("auto", "eigen"):
            raise ValueError(f"'loo' needs algorithm 'eigen' or 'auto', not {self.algorithm!r}")
        return self

    @property
    def grid(self) -> tuple[float, ...]:
        """The candidates."""
        return self.penalties if isinstance(self.penalties, tuple) else (self.penalties,)
