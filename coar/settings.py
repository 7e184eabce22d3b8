"""Setting: base of everything that is configured once, validated, saved and compared."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from coar.errors import SettingError


class Setting(BaseModel):
    """A frozen, strictly validated value that reads and writes JSON; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self).__name__) from None

    # As pydantic marks its own: settings inside settings are then validated by the outer one, and
    # one flat list of findings comes out instead of errors within errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def explain(error: ValidationError, what: str) -> SettingError:
    """Turn pydantic's findings into one named error that lists each of them."""
    findings = [_finding(item) for item in error.errors(include_url=False)]
    return SettingError(
        f"{what}: {len(findings)} setting{'s' if len(findings) > 1 else ''} not accepted",
        expected="; ".join(expected for expected, _ in findings),
        got="; ".join(got for _, got in findings),
        todo="correct the settings named",
    )


def _finding(item: Any) -> tuple[str, str]:
    key = ".".join(str(part) for part in item["loc"]) or "value"
    if item["type"] == "extra_forbidden":
        return f"no key {key!r}", f"{key!r}"
    if item["type"] == "missing":
        return f"a key {key!r}", "nothing"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be ", "").replace("\n ", ";")
    return f"{key}: {message}", f"{item['input']!r:.80}"


def whole_number(value: Any, what: str, least: int = 1, most: int = 2**40) -> int:
    """Return an int (NumPy's count) within bounds; floats, booleans and strings are refused."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool | np.bool_) or not least <= number <= most:
        raise SettingError(
            f"{what} must be a whole number", expected=f"{least} <= {what} <= {most}", got=repr(value)
        )
    return number
