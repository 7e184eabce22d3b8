"""Files that are either whole or absent: atomic write-once files, digests, checked reads.

A writer fills `NAME.partial-HOST-PID-UUID`, flushes it to disk once, and moves it into place with
one operation that fails if `NAME` exists. So the first writer wins, a reader never sees half a
file, and a killed writer leaves only a `.partial-` file that everybody ignores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coar.errors import CoarError, SettingError, StoreError

PARTIAL = ".partial-"
MAX_JSON_BYTES = 256 * 2**20  # names of a million components fit; a runaway or hostile file does not
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def safe_name(name: str, what: str) -> str:
    """Return `name` if it can only be a file inside its folder; refuse `../x`, `a/b`, empty names."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or PARTIAL in name:
        raise SettingError(
            f"{what} is used as a file name and must stay inside its folder",
            expected="1-100 letters, digits, '.', '_' or '-', starting with a letter or digit",
            got=repr(name),
            todo="choose another name",
        )
    return name


def sha256(data: bytes | memoryview) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_array(array: np.ndarray) -> str:
    """Digest of an array's type, shape and contents (byte order little-endian).

    >>> digest_array(np.zeros(2)) == digest_array(np.zeros((1, 2)))
    False
    """
    array = np.asarray(array, order="C")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    head = f"{little.dtype.str}{little.shape}".encode()
    return sha256(head + sha256(little.reshape(-1).view(np.uint8).data).encode())


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling per value: sorted keys, no spaces, no NaN.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """Digest of a JSON value, independent of key order."""
    return sha256(canonical_json(value))


def partial_path(path: Path) -> Path:
    """Return a name beside `path` that no other writer uses."""
    return path.with_name(f"{path.name}{PARTIAL}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}")


def write_once(path: Path, write: Callable[[Path], None]) -> bool:
    """Create `path` atomically; return False if an equal file was there first.

    Args:
        path: the final name.
        write: fills the path it is given; it need not flush.

    Raises:
        StoreError: another file of that name holds something else, or the disk refuses.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        return _move_or_compare(partial, path)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}",
            todo="free space or permissions there, then run again: what is finished is kept",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # must not hide the error above
            partial.unlink(missing_ok=True)


def write_arrays_once(path: Path, arrays: dict[str, np.ndarray], header: str = "") -> bool:
    """Write a safetensors file with `write_once`; `header` is kept under the metadata key "coar"."""
    # One metadata key: safetensors writes several in random order, and equal files must be equal bytes.
    metadata = {"coar": header} if header else None

    def write(partial: Path) -> None:
        try:
            partial.touch()
            rights = partial.stat().st_mode  # what this user gives to new files; save_file gives less
            save_file(arrays, partial, metadata)
            partial.chmod(rights)
        except SafetensorError as error:  # how it reports a full disk, among others
            raise OSError(str(error)) from error

    return write_once(path, write)


def write_json_once(path: Path, value: Any) -> bool:
    """Write a JSON file with `write_once`, indented for people to read."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    return write_once(path, write)


def _flush(path: Path) -> None:
    # Opened for update: flushing a read-only handle is an error on Windows.
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _move_or_compare(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)  # unlike a rename on POSIX, fails where the name exists
        return True
    except FileExistsError:
        pass
    except OSError:
        # No hard links here (some network and FAT file systems): the window between this check
        # and the rename is harmless, since two writers of one name write the same bytes.
        if not path.exists():
            partial.rename(path)
            return True
    ours, theirs = sha256(partial.read_bytes()), sha256(path.read_bytes())
    if ours != theirs:
        raise StoreError(
            f"{path} exists and holds something else",
            expected=f"digest {ours[:12]}",
            got=f"digest {theirs[:12]}",
            todo="use another name or folder; nothing was overwritten",
        )
    return False


def read_json(path: Path, what: str = "file") -> Any:
    """Read a JSON file; every way it can be bad is a `StoreError` that names it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StoreError(
                f"{path} is too large to be a {what}",
                expected=f"at most {MAX_JSON_BYTES} bytes",
                got=f"{path.stat().st_size} bytes",
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing", expected=f"a {what}", todo="check the path") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{path} is not a readable {what}", expected="JSON in UTF-8", got=str(error)[:200]
        ) from None
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot read {path}: {error.strerror or error}", expected=f"a {what}", todo="check the path"
        ) from error


def require_keys(value: Any, keys: Mapping[str, type | tuple[type, ...]], path: Path) -> dict[str, Any]:
    """Check that a JSON value is an object with these keys of these types."""
    if not isinstance(value, dict):
        raise StoreError(f"{path} is damaged", expected="a JSON object", got=type(value).__name__)
    for key, kind in keys.items():
        if key not in value or not isinstance(value[key], kind):
            got = type(value[key]).__name__ if key in value else "nothing"
            raise StoreError(f"{path}: key {key!r} is damaged", expected=kind, got=got)
    return value


def require_format(found: Any, supported: int, path: str | Path, error: type[CoarError] = StoreError) -> None:
    """Raise `error` for a file of a newer format: its keys may mean other things."""
    if isinstance(found, int) and not isinstance(found, bool) and found > supported:
        raise error(
            f"{path} was written by a newer version",
            expected=f"format {supported} or older",
            got=f"format {found}",
            todo="upgrade this package",
        )


def remove_abandoned(folder: Path) -> int:
    """Delete partial files whose writer ran on this machine and is gone; return how many."""
    mine = re.compile(rf".*{re.escape(PARTIAL)}{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{32}}")
    found = [(path, mine.fullmatch(path.name)) for path in folder.glob(f"*{PARTIAL}*")]
    abandoned = [path for path, match in found if match and not _alive(int(match[1]))]
    for path in abandoned:
        path.unlink(missing_ok=True)
    return len(abandoned)


def _alive(pid: int) -> bool:
    if os.name != "posix":  # signal 0 would end the process on Windows
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
