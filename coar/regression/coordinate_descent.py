"""Lazy covariance coordinate descent for many LASSO columns that share one design (CPU, needs numba).

Per column, on standardised masks with correlation matrix G and covariance c:

    1/2 w'Gw - c'w + l1 |w|_1 + l2 / 2 |w|^2

Kept up to date: the residual correlation r = c - Gw. A sweep visits every coordinate and changes w_j only
if its optimality condition is violated by more than the tolerance; a change costs one row of G. A sweep
that changes nothing is the proof that no condition is violated by more. `coar.regression.coordinate_kernels`
has the loops, on G in tiles; columns run in blocks of `BLOCK`, blocks in threads.
"""

from __future__ import annotations

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

BLOCK = 64  # columns that share tiles in the cache


def available() -> bool:
    """Whether numba is installed, and can be imported."""
    return not why_not()


@functools.cache
def why_not() -> str:
    """Why numba cannot be used, "" if it can; tried once, as another numpy than it knows breaks it."""
    try:
        importlib.import_module("numba")
    except ModuleNotFoundError as error:
        missing = "numba is not installed"
        return missing if error.name == "numba" else f"numba cannot be imported ({error})"
    except Exception as error:  # whatever a broken installation raises
        text = " ".join(str(error).split())[:200]
        return f"numba cannot be imported ({type(error).__name__}: {text})"
    return ""


class Tiles:
    """A symmetric matrix cut into square tiles, float32; the last ones are filled up with zeros.

    Args:
        matrix: float32 [components, components].
    """

    def __init__(self, matrix: np.ndarray) -> None:
        from coar.regression.coordinate_kernels import SIZE

        count = -(-len(matrix) // SIZE)
        self.tiles: np.ndarray = np.zeros((count, count, SIZE, SIZE), np.float32)
        for i in range(count):
            for j in range(count):
                part = matrix[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE]
                self.tiles[i, j, : part.shape[0], : part.shape[1]] = part


def descend(
    gram: np.ndarray | Tiles,
    weights: np.ndarray,
    residual: np.ndarray,
    l1: np.ndarray,
    l2: np.ndarray,
    tolerance: np.ndarray,
    max_sweeps: int,
    second: tuple[np.ndarray | Tiles, np.ndarray] | None = None,
    chosen: np.ndarray | None = None,
) -> np.ndarray:
    """Minimise the objective of some columns, from the weights given.

    Args:
        gram: float32 [components, components], symmetric, ones on the diagonal; `Tiles` of it save time.
        weights: float32 [columns, components]; changed in place.
        residual: float32 [columns, components], c - G w; changed in place.
        l1: float32 [columns].
        l2: float32 [columns].
        tolerance: float32 [columns], of the optimality conditions.
        max_sweeps: at most.
        second: another matrix and its residual, brought up to date at the end.
        chosen: positions of the columns to work on; None for all.

    Returns:
        Sweeps of each chosen column, int64; `max_sweeps + 1` where they did not suffice.
    """
    from coar.regression.coordinate_kernels import solve, subtract_product

    chosen = np.arange(len(weights)) if chosen is None else chosen.astype(np.int64)
    tiles, others = _tiles(gram), _tiles(second[0]) if second else None
    penalties = np.stack([l1, l2, tolerance]).astype(np.float32)
    sweeps = np.zeros(len(chosen), np.int64)

    def block(start: int) -> None:
        here = chosen[start : start + BLOCK]
        before = weights[here] if second else None
        solve(tiles, weights, residual, penalties, here, max_sweeps, sweeps[start : start + BLOCK])
        if second and before is not None:
            subtract_product(others, weights[here] - before, second[1], here)

    starts = range(0, len(chosen), BLOCK)
    if torch.get_num_threads() == 1 or len(starts) == 1:
        for start in starts:
            block(start)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(block, starts))
    return sweeps


def _tiles(matrix: np.ndarray | Tiles) -> Any:
    return (matrix if isinstance(matrix, Tiles) else Tiles(matrix)).tiles
