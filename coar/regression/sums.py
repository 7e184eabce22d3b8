"""Sums over ranges of rows, kept in a study: a refit reads only the rows that came since.

    runs/digits/statistics/
      outputs-3f2a…-000000000-000065536-….safetensors   X'Y and sums of a block of columns, rows 0 to 65,536
      masks-91bc…-000000000-000065536-….safetensors     X'X

Each file is written once, whole or absent, with digests. A range that grew is written anew under its
longer name, then the shorter file is deleted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from coar.errors import StoreError
from coar.files import (
    canonical_json,
    digest_array,
    digest_json,
    remove_abandoned,
    require_format,
    sha256,
    write_arrays_once,
)
from coar.regression.doubts import say
from coar.regression.statistics import MaskCounts, MaskStatistics, OutputStatistics

FORMAT = 1
_NAME = re.compile(r"[a-z]+-[0-9a-f]{16}-([0-9]{9,})-([0-9]{9,})-([0-9a-f]{16})\.safetensors")
_LOOKS = 5  # for a file that another process has replaced by a longer one meanwhile
_KINDS: dict[str, type] = {"masks": MaskStatistics, "counts": MaskCounts, "outputs": OutputStatistics}


class KeptSums:
    """The sums kept in one study.

    Args:
        folder: where.
        study_digest: of the study; sums of another are refused.
        mark: digest of what the rows from one number to another are made from; sums made from other
            shards (some were computed again, or had failed) are not used.
        limit: bytes; sums of a range that take more are not kept.
    """

    def __init__(self, folder: Path, study_digest: str, mark: Callable[[int, int], str], limit: int) -> None:
        self.folder, self.study_digest, self.limit = folder, study_digest, limit
        self._mark = mark
        if folder.is_dir():
            with contextlib.suppress(OSError):
                remove_abandoned(folder)

    def _prefix(self, key: str) -> str:
        return f"{key.split()[0].rstrip(',')}-{sha256(key.encode())[:16]}"

    def _from(self, key: str, start: int) -> list[tuple[int, str, Path]]:
        """(end, mark, file) of what is kept of a key from a row on, the longest first."""
        found = []
        for path in self.folder.glob(f"{self._prefix(key)}-{start:09d}-*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                found.append((int(match[2]), match[3], path))
        return sorted(found, reverse=True)

    def load(self, key: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(first row, end, {part: statistics}) of ranges that follow each other from row 0.

        Raises:
            StoreError: a file is damaged, of another study, or of a newer format.
        """
        start = 0
        while found := self._longest(key, start):
            stop, statistics = found
            yield start, stop, statistics
            start = stop

    def _longest(self, key: str, start: int) -> tuple[int, dict[str, Any]] | None:
        for _ in range(_LOOKS):
            try:
                for stop, mark, path in self._from(key, start):
                    if mark == self._mark(start, stop)[:16]:
                        return stop, self._read(path, key, start, stop)
                    self._require_ours(path, _header(path))  # others are of rows that were redone since
                return None
            except FileNotFoundError:  # replaced by a longer one since it was listed
                continue
        return None

    def write(self, key: str, start: int, stop: int, found: Mapping[str, Any]) -> None:
        """Keep a range, if it is not too large, in place of a shorter one with the same start."""
        arrays = {
            f"{part}.{field.name}": np.asarray(getattr(statistics, field.name))
            for part, statistics in found.items()
            for field in fields(statistics)
        }
        if sum(array.nbytes for array in arrays.values()) > self.limit:
            return
        header = {
            "format": FORMAT,
            "study": self.study_digest,
            "key": key,
            "rows": [start, stop],
            "digests": {name: digest_array(array) for name, array in arrays.items()},
        }
        signed = canonical_json({"header": header, "digest": digest_json(header)}).decode()
        mark = self._mark(start, stop)[:16]
        name = f"{self._prefix(key)}-{start:09d}-{stop:09d}-{mark}.safetensors"
        try:
            write_arrays_once(self.folder / name, arrays, signed)
        except (StoreError, OSError) as error:
            say(f"sums are not kept for the next fit: {getattr(error, 'what', error)}")
            return
        for end, other, path in self._from(key, start):
            if end < stop or (end == stop and other != mark):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _require_ours(self, path: Path, header: dict[str, Any]) -> None:
        if header["study"] != self.study_digest:
            raise StoreError(
                f"{path} holds statistics of another study",
                expected=f"study {self.study_digest[:12]}",
                got=f"study {str(header['study'])[:12]}",
                todo="remove it and fit again",
            )

    def _read(self, path: Path, key: str, start: int, stop: int) -> dict[str, Any]:
        header, arrays = _load(path)
        self._require_ours(path, header)
        if header["key"] != key or header["rows"] != [start, stop]:
            raise _damaged(path, f"{key}, rows {start} to {stop}", f"{header['key']}, rows {header['rows']}")
        for name, digest in header["digests"].items():
            if name not in arrays or digest_array(arrays[name]) != digest:
                raise _damaged(path, f"{name} as it was written", "other contents: the digest differs")
        kind = _KINDS[path.name.split("-")[0]]
        return {part: _statistics(kind, part, arrays) for part in {name.split(".")[0] for name in arrays}}


def _statistics(kind: type, part: str, arrays: Mapping[str, np.ndarray]) -> Any:
    values = {field.name: arrays[f"{part}.{field.name}"] for field in fields(kind)}
    return kind(**values | {"rows": int(values["rows"])})


def _header(path: Path) -> dict[str, Any]:
    return _load(path, arrays=False)[0]


def _load(path: Path, arrays: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="numpy") as file:
            signed = json.loads((file.metadata() or {}).get("coar", "{}"))
            names = file.keys() if arrays else ()
            found = {name: file.get_tensor(name) for name in names}
        header = signed["header"]
        require_format(header["format"], FORMAT, path)
        intact = signed["digest"] == digest_json(header)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise _damaged(path, "complete statistics", str(error)[:200]) from None
    if not intact:
        raise _damaged(path, "a header as it was written", "other contents: the digest differs")
    return header, found


def _damaged(path: Path, expected: str, got: str) -> StoreError:
    return StoreError(
        f"{path} is damaged",
        expected=expected,
        got=got,
        todo="remove this file and fit again: it is made anew from the rows",
    )
