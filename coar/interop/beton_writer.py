"""Writing FFCV's `.beton` files (see `coar.interop.beton_format`), a block of samples at a time."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from coar.errors import CoarWarning, SettingError, StoreError
from coar.files import write_once
from coar.interop.beton_format import (
    ARRAY,
    FIELD,
    FLOAT,
    HEADER,
    INT,
    MAX_PAGE,
    PAGE,
    TABLE,
    TYPE,
    VERSION,
    BetonField,
)


def write_beton(path: str | Path, arrays: Mapping[str, Any]) -> Path:
    """Write arrays [samples, ...] as a file that FFCV reads.

    Whole numbers and floats [samples] become number fields (int64, float64), all else arrays.
    FFCV 1.0.2 hangs on float16 arrays on the CPU: write `array.view(np.int16)` and view it back. float16
    arrays are written with a warning that says so.

    Args:
        path: the file, which must not exist.
        arrays: by field name (at most 16 ASCII characters), of equal length.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     from coar.interop.beton import read_beton
    ...     path = write_beton(f"{folder}/a.beton", {"mask": np.eye(2, dtype=bool), "idx": np.arange(2)})
    ...     read_beton(path)["mask"].tolist()
    [[True, False], [False, True]]
    """
    found = {name: np.asarray(array) for name, array in arrays.items()}
    lengths = {len(array) if array.ndim else -1 for array in found.values()}
    if len(lengths) != 1 or min(lengths) < 1:
        raise SettingError(
            "fields of different lengths, or none",
            expected="arrays [samples, ...] of one length, at least 1",
            got={name: array.shape for name, array in found.items()},
        )
    fields = {name: _field_of(name, array) for name, array in found.items()}
    halves = [name for name, field in fields.items() if field.dtype == np.float16]
    if halves:
        warnings.warn(
            f"FFCV 1.0.2 hangs on float16 arrays on the CPU ({', '.join(halves)}): write "
            "array.view(np.int16), and .view(np.float16) what FFCV reads",
            CoarWarning,
            stacklevel=2,
        )
    return write_beton_blocks(path, fields, lengths.pop(), [found])


def _field_of(name: str, array: np.ndarray) -> BetonField:
    if array.ndim == 1 and array.dtype.kind in "iuf":
        return BetonField(np.dtype("<f8" if array.dtype.kind == "f" else "<i8"))
    if array.ndim == 1 or array.dtype.kind not in "biuf":
        raise SettingError(
            f"field {name!r} cannot be written",
            expected="numbers [samples], or arrays [samples, ...] of numbers or bool",
            got=f"{array.dtype} {array.shape}",
            todo="reshape bool [samples] to [samples, 1]",
        )
    return BetonField(array.dtype, array.shape[1:])


def write_beton_blocks(
    path: str | Path,
    fields: Mapping[str, BetonField],
    num_samples: int,
    blocks: Iterable[Mapping[str, np.ndarray]],
) -> Path:
    """Write samples as they come: no more than a block of them, and 8 bytes for each, are held.

    Args:
        path: the file, which must not exist.
        fields: by name, at most 16 ASCII characters.
        num_samples: over all blocks.
        blocks: per field [k, ...].
    """
    if Path(path).exists():
        raise StoreError(f"{path} exists", expected="a name that is free", todo="choose another")
    layout = _Layout(fields, num_samples)
    write_once(Path(path), lambda partial: _write(partial, layout, blocks))
    return Path(path)


class _Layout:
    """Where everything goes: samples one behind the other, as many as fit, in each page."""

    def __init__(self, fields: Mapping[str, BetonField], num_samples: int) -> None:
        self.fields = {name: _checked(name, field) for name, field in fields.items()}
        self.count, self.size = num_samples, sum(field.size for field in fields.values())
        self.page_size = max(PAGE, 1 << (self.size - 1).bit_length() if self.size else 0)
        if not fields or num_samples < 1 or self.page_size > MAX_PAGE:
            raise SettingError(
                "cannot be laid out in pages",
                expected=f"at least one field and sample, and at most {MAX_PAGE} bytes per sample",
                got=f"{len(fields)} fields, {num_samples} samples, {self.size} bytes each",
            )
        head = HEADER.size + len(fields) * (FIELD.itemsize + 8 * num_samples)
        self.start = -(-head // self.page_size) * self.page_size
        self.per_page = self.page_size // self.size if self.size else num_samples
        pages = -(-num_samples // self.per_page) if self.size else 0
        self.table_start = self.start + pages * self.page_size

    def places(self) -> np.ndarray:
        """Where each sample's arrays begin, uint64 [samples]."""
        page, within = np.divmod(np.arange(self.count, dtype="<u8"), np.uint64(self.per_page))
        return self.start + page * np.uint64(self.page_size) + within * np.uint64(self.size)

    def head(self) -> bytes:
        """Header and fields."""
        described = np.zeros(len(self.fields), FIELD)
        for entry, (name, field) in zip(described, self.fields.items(), strict=True):
            entry["type"], arguments = _described(field)
            entry["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            entry["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
        numbers = (VERSION, len(self.fields), self.page_size, self.count, self.table_start)
        return HEADER.pack(*numbers) + described.tobytes()


def _checked(name: str, field: BetonField) -> BetonField:
    little = np.dtype(field.dtype).newbyteorder("<")
    fits = 0 < len(name) <= 16 and name.isascii() and name.isprintable()
    plain = bool(TYPE.fullmatch(little.str)) and len(field.shape) < 32 and all(n > 0 for n in field.shape)
    if not fits or not plain or (not field.is_array and little.str not in ("<i8", "<f8")):
        raise SettingError(
            f"field {name!r} cannot be written",
            expected="a name of 1 to 16 ASCII characters; int64 or float64 numbers, or arrays of numbers or "
            "bool with at least one entry",
            got=f"{field.dtype} {field.shape}",
        )
    return BetonField(little, tuple(field.shape))


def _described(field: BetonField) -> tuple[int, bytes]:
    if not field.is_array:
        return (FLOAT if field.dtype.kind == "f" else INT), b""
    text = json.dumps([["", field.dtype.str]]).encode()
    shape = field.shape + (0,) * (32 - len(field.shape))
    return ARRAY, struct.pack("<32Q", *shape) + len(text).to_bytes(8, "little") + text


def _write(path: Path, layout: _Layout, blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
    places, done = layout.places(), 0
    cells = np.empty((layout.count, len(layout.fields)), "<u8")
    with path.open("wb") as file:
        for block in blocks:
            arrays = {name: _values(name, field, block[name]) for name, field in layout.fields.items()}
            here = slice(done, done + len(next(iter(arrays.values()))))
            if here.stop > layout.count or len({len(array) for array in arrays.values()}) > 1:
                raise _count_differs(layout, here.stop)
            _fill_cells(cells[here], layout, arrays, places[here])
            _write_pages(file, layout, arrays, places[here])
            done = here.stop
        if done != layout.count:
            raise _count_differs(layout, done)
        file.truncate(layout.table_start)  # the last page is whole
        file.seek(layout.table_start)
        file.write(_table(layout, places).tobytes())
        file.seek(0)
        file.write(layout.head())
        file.write(cells.data)


def _count_differs(layout: _Layout, got: int) -> SettingError:
    return SettingError("the blocks hold another number of samples", expected=layout.count, got=got)


def _values(name: str, field: BetonField, values: Any) -> np.ndarray:
    found = np.asarray(values)
    exact = found.dtype.newbyteorder("<") == field.dtype
    if not field.is_array and not exact:
        with np.errstate(invalid="ignore"):  # NaN as a whole number: not exact, see below
            widened = found.astype(field.dtype) if found.dtype.kind in "iuf" else found
        exact = found.dtype.kind in "iuf" and np.array_equal(
            widened, found, equal_nan=found.dtype.kind == "f"
        )
        found = widened
    if not exact or found.shape[1:] != field.shape:
        raise SettingError(
            f"field {name!r} holds something else than was said",
            expected=f"{field.dtype} [samples{''.join(f', {n}' for n in field.shape)}]",
            got=f"{np.asarray(values).dtype} {found.shape}",
        )
    return np.ascontiguousarray(found, dtype=field.dtype)


def _fill_cells(
    cells: np.ndarray, layout: _Layout, arrays: Mapping[str, np.ndarray], places: np.ndarray
) -> None:
    offset = 0
    for position, (name, field) in enumerate(layout.fields.items()):
        cells[:, position] = places + np.uint64(offset) if field.is_array else arrays[name].view("<u8")
        offset += field.size


def _write_pages(
    file: IO[bytes], layout: _Layout, arrays: Mapping[str, np.ndarray], places: np.ndarray
) -> None:
    parts = [arrays[name] for name, field in layout.fields.items() if field.is_array]
    if not parts or not len(places):
        return
    whole = np.concatenate([part.reshape(len(part), -1).view(np.uint8) for part in parts], axis=1)
    breaks = np.flatnonzero(np.diff(places) != layout.size) + 1  # where a page ends
    for piece, first in zip(np.split(whole, breaks), [0, *breaks.tolist()], strict=True):
        file.seek(int(places[first]))
        file.write(piece.data)


def _table(layout: _Layout, places: np.ndarray) -> np.ndarray:
    sizes: Sequence[int] = [field.size for field in layout.fields.values() if field.is_array]
    found = np.empty((layout.count, len(sizes)), TABLE)
    offset = 0
    for position, size in enumerate(sizes):
        found["sample"][:, position] = np.arange(layout.count)
        found["start"][:, position], found["size"][:, position] = places + np.uint64(offset), size
        offset += size
    return found
