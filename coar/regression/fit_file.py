"""Fit settings as a file, format 1: YAML or JSON, validated strictly, unknown keys refused.

    format: 1
    solver: {name: lasso, num_penalties: 50, smallest: 1e-3}    # or ridge, fast_l1, auto; default auto
    output: margin                                              # which output; default the only one
    columns: [0, 1000]                                          # or "0:1000"; [1000, null]: to the end
    memory: 8 GiB                                               # to plan with; default half of the machine's
    save_as: lasso                                              # name in the study; default none

The regression file of the published code is read, too (`coar.regression.fit_file_original`): one warning
says what each of its keys became, or why it has no meaning here; `notes` keeps that for the provenance.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from coar.errors import CoarWarning, SpecError
from coar.files import PARTIAL, require_format, safe_name
from coar.regression.fast_l1 import FastL1
from coar.regression.fit_file_original import (
    is_original,
    require_known,
    summary,
    translate,
    without_columns,
    without_solver,
)
from coar.regression.fit_file_text import read_text, write_text
from coar.regression.fitting import DEFAULT_SOLVER
from coar.regression.lasso import Lasso
from coar.regression.memory import memory_bytes
from coar.regression.ridge import Ridge
from coar.settings import Setting, explain, nearest

FORMAT = 1
_Start = Annotated[int, Field(ge=0)]
_COLUMNS = '[START, STOP] or "START:STOP", positions, STOP not included'


class Auto(Setting):
    """The default solver."""

    name: Literal["auto"] = "auto"


SOLVERS: dict[str, type[Setting]] = {"auto": Auto, "ridge": Ridge, "lasso": Lasso, "fast_l1": FastL1}


class FitSettings(Setting):
    """What `coar.fit` is asked to do; see the module's text for an example.

    Args:
        solver: `Ridge`, `Lasso`, `FastL1` or `Auto`.
        output: which output; needed where there are several.
        columns: first column, and the one after the last (None: to the end); None for all.
        memory: bytes, or text such as "8 GiB", to plan with; None for half of the machine's.
        save_as: name of the attributions in the study; None: they are not saved.
        notes: what became of the keys of the original's file.

    >>> FitSettings(solver=Ridge(penalties=0.5), columns=(10, None)).column_positions(13)
    range(10, 13)
    """

    format: Literal[1] = 1
    solver: Annotated[
        Auto | Ridge | Lasso | FastL1,
        Field(discriminator="name", description=f"such as coar.Ridge(), or one of: {', '.join(SOLVERS)}"),
    ] = Auto()
    output: str | None = None
    columns: Annotated[
        Annotated[tuple[_Start, _Start | None], Field(strict=False)] | None, Field(description=_COLUMNS)
    ] = None
    memory: Annotated[int | str | None, Field(description='bytes, or text such as "8 GiB"')] = None
    save_as: str | None = None
    notes: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("solver", mode="before")
    @classmethod
    def _by_name(cls, solver: object) -> object:
        if not isinstance(solver, str):
            return solver
        if solver not in SOLVERS:
            raise ValueError(f"one of: {', '.join(SOLVERS)}{nearest(solver, SOLVERS)}")
        return SOLVERS[solver]()

    @field_validator("columns", mode="before")
    @classmethod
    def _from_text(cls, columns: object) -> object:
        if not isinstance(columns, str):
            return columns
        found = re.fullmatch(r"([0-9]{0,12}):([0-9]{0,12})", columns)
        if not found:
            raise ValueError(f"{_COLUMNS}, such as 0:1000")
        return int(found[1] or 0), int(found[2]) if found[2] else None

    @field_validator("columns")
    @classmethod
    def _some_columns(cls, columns: tuple[int, int | None] | None) -> tuple[int, int | None] | None:
        if columns is not None and columns[1] is not None and columns[1] <= columns[0]:
            raise ValueError(f"{_COLUMNS}, START < STOP")
        return columns

    @field_validator("memory")
    @classmethod
    def _an_amount(cls, memory: int | str | None) -> int | str | None:
        memory_bytes(memory)
        return memory

    @field_validator("save_as")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return name if name is None else safe_name(name, "a name of attributions")

    @property
    def name(self) -> str:
        """Name of the attributions: `save_as`, or that of the solver."""
        solver = DEFAULT_SOLVER if isinstance(self.solver, Auto) else self.solver
        return self.save_as or solver.name

    def changed(self, asked: Mapping[str, Any], where: str = "the settings") -> FitSettings:
        """These settings, but for what is given; None and "" stand for nothing.

        A solver's name takes the solver of these settings if it is that one, else its defaults, with a
        warning that names `where` these settings are from.

        >>> FitSettings(solver=Ridge(penalties=0.5)).changed({"solver": "ridge", "output": ""}).solver.grid
        (0.5,)
        """
        given = {key: value for key, value in asked.items() if value not in (None, "")}
        values = self.to_json() | given
        notes = without_columns(self.notes) if "columns" in given else self.notes
        if given.get("solver") == self.solver.name:
            values["solver"] = self.solver.model_dump(mode="json")
        elif "solver" in given and not isinstance(self.solver, Auto):
            notes = without_solver(notes)
            self._warn_replaced(str(given["solver"]), where)
        return self.from_json(values | {"notes": list(notes)}, "arguments")

    def _warn_replaced(self, name: str, where: str) -> None:
        given = self.solver.model_fields_set - {"name"}
        lost = [key for key in type(self.solver).model_fields if key in given]
        verb = "is" if len(lost) == 1 and not lost[0].endswith("s") else "are"
        unused = f": its {', '.join(lost)} {verb} not used" if lost else ""
        text = f"--solver {name} replaces solver {self.solver.name} of {where}{unused}"
        warnings.warn(text, CoarWarning, stacklevel=3)

    def solver_setting(self) -> Ridge | Lasso | FastL1 | str:
        """The `solver` argument of `coar.fit`: a solver, or "auto"."""
        return "auto" if isinstance(self.solver, Auto) else self.solver

    def column_positions(self, num_columns: int, where: str = "fit settings") -> range | None:
        """The `columns` argument of `coar.fit`; None for all; `where` names the file in errors.

        Raises:
            SpecError: the output has fewer columns.
        """
        if self.columns is None:
            return None
        start, stop = self.columns[0], num_columns if self.columns[1] is None else self.columns[1]
        if not start < stop <= num_columns:
            raise SpecError(
                f"{where}: no such columns{self._source('data.target_')}",
                expected=f"columns: [START, STOP] with 0 <= START < STOP <= {num_columns}, STOP not included",
                got=list(self.columns),
                todo="correct columns, or leave them out for all",
            )
        return range(start, stop)

    def _source(self, start: str) -> str:
        """The original's keys that a setting was read from, in brackets."""
        keys = [note.split(": ")[0] for note in self.notes if note.startswith(start)]
        return f" ({', '.join(keys)})" if keys else ""

    def require_held_out(self, num_rows: int, where: str = "fit settings") -> None:
        """Refuse to choose a penalty on held-out rows where there would be none.

        Raises:
            SpecError: every how manyth row is held out is a larger number than that of the rows.
        """
        solver = self.solver
        chooses = isinstance(solver, Lasso) and (solver.penalties is None or len(solver.penalties) > 1)
        chooses |= isinstance(solver, FastL1) and solver.num_penalties > 0
        if isinstance(solver, Lasso | FastL1) and chooses and solver.held_out > num_rows:
            raise SpecError(
                f"{where}: no row would be held out{self._source('data.num_')}",
                expected=f"held_out: every how manyth row chooses the penalty, 2 to {num_rows:,} (the rows)",
                got=f"held_out {solver.held_out:,}",
                todo="hold out more: held_out: 10 is usual",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form; `from_json` undoes it."""
        value = self.model_dump(mode="json")
        return {k: v for k, v in value.items() if v is not None and (k, v) != ("notes", [])}

    @classmethod
    def from_json(cls, value: Any, where: str = "fit settings") -> FitSettings:
        """Validate a value in our format; `where` names the file in errors.

        Raises:
            SpecError: unknown keys (the nearest known one is suggested), a newer format, values that are
                not allowed; each is named.
        """
        if not isinstance(value, dict):
            raise SpecError(
                f"{where} holds no settings", expected="keys and values", got=type(value).__name__
            )
        _require_format(value.get("format"), where)
        require_known(value, cls.model_fields, where)
        value = value | {"solver": _solver(value.get("solver", "auto"), where)}
        try:
            return cls.model_validate_json(json.dumps(value))
        except ValidationError as error:
            found = explain(error, where, cls)
            raise SpecError(found.what, expected=found.expected, got=found.got, todo=found.todo) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise SpecError(f"{where} is not readable", got=str(error)[:200]) from None

    @classmethod
    def from_original(cls, value: dict[str, Any], where: str = "file", fast_l1: bool = False) -> FitSettings:
        """Read the regression file of the published code, and say in a warning what it becomes.

        `notes` then say it of each key.

        Args:
            value: its contents.
            where: names the file in errors.
            fast_l1: ask for the original solver instead of ours.
        """
        settings, notes = translate(value, where, fast_l1)
        text = f"{where} (regression file of the published code) {summary(settings, notes)}"
        warnings.warn(text, CoarWarning, stacklevel=3)
        return cls.from_json(settings | {"notes": notes}, where)

    def save(self, path: str | Path) -> None:
        """Write to a .yaml or .json file; one that is there is replaced."""
        write_text(self.to_json(), Path(path))


def load(path: str | Path, fast_l1: bool = False) -> FitSettings:
    """Read fit settings from a .yaml or .json file, ours or the original's (then named after the file).

    Args:
        path: of the file.
        fast_l1: read the original's file as settings of the original solver.

    Raises:
        SpecError: the file cannot be read, or something in it is not accepted; file and key are named.
    """
    value = read_text(Path(path))
    if is_original(value):
        found = FitSettings.from_original(value, str(path), fast_l1)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).lstrip("._-")[:100]
        return found.model_copy(update={"save_as": name.replace(PARTIAL, "-") or None})
    return FitSettings.from_json(value, str(path))


def _require_format(found: Any, where: str) -> None:
    if not isinstance(found, int) or isinstance(found, bool):
        got = "nothing" if found is None else f"{found!r:.80}"
        raise SpecError(f"{where} has no format", expected=f"format: {FORMAT}", got=got)
    require_format(found, FORMAT, where, SpecError)


def _solver(value: Any, where: str) -> dict[str, Any]:
    """The solver's part, its name known and its keys, too."""
    value = {"name": value} if isinstance(value, str) else value
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in SOLVERS:
        raise SpecError(
            f"{where}: solver{nearest(name, SOLVERS) if name else ''}",
            expected=f"a name, one of: {', '.join(SOLVERS)}",
            got=f"{value if name is None else name!r:.80}",
        )
    require_known(value, SOLVERS[name].model_fields, f"{where}: solver")
    return value
