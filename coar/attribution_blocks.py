"""Blocks of attributions on disk: one file per range of columns, an index written last.

attributions/ridge/
000000.safetensors        columns 0 .. n: weights [columns, components], intercept, errors, details
index.json                format, axes, blocks with digests, provenance, a digest of all that
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from coar.axes import Axis
from coar.errors import AxisError, OutputError, StoreError
from coar.files import (
    digest_array,
    digest_json,
    read_json,
    require_format,
    require_keys,
    write_arrays_once,
    write_json_once,
)

FORMAT = 1
BLOCK_BYTES = 64 * 2**20
_REQUIRED = ("weights", "intercept")
_BLOCK_NAME = re.compile(r"\d+\.safetensors")


@dataclass(frozen=True)
class Block:
    """Attributions of the columns `start <= column < start + len(weights)`.

    Attributes:
        start: first column.
        weights: float32 [columns, components], in output units per component kept.
        intercept: float64 [columns], prediction with every component ablated.
        errors: standard errors of the weights, float32 [columns, components], or None.
        details: further figures per column, such as the penalty chosen, float64 [columns] each.
    """

    start: int
    weights: np.ndarray
    intercept: np.ndarray
    errors: np.ndarray | None = None
    details: Mapping[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything but the position, by name."""
        arrays = {
            "weights": self.weights.astype(np.float32, copy=False),
            "intercept": self.intercept.astype(np.float64, copy=False),
        }
        if self.errors is not None:
            arrays["errors"] = self.errors.astype(np.float32, copy=False)
        arrays |= {f"details.{key}": np.asarray(v, np.float64) for key, v in (self.details or {}).items()}
        return {key: np.ascontiguousarray(value) for key, value in arrays.items()}

    @classmethod
    def from_arrays(cls, start: int, arrays: dict[str, np.ndarray]) -> Block:
        """Undo `arrays`."""
        details = {k.removeprefix("details."): v for k, v in arrays.items() if k.startswith("details.")}
        return cls(start, arrays["weights"], arrays["intercept"], arrays.get("errors"), details)


def write_blocks(
    folder: Path,
    blocks: Iterable[Block],
    components: Axis,
    columns: Axis,
    output: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write blocks as they come, and the index last: attributions larger than memory."""
    entries = []
    for number, block in enumerate(blocks):
        arrays, name = block.arrays(), f"{number:06d}.safetensors"
        write_arrays_once(folder / name, arrays)
        digests = {key: digest_array(value) for key, value in arrays.items()}
        entries.append(
            {"file": name, "start": block.start, "stop": block.start + len(block), "digests": digests}
        )
    index = {
        "format": FORMAT,
        "output": output,
        "components": components.to_json(),
        "columns": columns.to_json(),
        "blocks": entries,
        "provenance": dict(provenance),
    }
    write_json_once(folder / "index.json", index | {"digest": digest_json(index)})


def split(block: Block, num_components: int) -> Iterator[Block]:
    """Cut a block into pieces of about `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // (4 * max(1, num_components)))
    arrays = block.arrays()
    for first in range(0, len(block), size):
        yield Block.from_arrays(block.start + first, {k: v[first : first + size] for k, v in arrays.items()})


def require_shape(block: Block, columns: int, components: int, where: str) -> None:
    """Raise unless a block has this shape and finite weights; `where` names it in errors."""
    shapes = {"weights": (columns, components), "intercept": (columns,), "errors": (columns, components)}
    for name, array in block.arrays().items():
        if array.shape != shapes.get(name, (columns,)):
            raise AxisError(
                f"{where}: {name} has the wrong shape", expected=shapes.get(name), got=array.shape
            )
        if name in _REQUIRED and not np.isfinite(array).all():
            column = int(np.argwhere(~np.isfinite(array))[0][0])
            raise OutputError(f"{where}: {name} of column {column} is not finite", expected="finite numbers")


def read_index(path: Path) -> dict[str, Any]:
    """Read and check `index.json`, its own digest included."""
    keys = {
        "format": int,
        "output": str,
        "components": dict,
        "columns": dict,
        "blocks": list,
        "provenance": dict,
        "digest": str,
    }
    if not path.exists():
        raise StoreError(
            f"no attributions in {path.parent}: {path.name} is missing",
            expected="a folder written by Attributions.save or fit(save_as=...)",
            todo="make them first, for example with `coar fit`",
        )
    index = require_keys(read_json(path, "index of attributions"), {"format": int}, path)
    require_format(index["format"], FORMAT, path)
    require_keys(index, keys, path)
    if index.pop("digest") != digest_json(index):
        raise StoreError(f"{path} is damaged: its digest differs", todo="remove the folder, fit again")
    return index


def block_ranges(entries: list[Any], num_columns: int, path: Path) -> list[tuple[int, int]]:
    """Columns of each block; they must follow each other and cover all columns."""
    keys = {"file": str, "start": int, "stop": int, "digests": dict}
    for entry in entries:
        require_keys(entry, keys, path)
        if set(_REQUIRED) - set(entry["digests"]):
            raise StoreError(f"{path} is damaged", expected=f"digests of {_REQUIRED}", got=entry["digests"])
        if not _BLOCK_NAME.fullmatch(entry["file"]):
            raise StoreError(
                f"{path} names a file that is not a block of this folder",
                expected="a name such as 000000.safetensors",
                got=repr(entry["file"]),
            )
    ranges = [(entry["start"], entry["stop"]) for entry in entries]
    ends = [0, *(stop for _, stop in ranges)]
    if [start for start, _ in ranges] != ends[:-1] or ends != sorted(set(ends)) or ends[-1] != num_columns:
        raise StoreError(
            f"{path} is damaged: its blocks do not cover the columns",
            expected=f"ranges that follow each other from 0 to {num_columns}",
            got=str(ranges)[:200],
            todo="remove the folder, fit again",
        )
    return ranges


def read_block(folder: Path, entry: dict[str, Any], components: int) -> Block:
    """Read and check one block named in the index."""
    path = folder / entry["file"]
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is missing or damaged", got=str(error)[:200], todo="fit again") from None
    for name, digest in entry["digests"].items():
        if name not in arrays or digest_array(arrays[name]) != digest:
            raise StoreError(
                f"{path} is damaged: {name} is not what was written", todo="remove the folder, fit again"
            )
    block = Block.from_arrays(entry["start"], arrays)
    require_shape(block, entry["stop"] - entry["start"], components, str(path))
    return block
