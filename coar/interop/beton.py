"""Reading FFCV's `.beton` files (see `coar.interop.beton_format`); nothing a file says is believed."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from coar.errors import StoreError
from coar.interop.beton_format import (
    ARRAY,
    FIELD,
    FLOAT,
    HEADER,
    INT,
    OTHERS,
    SHAPE_BYTES,
    TABLE,
    TENSOR,
    TYPE,
    VERSION,
    BetonField,
)


class Beton:
    """A file, opened for reading and checked: whatever it says of itself must fit into it.

    Attributes:
        fields: by name, in the order of the file.
        page_size: bytes.

    Raises:
        StoreError: not such a file, damaged, truncated, or with fields that are neither numbers nor arrays.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as file:
            length = os.fstat(file.fileno()).st_size
            head = HEADER.unpack(self._exactly(file, HEADER.size, "the header"))
            version, num_fields, self.page_size, self._count, self._table_start = head
            whole = version == VERSION and num_fields > 0 and self._count > 0
            self._require(whole, f"version {VERSION}, some fields, some samples", head)
            raw = self._exactly(file, num_fields * FIELD.itemsize, "the fields")
            self.fields = self._fields(np.frombuffer(raw, FIELD))
            self._first = HEADER.size + len(raw) + 8 * num_fields * self._count
            self._check_sizes(length)
            cells = self._exactly(file, 8 * num_fields * self._count, "the samples")
            self._cells = np.frombuffer(cells, "<u8").reshape(self._count, num_fields)
            file.seek(self._table_start)
            self._check_places(
                np.frombuffer(self._exactly(file, length - self._table_start, "the table"), TABLE)
            )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {field.dtype}{list(field.shape)}" for name, field in self.fields.items())
        return f"Beton({str(self.path)!r}, {len(self)} samples: {fields})"

    def read(self, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Samples `start <= i < stop`, per field [samples, ...]."""
        here = slice(*slice(start, stop).indices(len(self)))
        cells = self._cells[here]
        found = {}
        with self._open() as file:
            for position, (name, field) in enumerate(self.fields.items()):
                column = np.ascontiguousarray(cells[:, position])
                if field.is_array:
                    found[name] = self._arrays(file, name, field, column)
                else:
                    found[name] = column.view(field.dtype)
        return found

    def blocks(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """All samples, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, start + size)

    def _arrays(self, file: IO[bytes], name: str, field: BetonField, starts: np.ndarray) -> np.ndarray:
        found = np.empty((len(starts), *field.shape), field.dtype)
        flat = found.reshape(len(starts), -1).view(np.uint8)
        for target, place in zip(flat, starts.tolist(), strict=True):
            file.seek(place)
            got = file.readinto(target.data)  # type: ignore[attr-defined]
            self._require(got == field.size, f"{field.size} bytes of {name} at {place}", f"{got}")
        if field.dtype == bool and (flat > 1).any():
            raise self._damaged(f"0 or 1 in {name}", "other bytes")
        return found

    def _open(self) -> IO[bytes]:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # before a pipe makes us wait for ever
                raise StoreError(f"{self.path} is not a file", expected="a .beton file")
            return self.path.open("rb")
        except FileNotFoundError:
            raise StoreError(f"{self.path} is missing", expected="a .beton file") from None
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot read {self.path}: {error.strerror or error}") from None

    def _exactly(self, file: IO[bytes], count: int, what: str) -> bytes:
        # Asked of the file first: a number that a damaged file claims is no reason to reserve memory.
        left = os.fstat(file.fileno()).st_size - file.tell()
        self._require(count <= left, f"{count} bytes for {what}", f"{left}")
        found = file.read(count)
        self._require(len(found) == count, f"{count} bytes for {what}", f"{len(found)}")
        return found

    def _fields(self, described: np.ndarray) -> dict[str, BetonField]:
        found: dict[str, BetonField] = {}
        for entry in described:
            text = entry["name"].tobytes().split(b"\0")[0]
            self._require(text.isascii() and text.decode("latin1").isprintable(), "printable names", text)
            name = text.decode("ascii")
            self._require(bool(name) and name not in found, "different names of fields", repr(name))
            found[name] = self._field(name, int(entry["type"]), entry["arguments"].tobytes())
        return found

    def _field(self, name: str, kind: int, arguments: bytes) -> BetonField:
        if kind in (FLOAT, INT):
            return BetonField(np.dtype("<f8" if kind == FLOAT else "<i8"))
        if kind not in (ARRAY, TENSOR):
            raise StoreError(
                f"{self.path}: field {name!r} holds {OTHERS.get(kind, f'type {kind}')}",
                expected="numbers or arrays",
                todo="read this file with FFCV itself",
            )
        dims = struct.unpack_from("<32Q", arguments)
        shape = dims[: max((i + 1 for i, n in enumerate(dims) if n), default=0)]
        self._require(0 < len(shape) < 32 and 0 not in shape, f"a shape of {name}", shape)
        return BetonField(self._dtype(name, arguments[SHAPE_BYTES:]), shape)

    def _dtype(self, name: str, text: bytes) -> np.dtype:
        length = int.from_bytes(text[:8], "little")
        try:
            ((_, kind),) = json.loads(text[8 : 8 + min(length, len(text))])
        except (ValueError, TypeError, RecursionError):
            kind = None
        if not isinstance(kind, str) or not TYPE.fullmatch(kind):
            raise self._damaged(f"the type of {name}: bool, or numbers of 1 to 8 bytes", f"{text[8:60]!r}")
        return np.dtype(kind)

    def _check_sizes(self, length: int) -> None:
        """Nothing may claim more bytes than there are: then nothing reserves more than the file's size."""
        start, stop = self._first, self._table_start
        self._require(start <= stop <= length, f"pages between {start} and {length}", f"up to {stop}")
        arrays = [field for field in self.fields.values() if field.is_array]
        size = self._count * sum(field.size for field in arrays)
        self._require(size <= stop - start, f"at most {stop - start} bytes of arrays", f"{size}")
        table = self._count * len(arrays) * TABLE.itemsize
        self._require(table == length - stop, f"a table of {table} bytes", f"{length - stop}")

    def _check_places(self, table: np.ndarray) -> None:
        """The arrays lie in the pages, apart from each other, and where the table says."""
        parts = [(i, field.size) for i, field in enumerate(self.fields.values()) if field.is_array]
        if not parts:
            return
        starts = np.concatenate([self._cells[:, i] for i, _ in parts])
        sizes = np.repeat(np.array([size for _, size in parts], "<u8"), self._count)
        order, theirs = np.argsort(starts, kind="stable"), np.argsort(table["start"], kind="stable")
        starts, sizes, table = starts[order], sizes[order], table[theirs]
        samples = np.tile(np.arange(self._count, dtype="<u8"), len(parts))[order]
        same = (starts == table["start"]) & (sizes == table["size"]) & (samples == table["sample"])
        self._require(bool(same.all()), "a table that names the arrays of the samples", "another")
        inside = (starts >= self._first) & (starts <= self._table_start - sizes)
        self._require(bool(inside.all()), "arrays in the pages", "arrays elsewhere")
        self._require(
            bool((np.diff(starts) >= sizes[:-1]).all()), "arrays apart from each other", "an overlap"
        )

    def _require(self, holds: bool, expected: object, got: object) -> None:
        if not holds:
            raise self._damaged(expected, got)

    def _damaged(self, expected: object, got: object) -> StoreError:
        return StoreError(
            f"{self.path} is no .beton file of version {VERSION}, or damaged",
            expected=expected,
            got=f"{got!s:.120}",
            todo="write it again, or check the path",
        )


def read_beton(path: str | Path) -> dict[str, np.ndarray]:
    """All samples of a file, per field [samples, ...]; `Beton(path).blocks(size)` reads some at a time.

    Raises:
        StoreError: see `Beton`.
    """
    return Beton(path).read()
