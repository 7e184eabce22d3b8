"""keep_freed_memory: let glibc keep what a forward pass frees, for the next one.

On the CPU torch allocates every activation anew. By default glibc gives blocks of this size back to
the system at once, and each is then filled with fresh pages, a fault for every 4 kB: measured on a
ResNet-20, up to twice the time of the forward pass, differently from run to run. With these limits
freed blocks stay in the process (up to `KEPT_BYTES`) and the time is steady.

It holds for the whole process and changes no number. `COAR_KEEP_MEMORY=0` switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

KEPT_BYTES = 2**31 - 1  # the largest that mallopt takes
MMAP_THRESHOLD_BYTES = 32 * 2**20  # the largest that glibc takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of the settings in malloc.h


@functools.cache
def keep_freed_memory() -> bool:
    """Set it, once per process; returns whether it is set (glibc on Linux, and not switched off)."""
    if not sys.platform.startswith("linux") or os.environ.get("COAR_KEEP_MEMORY") == "0":
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        kept = library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        return bool(kept and library.mallopt(_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))
    except (OSError, AttributeError):  # another C library
        return False
