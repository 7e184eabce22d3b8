"""FFCV's `.beton` files, version 2, in NumPy alone: numbers and arrays, no images.

    header      version u2, fields u2, page size u4, samples u8, start of the last part u8
    fields      each: type u1, name 16 bytes, arguments 1024 bytes
    samples     each: one u8 per field: the number itself, or where in the file the array is
    pages       the arrays; those of one sample lie in one page
    table       for each array: sample u8, where u8, bytes u8

All little-endian; pages start at a multiple of the page size. The arguments of an array are its
shape (32 x u8, zeros behind the last), the length of a text (u8) and the text: its type as JSON.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

import numpy as np

VERSION = 2
HEADER = struct.Struct("<HHIQQ")
FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
TABLE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])
FLOAT, INT, ARRAY, TENSOR = 0, 1, 4, 6
OTHERS = {2: "an image", 3: "bytes", 5: "JSON", 255: "a type of its own"}
PAGE = 2**23  # FFCV's own choice; larger only where a sample is
MAX_PAGE = 2**31
SHAPE_BYTES = 8 * 32
TYPE = re.compile(r"[<|](b1|[iu][1248]|f[248])")


@dataclass(frozen=True)
class BetonField:
    """What a field holds: numbers (shape (), int64 or float64) or arrays of one shape and type."""

    dtype: np.dtype
    shape: tuple[int, ...] = ()

    @property
    def is_array(self) -> bool:
        """Whether it lies in the pages."""
        return bool(self.shape)

    @property
    def size(self) -> int:
        """Bytes of one sample in the pages."""
        return math.prod(self.shape) * self.dtype.itemsize if self.is_array else 0
