"""Settings of the LASSO; `coar.regression.lasso` says what it minimises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from coar.settings import Setting

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]


class LassoSettings(Setting):
    """What `Lasso` is asked to do."""

    name: Literal["lasso"] = "lasso"
    penalties: Annotated[
        Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] | None,
        Field(description="positive numbers"),
    ] = None
    num_penalties: Annotated[int, Field(ge=2, le=10_000)] = 50
    smallest: Share = 1e-3
    l1_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    held_out: Annotated[int, Field(ge=2)] = 10
    patience: Annotated[int, Field(ge=1)] | None = 2
    tolerance: Share = 1e-3
    refit_tolerance: Share = 1e-5
    max_sweeps: Annotated[int, Field(ge=1)] = 1_000
    algorithm: Literal["auto", "coordinate_descent", "fista"] = "auto"

    @field_validator("penalties", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("penalties")
    @classmethod
    def _from_the_largest(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if value is None else tuple(sorted(set(value), reverse=True))
