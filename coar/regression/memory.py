"""Memory to plan with: what the machine has, or what a user allows."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from coar.errors import SettingError

SHARE = 0.5  # of the machine's memory
_SIZES = {"": 1, "B": 1}
_SIZES |= {f"{p}iB": 2 ** (10 * k) for k, p in enumerate("KMGT", 1)}
_SIZES |= {f"{p}B": 10 ** (3 * k) for k, p in enumerate("KMGT", 1)}


def memory_bytes(asked: int | str | None) -> int:
    """Bytes to plan with; default half of the machine's memory.

    >>> memory_bytes("1.5 GiB")
    1610612736
    """
    if asked is None:
        return int(SHARE * total_memory())
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(asked))
    number = float(match[1]) * _SIZES.get(match[2], 0) if match else 0
    if number < 1 or isinstance(asked, bool):
        raise SettingError("memory to plan with", expected='bytes, or text such as "8 GiB"', got=repr(asked))
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
