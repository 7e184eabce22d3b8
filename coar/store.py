"""Store: shards of rows on disk, each written once, whole or absent, checked when read.

    runs/digits/
      spec.json, provenance.json      written before any worker starts; see coar.study
      extensions/000001.json          more rows, asked for later
      shards/000017.safetensors       rows, masks, outputs; header: format, study digest, digests, record
      failures/000000412.json         rows whose outputs could not be stored

A shard holds the arrays `rows` int64 [k], `masks` uint8 [k, ceil(components / 8)] (bit i of a row is
bit i % 8, least significant first, of byte i // 8; 1 = kept) and one array per output [k, columns].
A float16 output is the difference to the untouched output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coar.errors import OutputError, StoreError
from coar.files import read_json, require_keys, write_json_once
from coar.signed_arrays import (
    damaged,
    header_digest,
    opened,
    read_signed,
    require_digests,
    require_study,
    write_signed,
)

FORMAT = 1
_SHARD_NAME = re.compile(r"[0-9]{6,}\.safetensors")
_OUTPUT = "output."  # prefix of output arrays, so that none can be called "masks"


@dataclass(frozen=True)
class Item:
    """A work item: the rows `start <= row < stop`, stored in shard `index`."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"rows {self.start} to {self.stop}"


@dataclass(frozen=True)
class Shard:
    """Some rows as stored.

    Attributes:
        rows: int64 [k], increasing; rows that failed are absent.
        masks: bool [k, components], True = kept.
        outputs: per output, as stored [k, columns].
        record: execution record of the runner that computed them.
    """

    rows: np.ndarray
    masks: np.ndarray
    outputs: dict[str, np.ndarray]
    record: dict[str, Any]


class Store:
    """The rows of one study.

    Args:
        directory: the study's folder.
        study_digest: of the spec, the model and the data; shards of another study are refused.
        num_components: second axis of the masks.
        num_columns: per output, second axis of its array.
        dtypes: per output, "float32" or "float16".
    """

    def __init__(
        self,
        directory: Path,
        study_digest: str,
        num_components: int,
        num_columns: Mapping[str, int],
        dtypes: Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.study_digest = study_digest
        self.num_components = num_components
        self.num_columns = dict(num_columns)
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}

    def path(self, index: int) -> Path:
        """File of a shard."""
        return self.directory / "shards" / f"{index:06d}.safetensors"

    def present(self) -> set[int]:
        """Indices of finished shards; a name that is no shard's is ignored."""
        folder = self.directory / "shards"
        names = [path.name for path in folder.glob("*.safetensors")]
        return {int(name[:-12]) for name in names if _SHARD_NAME.fullmatch(name)}

    def write(self, item: Item, shard: Shard) -> bool:
        """Store an item; False if an equal shard was there first."""
        arrays = {"rows": shard.rows.astype(np.int64), "masks": pack(shard.masks)}
        arrays |= {
            _OUTPUT + name: self._encoded(name, shard.outputs[name], shard.rows) for name in self.dtypes
        }
        header = {
            "format": FORMAT,
            "rows": [item.start, item.stop],
            "study": self.study_digest,
            "record": shard.record,
        }
        try:
            return write_signed(self.path(item.index), arrays, header)
        except StoreError as error:
            if "holds something else" not in error.what:
                raise
            return self._settle(item, shard, error)

    def _settle(self, item: Item, ours: Shard, error: StoreError) -> bool:
        # Two workers did the same item with different execution records (say, batch sizes): both are
        # right, the first stays. With equal records the outputs must be equal to the bit.
        theirs = self.read(item)
        if theirs.record == ours.record or not np.array_equal(theirs.masks, ours.masks):
            raise error
        return False

    def read(self, item: Item) -> Shard:
        """Read and check a shard.

        Raises:
            StoreError: missing, truncated, altered, of another study, or of a newer format.
        """
        path = self.path(item.index)
        header, arrays = read_signed(path, FORMAT)
        require_study(path, header, self.study_digest)
        if header["rows"] != [item.start, item.stop]:
            raise damaged(path, f"rows {item.start} to {item.stop}", f"rows {header['rows']}")
        self._verify(path, item, header, arrays)
        masks = np.unpackbits(arrays["masks"], axis=1, count=self.num_components, bitorder="little")
        outputs = {name: arrays[_OUTPUT + name] for name in self.dtypes}
        return Shard(arrays["rows"], masks.view(bool), outputs, header["record"])

    def digest(self, item: Item) -> str:
        """Digest of a shard's header, and so of its contents as they were written; reads the header alone."""
        return header_digest(self.path(item.index))

    def count(self, item: Item) -> int:
        """How many rows a shard holds, from its header alone; `read` checks the contents."""
        with opened(self.path(item.index)) as file:
            shape = file.get_slice("rows").get_shape()
            if len(shape) != 1:
                raise damaged(self.path(item.index), "a list of row numbers", f"shape {shape}")
            return int(shape[0])

    def _verify(self, path: Path, item: Item, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        count = len(arrays.get("rows", ()))
        shapes = {"rows": (count,), "masks": (count, (self.num_components + 7) // 8)}
        shapes |= {_OUTPUT + name: (count, columns) for name, columns in self.num_columns.items()}
        if set(shapes) != set(arrays):
            raise damaged(path, f"arrays {sorted(shapes)}", f"{sorted(arrays)}")
        for name, array in arrays.items():
            if array.shape != shapes[name]:
                raise damaged(path, f"{name} {shapes[name]}", f"{name} {array.shape}")
        require_digests(path, header, arrays)
        rows = arrays["rows"]
        if count and not (item.start <= rows[0] and rows[-1] < item.stop and (np.diff(rows) > 0).all()):
            raise damaged(path, f"rows {item.start} to {item.stop}, increasing", "other row numbers")

    def _encoded(self, name: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if values.shape != (len(rows), self.num_columns[name]):
            raise OutputError(
                f"output {name!r} has the wrong length",
                expected=(len(rows), self.num_columns[name]),
                got=values.shape,
                todo="the task has changed since the study was created; make a new study",
            )
        return np.ascontiguousarray(values, dtype=self.dtypes[name])

    def fail(self, row: int, error: OutputError) -> None:
        """Record that a row's outputs cannot be stored."""
        path = self.directory / "failures" / f"{row:09d}.json"
        if not path.exists():  # the same row may fail again, with another NaN
            write_json_once(path, {"format": FORMAT, "row": row, "what": error.what, "got": str(error.got)})

    def failures(self) -> Iterator[dict[str, Any]]:
        """Records of failed rows, by row."""
        for path in sorted((self.directory / "failures").glob("*.json")):
            yield require_keys(read_json(path, "failure record"), {"row": int, "what": str}, path)


def pack(masks: np.ndarray) -> np.ndarray:
    """uint8 [rows, ceil(components / 8)], least significant bit first."""
    return np.packbits(masks, axis=1, bitorder="little")


def first_unstorable(values: np.ndarray, dtype: str) -> int | None:
    """Column of the first NaN, infinity or overflow in one row of outputs [columns]."""
    limit = np.finfo(dtype).max
    bad = ~(np.abs(values) <= limit)  # NaN compares false
    return int(np.argmax(bad)) if bad.any() else None
