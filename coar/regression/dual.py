"""Ridge regression in its dual form: [rows, rows] instead of [components, components], for few rows.

With standardised masks x, the matrix K = x x' / rows = U diag(e) U' has the eigenvalues of the
correlation matrix G = x' x / rows that are not 0, and G's eigenvectors are

    Q = x' U diag(rows e)^(-1/2)

So only the decomposition differs from `coar.regression.eigen`; choice of penalty, weights, R2 and
standard errors are the same algebra (`coar.regression.spectrum`) on fewer directions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from coar.regression.eigen import EigenFitter, decompose
from coar.regression.problem import PackedMasks
from coar.regression.products import add_counts, mirror
from coar.regression.spectrum import RANK_TOLERANCE
from coar.regression.statistics import MaskCounts

_COMPONENTS = 4096  # unpacked at a time; a multiple of 8


class DualFitter(EigenFitter):
    """Fits blocks of columns in as many directions as there are rows, at most.

    Args:
        settings: penalties, and how a column chooses its own.
        problem: the rows.

    Raises:
        FitError: a penalty of 0 where the masks do not determine every weight.
    """

    algorithm = "dual"

    def _decomposed(self) -> tuple[np.ndarray, np.ndarray, int]:
        found = directions(self.problem.packed(), self.problem.counts(), self.problem.device)
        return *found, 0  # constant components have no direction here


def directions(
    packed: PackedMasks, counts: MaskCounts, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the correlation matrix that are not 0, and their eigenvectors.

    Returns:
        values: [directions].
        vectors: [components, directions], float64; rows of constant components are 0.

    >>> masks = np.random.default_rng(0).random((4, 30)) < 0.5
    >>> packed = PackedMasks(np.packbits(masks, axis=1, bitorder="little"), 30)
    >>> values, vectors = directions(packed, MaskCounts(4, masks.sum(axis=0)), torch.device("cpu"))
    >>> values.shape, vectors.shape
    ((3,), (30, 3))
    """
    values, left = decompose(kernel(packed, counts, device), device)
    varies = values > RANK_TOLERANCE * values.max(initial=1e-300)
    values, left = values[varies], left[:, varies]
    left /= np.sqrt(counts.rows * values)
    vectors = np.empty((packed.num_components, len(values)))
    inverse = 1.0 / np.where(counts.constant, np.inf, counts.deviation)
    for here, masks in _component_blocks(packed):
        np.matmul((masks - counts.mean[here]).T, left, out=vectors[here])
        vectors[here] *= inverse[here, None]
    return values, vectors


def kernel(packed: PackedMasks, counts: MaskCounts, device: torch.device) -> np.ndarray:
    """K = x x' / rows, float64 [rows, rows]; constant components are left out.

    Components that are kept equally often have the same deviation: K is a sum of exact products, one
    for each number of times, divided once by the variance that belongs to it and centred at the end.
    """
    shape = (packed.rows, packed.rows)
    found = torch.zeros(shape, dtype=torch.float64, device=device)
    for here in _equally_often(counts):
        gram = torch.zeros(shape, dtype=torch.int32, device=device)
        for some in np.split(here, range(_COMPONENTS, len(here), _COMPONENTS)):
            add_counts(_masks_of(packed, some).to(device), gram)
        found += gram.double().div_(counts.deviation[here[0]] ** 2)
    mirror(found)
    mean = found.mean(dim=0)
    found += mean.mean() - mean - mean[:, None]
    return (found / packed.rows).cpu().numpy()


def _equally_often(counts: MaskCounts) -> list[np.ndarray]:
    """Positions of the components that vary, in sets of equal counts."""
    varying = np.flatnonzero(~counts.constant)
    order = varying[np.argsort(counts.counts[varying], kind="stable")]
    sets = np.split(order, np.flatnonzero(np.diff(counts.counts[order])) + 1)
    return [components for components in sets if len(components)]


def _masks_of(packed: PackedMasks, components: np.ndarray) -> torch.Tensor:
    """Masks of these components, turned: int8 [components, rows]."""
    bits = packed.bits[:, components // 8].T >> (components % 8).astype(np.uint8)[:, None]
    return torch.from_numpy(np.ascontiguousarray(bits & 1)).view(torch.int8)


def _component_blocks(packed: PackedMasks) -> Iterator[tuple[slice, np.ndarray]]:
    """Masks of some components at a time, bool [rows, k]."""
    for start in range(0, packed.num_components, _COMPONENTS):
        stop = min(start + _COMPONENTS, packed.num_components)
        bits = packed.bits[:, start // 8 : (stop + 7) // 8]
        masks = np.unpackbits(bits, axis=1, count=stop - start, bitorder="little")
        yield slice(start, stop), masks.view(bool)
