"""Products with the correlation matrix of masks, straight from packed masks: it is never formed.

With masks X of means mu and deviations D, x = (X - mu) D^-1 and G = x'x / rows,

    G v = D^-1 (X' t - mu sum(t)) / rows,   t = x v = (X - mu) D^-1 v

one block of rows at a time: unpacked once, used twice. What the masks are multiplied with is rounded
to 24 bits first (`coar.regression.products`); the products themselves are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from coar.regression.problem import PackedMasks
from coar.regression.products import FixedPoint, add_products, fixed_point
from coar.regression.statistics import MaskCounts

BLOCK_BYTES = 24 * 2**20  # of unpacked masks, and of what they see: larger arrays are new pages every time


class Correlation:
    """v -> G v for the correlation matrix G of packed masks; constant components are left out (0).

    Args:
        packed: the masks.
        counts: of the same rows.
        device: where to compute; the packed masks are kept there.

    >>> masks = np.random.default_rng(0).random((100, 3)) < 0.8
    >>> packed = PackedMasks(np.packbits(masks, axis=1, bitorder="little"), 3)
    >>> correlation = Correlation(packed, MaskCounts(100, masks.sum(axis=0)))
    >>> found = correlation(torch.eye(3, dtype=torch.float64)).numpy()
    >>> bool(np.abs(found - np.corrcoef(masks.T)).max() < 1e-6)
    True
    """

    def __init__(self, packed: PackedMasks, counts: MaskCounts, device: torch.device | str = "cpu") -> None:
        self.device, self.rows, self._packed = torch.device(device), counts.rows, packed
        inverse = 1.0 / np.where(counts.constant, np.inf, counts.deviation)
        self._mean = torch.from_numpy(counts.mean).to(self.device)
        self._inverse = torch.from_numpy(inverse).to(self.device)[:, None]
        self._bits = torch.from_numpy(packed.bits).to(self.device) if self.device.type != "cpu" else None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """G v, float64 [components, columns] as `vectors`."""
        prediction = self.prediction(vectors)
        found = torch.zeros_like(vectors)
        total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=self.device)
        for masks in self._blocks(vectors.shape[1]):
            seen = fixed_point(prediction(masks))
            total += seen.total()
            add_products(masks, seen, found)
        found -= torch.outer(self._mean, total)
        return found.mul_(self._inverse / self.rows)

    def prediction(self, weights: torch.Tensor) -> Prediction:
        """Of the centred outputs, from weights of standardised masks, float64 [components, columns]."""
        return Prediction(self._mean, weights * self._inverse)

    def _blocks(self, columns: int) -> Iterator[torch.Tensor]:
        """Masks, int8 [k, components], and few enough rows for float64 [k, columns]."""
        size = max(64, BLOCK_BYTES // max(1, self._packed.num_components, 8 * columns))
        if self._bits is None:
            for _, masks in self._packed.blocks(size):
                yield torch.from_numpy(masks).view(torch.int8)
            return
        for bits in self._bits.split(size):
            yield unpacked(bits, self._packed.num_components)


class Prediction:
    """Masks -> (masks - mean) weights, for as many blocks as there are.

    Args:
        mean: of the masks, float64 [components].
        weights: per component kept, float64 [components, columns].
    """

    def __init__(self, mean: torch.Tensor, weights: torch.Tensor) -> None:
        fixed = fixed_point(weights)
        self._weights = _Kept(fixed.whole, fixed.scale)
        self._level = mean @ (fixed.whole * fixed.scale)  # of the weights as rounded: t sums to 0

    def __call__(self, masks: torch.Tensor) -> torch.Tensor:
        """float64 [rows, columns] for masks int8 [rows, components]."""
        found = self._level.neg().repeat(len(masks), 1)
        add_products(masks.t(), self._weights, found)
        return found


class _Kept(FixedPoint):
    """Numbers that many blocks are multiplied with: their digits are made once."""

    @cached_property
    def _digits(self) -> torch.Tensor:
        return super().digits()

    def digits(self) -> torch.Tensor:
        return self._digits


def unpacked(bits: torch.Tensor, num_components: int) -> torch.Tensor:
    """Masks int8 [rows, components] of bits uint8 [rows, ceil(components / 8)], on any device.

    >>> unpacked(torch.tensor([[5, 1]], dtype=torch.uint8), 9).tolist()
    [[1, 0, 1, 0, 0, 0, 0, 0, 1]]
    """
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    masks = (bits[:, :, None] >> places) & 1
    return masks.flatten(1)[:, :num_components].contiguous().view(torch.int8)
