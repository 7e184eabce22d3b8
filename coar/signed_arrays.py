"""Signed array files: safetensors with a header that names what they hold, a digest of all, written once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from coar.errors import CoarError, StoreError
from coar.files import canonical_json, digest_array, digest_json, require_format, write_arrays_once

REDO = "remove this file and run again: only it is redone"


def write_signed(path: Path, arrays: dict[str, np.ndarray], header: Mapping[str, Any]) -> bool:
    """Write arrays once, digests added to the header; False if an equal file was there first."""
    whole = {**header, "digests": {name: digest_array(array) for name, array in arrays.items()}}
    signed = canonical_json({"header": whole, "digest": digest_json(whole)}).decode()
    return write_arrays_once(path, arrays, signed)


def read_signed(path: Path, supported: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays, all digests compared: hashing costs less than reading.

    Raises:
        StoreError: missing, truncated, altered, or of a newer format than `supported`.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    header = _checked_header(metadata.get("coar", "{}"), path)
    require_format(header["format"], supported, path)
    return header, arrays


def require_digests(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `StoreError` naming an array that is not what was written."""
    for name, array in arrays.items():
        if digest_array(array) != header["digests"].get(name):
            raise damaged(path, f"{name} as it was written", "other contents: the digest differs")


def header_digest(path: Path) -> str:
    """Digest of a file's header, and so of its contents as they were written; reads the header alone."""
    with opened(path) as file:
        return digest_json(_checked_header((file.metadata() or {}).get("coar", "{}"), path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading; whatever is wrong with it is a `StoreError`."""
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise StoreError(
            f"{path} is missing", todo="run the study again: only what is missing is done"
        ) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if isinstance(error, CoarError):
            raise
        raise damaged(path, "a complete shard", str(error)[:200]) from None


def damaged(path: Path, expected: str, got: str) -> StoreError:
    """The error of a file that is not what was written."""
    return StoreError(f"{path} is damaged", expected=expected, got=got, todo=REDO)


def require_study(path: Path, header: Mapping[str, Any], digest: str) -> None:
    """Raise `StoreError` unless a file belongs to the study of this digest."""
    if header["study"] != digest:
        raise StoreError(
            f"{path} belongs to another study",
            expected=f"study {digest[:12]}",
            got=f"study {str(header['study'])[:12]}",
            todo="remove it and run again",
        )


def _checked_header(text: str, path: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        signed = json.loads(text)
        if signed["digest"] == digest_json(signed["header"]):
            return dict(signed["header"])
    raise damaged(path, "a header as it was written", "other contents: the digest differs")
