"""Memory: what a forward pass frees is kept for the next one; what does not fit runs in smaller batches.

On the CPU torch allocates every activation anew. By default glibc gives blocks of this size back to
the system at once, and each is then filled with fresh pages, a fault for every 4 kB: measured on a
ResNet-20, up to twice the time of the forward pass, differently from run to run. With these limits
freed blocks stay in the process (up to `KEPT_BYTES`) and the time is steady.

`keep_freed_memory` holds for the whole process and changes no number; `COAR_KEEP_MEMORY=0` switches it
off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from coar.errors import TaskError

T = TypeVar("T")
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


def halving(work: Callable[[int], T], batch_size: int, device: torch.device) -> T:
    """`work(batch_size)`, with half the examples at a time while memory does not suffice.

    Raises:
        TaskError: one example is too large.
    """
    while True:
        try:
            return work(batch_size)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            if batch_size == 1:
                raise TaskError(
                    f"one example does not fit into the memory of {device}",
                    got=str(error).splitlines()[0][:200],
                    todo="use a device with more memory, smaller examples, or a lower precision",
                ) from error
        # Outside the handler: the traceback holds the tensors of the failed pass.
        batch_size = max(1, batch_size // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()


_NO_MEMORY = ("can't allocate memory", "not enough memory")  # what torch's allocators of the CPU say


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)
