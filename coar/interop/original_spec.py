"""The original's spec files: which arrays a store was made with.

    {"num_models": 50000,
     "schema": {"masks": {"dtype": "bool_", "shape": [2304]},
                "test_margins": {"dtype": "float16", "shape": [10000]}}}

Every array has `num_models` rows of that shape; `_completed` is added by the original itself.
Format: initialize_store.py of MadryLab/modelcomponents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coar.errors import StoreError
from coar.files import read_json, require_keys

COMPLETED = "_completed"
MASKS = "masks"


def read_original_spec(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape (rows first) and type of every array, by name.

    Raises:
        StoreError: naming the file and the key that is wrong.

    >>> import json, tempfile
    >>> value = {"num_models": 5, "schema": {"masks": {"dtype": "bool_", "shape": [3]}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "spec.json"
    ...     _ = path.write_text(json.dumps(value))
    ...     read_original_spec(path)["masks"]
    ((5, 3), dtype('bool'))
    """
    value = read_json(path, "spec of a store")
    if isinstance(value, dict) and not {"num_models", "schema"} & set(value):
        ours = "experiment" in value and "design" in value
        raise StoreError(
            f"{path} is not a spec of the original code",
            expected="an object with num_models and schema",
            got="a spec of this package"
            if ours
            else f"keys {', '.join(map(str, list(value)[:5])) or 'none'}",
            todo="pass the spec that the store was made with, or none",
        )
    value = require_keys(value, {"num_models": int, "schema": dict}, path)
    rows = value["num_models"]
    if isinstance(rows, bool) or rows < 1:
        raise _bad(path, "num_models", "a whole number above 0", rows)
    if COMPLETED in value["schema"]:
        raise _bad(path, f"schema.{COMPLETED}", "no such key: the store has this array anyway", "one")
    if MASKS not in value["schema"]:
        raise _bad(path, f"schema.{MASKS}", "the masks", "nothing")
    return {name: _entry(path, name, entry, rows) for name, entry in value["schema"].items()}


def _entry(path: Path, name: str, entry: Any, rows: int) -> tuple[tuple[int, ...], np.dtype]:
    if not isinstance(entry, dict) or not {"dtype", "shape"} <= set(entry):
        raise _bad(path, f"schema.{name}", "an object with dtype and shape", entry)
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise _bad(path, f"schema.{name}.shape", "a list of whole numbers above 0", shape)
    return (rows, *shape), _dtype(path, name, entry["dtype"])


def _dtype(path: Path, name: str, text: Any) -> np.dtype:
    """The type of an attribute of NumPy, such as `bool_`, without asking NumPy for any attribute."""
    try:
        found = np.dtype(text.removesuffix("_"))
    except (AttributeError, TypeError, ValueError):
        found = np.dtype(object)
    if found.kind not in "biuf":
        raise _bad(path, f"schema.{name}.dtype", "a type of NumPy, such as bool_ or float16", text)
    return found


def _bad(path: Path, key: str, expected: str, got: Any) -> StoreError:
    return StoreError(f"{path}: key {key!r} is not accepted", expected=expected, got=f"{got!r:.80}")
