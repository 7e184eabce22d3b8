"""The regression file of the published code, read as settings of ours.

    data:            num_train, num_val, target_start_ind, target_end_ind; seed, data_path
    cfg:             k, eps, manual_max_lambda, lr, batch_size; out_dir, num_workers, use_bias, true_random
    early_stopping:  check_every, eps

(github.com/MadryLab/modelcomponents, coar/estimate/*/regression_config.yaml.) Keys that say *what* is to be
solved are kept; those that say how its solver gets there have no meaning for exact ones, and are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coar.errors import SpecError
from coar.settings import nearest

KEYS: dict[str, dict[str, type]] = {
    "data": {
        "data_path": str,
        "num_train": int,
        "num_val": int,
        "seed": int,
        "target_start_ind": int,
        "target_end_ind": int,
    },
    "cfg": {
        "k": int,
        "lr": float,
        "eps": float,
        "batch_size": int,
        "out_dir": str,
        "num_workers": int,
        "use_bias": int,
        "manual_max_lambda": float,
        "true_random": bool,
    },
    "early_stopping": {"check_every": int, "eps": float},
}
IGNORED = {
    "data.data_path": "rows are those of the study",
    "data.seed": "read by nobody, in the original either: it holds out the last rows",
    "cfg.lr": "a step size; these solvers stop at the exact solution",
    "cfg.batch_size": "sums over rows do not depend on batches",
    "cfg.out_dir": "attributions are saved in the study, named after this file; save_as is another name",
    "cfg.num_workers": "rows are read by this process",
    "cfg.use_bias": "the intercept is always fitted; weights are the same without",
    "cfg.true_random": "read by nobody, in the original either",
    "early_stopping.check_every": "nothing is stopped early",
    "early_stopping.eps": "nothing is stopped early: fits end where the optimality conditions hold",
}
# Those that mean something if the original solver is to be run.
_TO_FAST_L1 = {
    "cfg.lr": "learning_rate",
    "cfg.batch_size": "batch_size",
    "early_stopping.check_every": "check_every",
    "early_stopping.eps": "threshold",
}
# Keys whose notes are about the solver that the file asks for.
_ABOUT_SOLVER = (
    *("data.num_train: ", "data.num_val: ", "cfg.k: ", "cfg.eps: ", "cfg.lr: ", "cfg.batch_size: "),
    *("cfg.manual_max_lambda: ", "cfg.use_bias: ", "early_stopping."),
)


def is_original(value: Any) -> bool:
    """Whether a value looks like the original's file rather than ours."""
    return isinstance(value, dict) and "format" not in value and bool(set(value) & set(KEYS))


def translate(value: dict[str, Any], where: str, fast_l1: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Settings in our format, and a line for each key: what it became, or why it is ignored.

    Args:
        value: contents of the file.
        where: names the file in errors.
        fast_l1: settings for the original solver, instead of ours.

    Raises:
        SpecError: unknown keys, wrong types, values that contradict each other; file and key are named.

    >>> file = {"data": {"num_train": 900, "num_val": 100}, "cfg": {"k": 50, "eps": 1e-3, "lr": 0.1}}
    >>> settings, notes = translate(file, "file.yaml")
    >>> settings["solver"]
    {'name': 'lasso', 'num_penalties': 50, 'smallest': 0.001, 'held_out': 10}
    >>> notes[-1]
    'cfg.lr: ignored: a step size; these solvers stop at the exact solution'
    """
    return _Translation(_flat(value, where), where, fast_l1).run()


def without_solver(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes that stay true with another solver.

    >>> without_solver(["cfg.k: read as num_penalties", "data.seed: read by nobody"])
    ('data.seed: read by nobody',)
    """
    return tuple(note for note in notes if not note.startswith(_ABOUT_SOLVER))


def without_columns(notes: Iterable[str]) -> tuple[str, ...]:
    """Notes that stay true with other columns."""
    return tuple(note for note in notes if not note.startswith("data.target_"))


def summary(settings: dict[str, Any], notes: Iterable[str]) -> str:
    """What a file became, in one line, and which of its keys are ignored, in another.

    >>> settings = {"solver": {"name": "ridge", "penalties": 0.0}, "columns": [0, 40]}
    >>> print(summary(settings, ["cfg.k: read as least squares", "cfg.lr: ignored: a step size"]))
    = ridge, penalties 0.0, columns 0 to 40
    ignored: cfg.lr (reasons in the provenance)
    """
    solver = settings["solver"]
    given = [f"{key} {value}" for key, value in solver.items() if key != "name"]
    start, stop = settings.get("columns") or (0, None)
    columns = f"columns {start} to {'the last' if stop is None else stop}" if start or stop else "all columns"
    ignored = [note.split(": ")[0] for note in notes if ": ignored: " in note]
    lines = ["= " + ", ".join([solver["name"], *given, columns])]
    return "\n".join(lines + [f"ignored: {', '.join(ignored)} (reasons in the provenance)"] * bool(ignored))


def require_known(keys: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse unknown keys, with the nearest known one.

    Raises:
        SpecError: it names the file and the key.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            hint = nearest(key, known)
            raise SpecError(
                f"{where}: unknown key {key!r}{hint}",
                expected=f"one of: {', '.join(known)}",
                got=repr(key),
                todo="correct or remove it",
            )


def _flat(value: dict[str, Any], where: str) -> dict[str, Any]:
    """{"cfg.k": 1, ...}, of the right types; keys without a value are left out."""
    require_known(value, KEYS, where)
    found = {}
    for section, entries in value.items():
        if entries is None:
            continue
        if not isinstance(entries, dict):
            raise SpecError(f"{where}: {section}", expected="a section with keys", got=f"{entries!r:.80}")
        require_known(entries, KEYS[section], f"{where}: {section}")
        for key, entry in entries.items():
            if entry is not None:
                name = f"{section}.{key}"
                found[name] = _typed(entry, KEYS[section][key], f"{where}: {name}")
    return found


def _typed(entry: Any, kind: type, where: str) -> Any:
    """As the original converts what it reads: `"1e-3"` is a number, too."""
    accepted = {int: int | str, float: int | float | str, str: str, bool: bool | str}[kind]
    try:
        if not isinstance(entry, accepted) or (isinstance(entry, bool) and kind is not bool):
            raise TypeError
        return entry if kind is bool else kind(entry)
    except (TypeError, ValueError, OverflowError):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise SpecError(where, expected=names[kind], got=f"{entry!r:.80}", todo="correct it") from None


class _Translation:
    """One file on its way."""

    def __init__(self, found: dict[str, Any], where: str, fast_l1: bool) -> None:
        self._found, self._where, self._fast_l1 = found, where, fast_l1
        self._notes: list[str] = []

    def run(self) -> tuple[dict[str, Any], list[str]]:
        settings = {"format": 1, "solver": self._solver(), "columns": self._columns()}
        for key in self._found:
            if key in IGNORED and not (self._fast_l1 and key in _TO_FAST_L1):
                self._note(key, f"ignored: {IGNORED[key]}")
        return settings, self._notes

    def _note(self, key: str, text: str) -> None:
        if key in self._found:
            self._notes.append(f"{key}: {text}")

    def _need(self, key: str, least: int = 1) -> int:
        if key not in self._found:
            raise SpecError(f"{self._where}: {key} is missing", expected="a whole number", got="nothing")
        if self._found[key] < least:
            raise self._refused(key, f"at least {least}")
        return int(self._found[key])

    def _refused(self, key: str, expected: str) -> SpecError:
        return SpecError(f"{self._where}: {key}", expected=expected, got=self._found[key], todo="correct it")

    def _solver(self) -> dict[str, Any]:
        count, largest = self._need("cfg.k"), self._found.get("cfg.manual_max_lambda", -1)
        if largest != -1 and count > 1:
            raise self._refused("cfg.manual_max_lambda", "-1, or cfg.k: 1 (the original refuses others, too)")
        if not (largest == -1 or 0 <= largest < float("inf")) or (self._fast_l1 and largest > 0):
            others = "" if self._fast_l1 else ", or the penalty of all columns"
            raise self._refused("cfg.manual_max_lambda", f"0 (none), -1 (taken from the data){others}")
        solver = self._path(count) if count > 1 else self._one(largest)
        if self._fast_l1:
            pairs = {ours: self._found[key] for key, ours in _TO_FAST_L1.items() if key in self._found}
            for key, ours in _TO_FAST_L1.items():
                self._note(key, f"read as {ours}")
            return {"name": "fast_l1"} | {k: v for k, v in solver.items() if k != "name"} | pairs
        return solver

    def _one(self, largest: float) -> dict[str, Any]:
        self._note("cfg.eps", "ignored: there is no path of penalties")
        for key in ("data.num_train", "data.num_val"):
            self._note(key, "ignored: there is no penalty to choose; all rows of the study are fitted")
        if largest > 0:
            self._note("cfg.k", "read as one penalty for all columns (the original also tries none)")
            self._note("cfg.manual_max_lambda", "read as that penalty")
            return {"name": "lasso", "penalties": [largest]}
        text = "read as least squares: no penalty, which takes more rows than components"
        if largest != 0:
            text += " (the original also tries its largest penalty, which leaves next to no weights)"
        self._note("cfg.k", text)
        self._note("cfg.manual_max_lambda", "read as no penalty" if largest == 0 else "as by default")
        return {"num_penalties": 0} if self._fast_l1 else {"name": "ridge", "penalties": 0.0}

    def _path(self, count: int) -> dict[str, Any]:
        smallest = self._found.get("cfg.eps", 1e-5)
        if not 0 < smallest < 1:
            raise self._refused("cfg.eps", "0 < eps < 1: smallest penalty relative to the largest")
        self._note("cfg.k", "read as num_penalties")
        self._note("cfg.manual_max_lambda", "as by default")
        self._note("cfg.eps", "read as smallest, relative to the largest penalty")
        train, held_out = self._need("data.num_train"), self._need("data.num_val")
        every = max(2, round((train + held_out) / held_out))
        text = f"read as a share: every row number {every} is held out, of all rows of the study"
        self._note("data.num_train", text)
        self._note("data.num_val", text)
        return {"name": "lasso", "num_penalties": count, "smallest": smallest, "held_out": every}

    def _columns(self) -> list[int | None] | None:
        start, stop = (self._found.get(f"data.target_{end}_ind") for end in ("start", "end"))
        if start is not None and start < 0:
            raise self._refused("data.target_start_ind", "at least 0")
        if stop is not None and stop != -1 and stop <= (start or 0):
            raise self._refused("data.target_end_ind", f"-1, or more than {start or 0}")
        for end in ("start", "end"):
            self._note(f"data.target_{end}_ind", "read as columns")
        if not start and stop in (None, -1):
            return None
        return [start or 0, None if stop in (None, -1) else stop]
