"""Synthetic rows with the shape of component datasets: a 0/1 design, outputs almost linear in it."""

from __future__ import annotations

import numpy as np

KEEP = 0.9  # share of components kept in a row
MEAN = 6.0  # of the outputs, as of margins
TAIL_SHARE = 0.05  # of the weights, far larger than the others
PAIR_SHARE = 0.1  # of the variance: products of two masks
NUM_PAIRS = 200


def coar_like(rows: int, components: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw masks and outputs.

    Many small weights and a few large ones, on components of which some matter to all columns; a linear
    share of 0.3 to 0.7 of the variance, a tenth of it interactions of pairs, the rest noise; rounded to
    float16, as stores keep outputs.

    Returns:
        masks bool [rows, components], True = kept; outputs float32 [rows, columns].

    >>> masks, outputs = coar_like(50, 20, 3, seed=0)
    >>> masks.shape, outputs.shape, outputs.dtype
    ((50, 20), (50, 3), dtype('float32'))
    """
    rng = np.random.default_rng(seed)
    masks = rng.random((rows, components), dtype=np.float32) < KEEP
    standard = (masks.astype(np.float32) - np.float32(KEEP)) / np.float32(np.sqrt(KEEP * (1 - KEEP)))
    share = rng.uniform(0.3, 0.7, columns)  # of the variance that is linear
    linear = _unit_variance(standard @ _weights(rng, components, columns))
    pairs = rng.integers(components, size=(2, NUM_PAIRS))
    products = standard[:, pairs[0]] * standard[:, pairs[1]]
    together = _unit_variance(products @ rng.standard_normal((NUM_PAIRS, columns), dtype=np.float32))
    outputs = rng.standard_normal((rows, columns), dtype=np.float32)
    outputs *= np.sqrt(1 - PAIR_SHARE - share).astype(np.float32)
    outputs += linear * np.sqrt(share).astype(np.float32)
    outputs += together * np.float32(np.sqrt(PAIR_SHARE))
    outputs += np.float32(MEAN) + rng.standard_normal(columns, dtype=np.float32)
    return masks, outputs.astype(np.float16).astype(np.float32)


def _weights(rng: np.random.Generator, components: int, columns: int) -> np.ndarray:
    """float32 [components, columns]."""
    importance = rng.lognormal(sigma=0.5, size=(components, 1))
    small = rng.normal(scale=0.3, size=(components, columns))
    large = rng.standard_t(3, size=(components, columns)) * (rng.random((components, columns)) < TAIL_SHARE)
    return (importance * (small + 2.0 * large)).astype(np.float32)


def _unit_variance(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=0)) / values.std(axis=0)
