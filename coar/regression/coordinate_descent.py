"""Lazy covariance coordinate descent for many LASSO columns that share one design (CPU, needs numba).

Per column, on standardised masks with correlation matrix G and covariance c:

    1/2 w'Gw - c'w + l1 |w|_1 + l2 / 2 |w|^2

Kept up to date: the residual correlation r = c - Gw. A sweep visits every coordinate, skips those that are
0 and may stay so, and changes w_j only if it would move by more than the tolerance: most visits cost two
comparisons, and a change costs one row of G. A sweep that changes nothing proves that no optimality
condition is violated by more than the tolerance.

A second residual, of held-out rows, can be kept in the same loop: the held-out error is then two dot
products instead of a matrix product. Columns run in blocks of `BLOCK`, coordinate outermost, so that a row
of G is read once for all of them; blocks run in threads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

BLOCK = 16  # columns


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


def descend(
    gram: np.ndarray,
    weights: np.ndarray,
    residual: np.ndarray,
    l1: np.ndarray,
    l2: np.ndarray,
    tolerance: np.ndarray,
    max_sweeps: int,
    second: tuple[np.ndarray, np.ndarray] | None = None,
    chosen: np.ndarray | None = None,
) -> np.ndarray:
    """Minimise the objective of some columns, from the weights given.

    Args:
        gram: float32 [components, components], symmetric, ones on the diagonal.
        weights: float32 [columns, components]; changed in place.
        residual: float32 [columns, components], c - G w; changed in place.
        l1: float32 [columns].
        l2: float32 [columns].
        tolerance: float32 [columns], of the optimality conditions.
        max_sweeps: at most.
        second: another matrix, and its residual, kept up to date like the first.
        chosen: positions of the columns to work on; None for all.

    Returns:
        Sweeps of each chosen column, int64; `max_sweeps + 1` where they did not suffice.
    """
    chosen = np.arange(len(weights)) if chosen is None else chosen.astype(np.int64)
    empty: np.ndarray = np.empty((0, 0), np.float32)
    other = second or (empty, empty)
    shrink = (1.0 / (1.0 + l2)).astype(np.float32)
    sweeps = np.zeros(len(chosen), np.int64)
    kernel = _kernel()

    def block(start: int) -> None:
        here = slice(start, start + BLOCK)
        arrays = (gram, weights, residual, *other, l1, shrink, tolerance)
        kernel(*arrays, chosen[here], max_sweeps, sweeps[here])

    starts = range(0, len(chosen), BLOCK)
    if torch.get_num_threads() == 1 or len(starts) == 1:
        for start in starts:
            block(start)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(block, starts))
    return sweeps


@functools.cache
def _kernel() -> Callable[..., None]:
    """Compile once per machine (kept beside this file or in the user's cache), else once per process."""
    from numba import njit

    try:
        compiled = njit(fastmath=True, nogil=True, cache=True)(_descend)
    except RuntimeError:  # no folder to keep it in
        compiled = njit(fastmath=True, nogil=True)(_descend)
    return compiled


def _descend(
    gram: Any,
    weights: Any,
    residual: Any,
    second: Any,
    second_residual: Any,
    l1: Any,
    shrink: Any,
    tolerance: Any,
    chosen: Any,
    max_sweeps: int,
    sweeps: Any,
) -> None:
    """One block of columns; compiled."""
    size, count = gram.shape[0], len(chosen)
    with_second = second.shape[0] > 0
    active = np.arange(count)
    changed = np.zeros(count, np.bool_)
    for _ in range(max_sweeps):
        for k in range(count):
            changed[k] = False
        for j in range(size):
            row = gram[j]
            for k in range(count):
                column = chosen[active[k]]
                old, left = weights[column, j], residual[column, j]
                threshold = l1[column]
                if old == 0.0 and abs(left) <= threshold + tolerance[column]:
                    continue
                target = left + old
                new = np.float32(0.0)
                if target > threshold:
                    new = (target - threshold) * shrink[column]
                elif target < -threshold:
                    new = (target + threshold) * shrink[column]
                step = new - old
                # A weight of the wrong sign violates by l1 and more, however small it is.
                if abs(step) <= tolerance[column] * shrink[column] and (old == 0.0 or new * old > 0.0):
                    continue
                weights[column, j] = new
                changed[k] = True
                own = residual[column]
                if with_second:
                    other, other_row = second_residual[column], second[j]
                    for i in range(size):
                        own[i] -= step * row[i]
                        other[i] -= step * other_row[i]
                else:
                    for i in range(size):
                        own[i] -= step * row[i]
        kept = 0
        for k in range(count):
            sweeps[active[k]] += 1
            if changed[k]:
                active[kept] = active[k]
                kept += 1
        count = kept
        if count == 0:
            return
    for k in range(count):
        sweeps[active[k]] = max_sweeps + 1
