"""Memory to plan with: what the machine has, or what a user allows."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from coar.errors import SettingError

SHARE = 0.5  # of the machine's memory
LEAST, MOST = 2**20, 2**60  # less, or more, is a number in another unit than meant
# Without capitals; "8 GiB", "8Gi" and "8g" are binary, as for other programs, and "8 GB" is decimal.
_SIZES = {"": 1, "b": 1, "byte": 1, "bytes": 1}
_SIZES |= {f"{p}{end}": 2 ** (10 * k) for k, p in enumerate("kmgt", 1) for end in ("", "i", "ib")}
_SIZES |= {f"{p}b": 10 ** (3 * k) for k, p in enumerate("kmgt", 1)}


def memory_bytes(asked: int | str | None) -> int:
    """Bytes to plan with; default half of the machine's memory.

    Raises:
        SettingError: not an amount, less than 1 MiB, or more than any machine has.

    >>> memory_bytes("1.5 GiB"), memory_bytes("1.5g"), memory_bytes("1.5 GB")
    (1610612736, 1610612736, 1500000000)
    """
    if asked is None:
        return int(SHARE * total_memory())
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(asked))
    number = float(match[1]) * _SIZES.get(match[2].lower(), 0) if match else 0
    if not LEAST <= number <= MOST or isinstance(asked, bool):
        plain = match and not match[2] and not isinstance(asked, bool)
        meant = match[1] if match and plain and 0 < number <= 2**10 else "4"
        raise SettingError(
            "memory to plan with",
            expected='bytes, or text such as "8 GiB" (at least 1 MiB)',
            got=f"{asked} bytes" if plain else repr(asked),
            todo=f'write "{meant} GiB"',
        )
    return int(number)


def total_memory() -> int:
    """Bytes of memory of this machine, or of its container (8 GiB where nobody says)."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        found = 8 * 2**30
    with contextlib.suppress(OSError, ValueError):
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found
