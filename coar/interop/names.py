"""Names for the components and columns of files that carry none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coar.axes import Axis
from coar.errors import AxisError, StoreError
from coar.files import MAX_JSON_BYTES

Names = Axis | Sequence[str] | str | Path  # an axis, a list, or a text file with one name per line


def axis_from(names: Names | None, kind: str, count: int, source: dict[str, str]) -> Axis:
    """The axis of `count` things.

    Args:
        names: an axis is taken as it is; None numbers them.
        kind: "components" or "columns".
        count: how many there are.
        source: what they belong to, where no axis says it.

    Raises:
        AxisError: another number of names, or a name twice.
        StoreError: the file cannot be read.

    >>> axis_from(None, "columns", 2, {"store": "5d2c"}).names
    ('0', '1')
    """
    if names is None:
        return Axis(kind, [str(i) for i in range(count)], source)
    found = names if isinstance(names, Axis) else Axis(kind, _list(names), source)
    if (len(found), found.kind) != (count, kind):
        raise AxisError(
            f"names of {kind} that do not fit the file",
            expected=f"{count} {kind}",
            got=f"{len(found)} {found.kind}",
            todo="give one name for each, in the order of the arrays",
        )
    return found


def _list(names: Sequence[str] | str | Path) -> list[str]:
    return _lines(Path(names)) if isinstance(names, str | Path) else [str(name) for name in names]


def _lines(path: Path) -> list[str]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StoreError(
                f"{path} is too large to be a list of names", expected=f"<= {MAX_JSON_BYTES} bytes"
            )
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise StoreError(
            f"{path}: there is no such file of names",
            expected="a text file in UTF-8, one name per line",
            todo="check the path; names themselves are given as a list",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot read names from {path}",
            expected="text in UTF-8, one name per line",
            got=str(error)[:200],
        ) from None
