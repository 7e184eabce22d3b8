"""Setting: base of everything that is configured once, validated, saved and compared."""

from __future__ import annotations

import difflib
import operator
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from coar.errors import CoarError, SettingError

# What other libraries call the settings of ours.
ALIASES = {
    "alpha": "penalties",
    "alphas": "penalties",
    "penalty": "penalties",
    "cv": "held_out",
    "n_alphas": "num_penalties",
    "eps": "smallest",
    "tol": "tolerance",
    "max_iter": "max_sweeps",
}


class Setting(BaseModel):
    """A frozen, strictly validated value that reads and writes JSON; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        if unnamed:
            raise _unnamed(type(self), unnamed)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, type(self).__name__, type(self)) from None

    # As pydantic marks its own: settings inside settings are then validated by the outer one, and
    # one flat list of findings comes out instead of errors within errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # type checkers then know that these are frozen

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except (ValidationError, ValueError):
                kind = type(self).__name__
                raise SettingError(
                    f"{kind} is frozen: {name!r} cannot be set",
                    got=f"{value!r:.80}",
                    todo=f"make another one: {kind}({name}=...)",
                ) from None


def explain(error: ValidationError, what: str, model: type[Setting] | None = None) -> SettingError:
    """Turn pydantic's findings into one named error that lists each setting once.

    Args:
        error: what pydantic found.
        what: was validated.
        model: its class: the findings of all branches of a union are then one, the field's description
            says what is accepted, and unknown keys suggest known ones.
    """
    groups: dict[str, _Finding] = {}
    for item in error.errors(include_url=False):
        found = _place(model, item)
        groups.setdefault(found.key, found).items.append(item)
    findings = [found.said() for found in groups.values()]
    todos = dict.fromkeys(todo for _, _, todo in findings if todo)
    return SettingError(
        f"{what}: {len(findings)} setting{'s' if len(findings) > 1 else ''} not accepted",
        expected="; ".join(expected for expected, _, _ in findings),
        got="; ".join(got for _, got, _ in findings),
        todo="; ".join(todos) or "correct the settings named",
    )


def nearest(key: object, known: Iterable[str]) -> str:
    """What an unknown key may have meant, as the end of a sentence.

    >>> nearest("penalites", ["penalties", "errors"]), nearest("cv", ["penalties", "held_out"])
    ("; did you mean 'penalties'?", "; did you mean 'held_out'?")
    """
    known = list(known)
    meant = ALIASES.get(str(key))
    close = [meant] if meant in known else difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass
class _Finding:
    """What pydantic says about one key; of a union, each branch says something."""

    key: str
    info: FieldInfo | None = None
    known: tuple[str, ...] = ()
    items: list[Any] = field(default_factory=list)

    def said(self) -> tuple[str, str, str | None]:
        """What was expected, what was got, and what to do."""
        item = min(self.items, key=lambda item: len(item["loc"]))  # of the value itself, not of a part
        if item["type"] == "extra_forbidden":
            hint = nearest(item["loc"][-1], self.known).removeprefix("; ")
            return f"no key {self.key!r}" + (f" ({hint})" if hint else ""), f"{self.key!r}", None
        if item["type"] == "missing":
            return f"a key {self.key!r}", "nothing", None
        got, todo = f"{item['input']!r:.80}", None
        own = [item["ctx"]["error"] for item in self.items if item["type"] == "value_error"]
        if own and isinstance(own[0], CoarError):  # an error within an error
            said, todo = str(own[0].expected or own[0].what), own[0].todo
            got = got if own[0].got is None else str(own[0].got)
        elif own:
            said = str(own[0])
        elif self.info and self.info.description and _is_union(self.info.annotation):
            said = self.info.description
        else:
            said = ", or ".join(dict.fromkeys(_message(item) for item in self.items))
        return (f"{self.key}: {said}" if self.key else said), got, todo


def _message(item: Any) -> str:
    found: str = item["msg"].replace("Input should be ", "").replace("\n ", ";")
    return found


def _place(model: type[Setting] | None, item: Any) -> _Finding:
    """The key that a finding is about: its path without the names of a union's branches."""
    if model is None:
        return _Finding(".".join(map(str, item["loc"])))
    keys: list[str] = []
    found: FieldInfo | None = None
    here = [model]
    path = item["loc"][:-1] if item["type"] in ("extra_forbidden", "missing") else item["loc"]
    for part in path:
        owner = next((kind for kind in here if part in kind.model_fields), None)
        tagged = [kind for kind in here if part in (_tag(kind), kind.__name__)]
        if owner:
            keys.append(str(part))
            found = owner.model_fields[str(part)]
            here = list(_settings_in(found.annotation))
        elif tagged:
            here = tagged
        elif here or not (found and _is_union(found.annotation)):
            keys.append(str(part))  # a key of a dictionary, a position in a list
    if len(path) < len(item["loc"]):
        keys.append(str(item["loc"][-1]))
        return _Finding(".".join(keys), None, tuple(here[0].model_fields) if here else ())
    return _Finding(".".join(keys), found)


def _tag(kind: type[Setting]) -> object:
    """What tells a setting from the others of a union."""
    return kind.model_fields["name"].default if "name" in kind.model_fields else None


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _settings_in(annotation: Any) -> Iterator[type[Setting]]:
    if isinstance(annotation, type) and issubclass(annotation, Setting):
        yield annotation
    for inner in get_args(annotation):
        yield from _settings_in(inner)


def _unnamed(kind: type[Setting], values: tuple[Any, ...]) -> SettingError:
    key = next((name for name in kind.model_fields if name not in ("name", "format")), "name")
    return SettingError(
        f"{kind.__name__}: settings are given by name",
        got=f"{values[0]!r:.80} without a name",
        todo=f"name the setting: {kind.__name__}({key}={values[0]!r:.80})",
    )


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
