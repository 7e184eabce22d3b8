"""Exact products of 0/1 masks with each other and with outputs, at the speed of int8 arithmetic.

X'X counts rows: whole numbers. For X'Y the outputs of a block are first written as whole multiples
of a power of two per column (`FixedPoint`, 24 bits: rounded by at most 2**-23 of the column's
largest value in the block, as float32 would round that value). Three int8 digits of 8 bits each
then give X'Y as a sum of three int8 products with int32 sums. No sum is ever rounded, so the result
is the same bits on every processor, with any number of threads, and for any order of the rows.

Where int8 products are slow or not exact (some processors saturate), float32 and float64 products of
the same whole numbers are: also exact, and slower.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TILE = 512  # rows of a product at a time: its int32 result stays small, and X'X skips what mirrors
COLUMNS = 1024  # of a product at a time
WIDE = 256  # columns of 8 bytes a number at a time
_BITS, _BYTE = 23, 0x808080  # 2**23 is the largest whole number; _BYTE moves three digits to 0..255
_LARGEST = 0.99  # of 2**23: so that the highest digit fits, too
_SMALLEST = -900  # exponent; smaller numbers are 0


@dataclass(frozen=True)
class FixedPoint:
    """Numbers as whole multiples of a power of two, one power per column.

    Attributes:
        whole: int32 [rows, columns], below 2**23 in size.
        scale: float64 [columns], powers of two; number = whole * scale.

    >>> found = fixed_point(torch.tensor([[0.5, 3.0], [0.25, -1.0]], dtype=torch.float64))
    >>> (found.whole * found.scale).tolist()
    [[0.5, 3.0], [0.25, -1.0]]
    """

    whole: torch.Tensor
    scale: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> FixedPoint:
        return FixedPoint(self.whole[rows], self.scale)

    def digits(self) -> torch.Tensor:
        """int8 [rows, 3 * columns]: all lowest digits, then the middle ones, then the highest."""
        rows, columns = self.whole.shape
        found = torch.empty((rows, 3 * columns), dtype=torch.int8, device=self.whole.device)
        for first in range(0, columns, WIDE):
            # Each digit is a byte between -128 and 127: adding 128 to all three makes them plain bytes.
            bytes_ = (self.whole[:, first : first + WIDE] + _BYTE) ^ _BYTE
            for place, shift in enumerate((0, 8, 16)):
                start = place * columns + first
                found[:, start : start + bytes_.shape[1]] = (bytes_ >> shift).to(torch.int8)
        return found

    def total(self) -> torch.Tensor:
        """Sum over rows, float64 [columns]; exact."""
        return self._sums(lambda whole: whole) * self.scale

    def squares(self) -> torch.Tensor:
        """Sum of squares over rows, float64 [columns]; rounded once, at the end (exact to 2**17 rows)."""
        return self._sums(torch.Tensor.square_) * self.scale**2

    def _sums(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Sums over rows in int64, of some columns at a time: 8 bytes a number would be twice the block."""
        parts = self.whole.split(WIDE, dim=1)
        return torch.cat([function(part.long()).sum(dim=0) for part in parts]).double()


def fixed_point(values: torch.Tensor, shift: torch.Tensor | None = None) -> FixedPoint:
    """Round [rows, columns], less a shift [columns], to 24 bits of each column's largest value.

    A column with NaN or infinity gets a scale of NaN, and whole numbers without meaning.
    """
    whole = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    scale = torch.empty(values.shape[1], dtype=torch.float64, device=values.device)
    for first in range(0, values.shape[1], WIDE):  # float64 of some columns, never of a whole block
        some = slice(first, first + WIDE)
        part = values[:, some].double()
        part = part if shift is None else part - shift[some]
        scale[some] = _scale(part)
        whole[:, some] = (part / scale[some]).round_()
    return FixedPoint(whole, scale)


def _scale(values: torch.Tensor) -> torch.Tensor:
    low, high = values.aminmax(dim=0)
    largest = torch.maximum(-low, high) / _LARGEST
    exponent = torch.frexp(largest).exponent  # largest <= 2**exponent
    one = torch.where(largest.isfinite(), 1.0, torch.nan).to(largest)
    return torch.ldexp(one, exponent.clamp_min(_SMALLEST) - _BITS)


def add_counts(masks: torch.Tensor, gram: torch.Tensor) -> None:
    """Add X'X to the upper triangle (by tiles) of an int32 matrix.

    Args:
        masks: int8 [rows, components], 0 or 1.
        gram: int32 [components, components].
    """
    for start in range(0, masks.shape[1], TILE):
        rows = masks[:, start : start + TILE].t()
        gram[start : start + TILE, start:] += _counts(rows, masks[:, start:])


def mirror(gram: torch.Tensor) -> None:
    """Fill the lower triangle from the upper one."""
    for start in range(0, len(gram), TILE):
        stop = start + TILE
        gram[stop:, start:stop] = gram[start:stop, stop:].t()


def add_products(masks: torch.Tensor, outputs: FixedPoint, cross: torch.Tensor) -> None:
    """Add X'Y to a float64 matrix.

    Args:
        masks: int8 [rows, components], 0 or 1.
        outputs: of [rows, columns].
        cross: float64 [components, columns].
    """
    if cross.shape[1] > COLUMNS:
        for some in (slice(first, first + COLUMNS) for first in range(0, cross.shape[1], COLUMNS)):
            add_products(masks, FixedPoint(outputs.whole[:, some], outputs.scale[some]), cross[:, some])
        return
    digits = outputs.digits() if fast_int8(masks.device.type) else outputs.whole.double()
    for start in range(0, masks.shape[1], TILE):
        rows = masks[:, start : start + TILE].t()
        cross[start : start + TILE] += _whole_product(rows, digits).mul_(outputs.scale)


def _whole_product(rows: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """float64 [components, columns]: whole numbers below 2**53."""
    if digits.dtype == torch.float64:
        return rows.double() @ digits
    low, middle, high = int8_product(rows, digits).chunk(3, dim=1)
    found = high.double().mul_(256.0)
    return found.add_(middle).mul_(256.0).add_(low)


def _counts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if fast_int8(left.device.type):
        return int8_product(left, right)
    return (left.float() @ right.float()).to(torch.int32)  # exact below 2**24 rows


def int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int32 product of two int8 matrices; CUDA wants multiples of 8 (and more than 16 rows)."""
    if left.device.type != "cuda":
        return torch._int_mm(left, right)
    rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
    pad = torch.nn.functional.pad
    left = pad(left, (0, -inner % 8, 0, max(24 - rows, -rows % 8)))
    right = pad(right, (0, -columns % 8, 0, -inner % 8))
    return torch._int_mm(left.contiguous(), right.contiguous())[:rows, :columns]


@functools.cache
def fast_int8(device: str) -> bool:
    """Whether int8 products are exact here, saturation included, and faster than float64 ones."""
    try:
        return _exact(device) and _faster(device)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _exact(device: str) -> bool:
    # The values that overflow where a processor adds pairs of products in 16 bits.
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(2, (64, 96), generator=generator, dtype=torch.int8)
    digits = torch.randint(2, (96, 48), generator=generator, dtype=torch.int8) * 255 - 128
    masks[:2], digits[:, 0], digits[:, 1] = 1, -128, 127
    digits = digits.to(torch.int8)
    found = int8_product(masks.to(device), digits.to(device)).cpu()
    turned = int8_product(digits.t().to(device), masks.t().to(device)).cpu()
    expected = masks.long() @ digits.long()
    return bool(torch.equal(found.long(), expected) and torch.equal(turned.t().long(), expected))


def _faster(device: str) -> bool:
    if device != "cpu":
        return True
    masks, digits = torch.ones(256, 512, dtype=torch.int8), torch.ones(512, 768, dtype=torch.int8)
    double = torch.ones(256, 512, dtype=torch.float64), torch.ones(512, 256, dtype=torch.float64)
    return _seconds(lambda: int8_product(masks, digits)) < _seconds(lambda: double[0] @ double[1])


def _seconds(action: object) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        action()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return min(times)
