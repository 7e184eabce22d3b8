"""The compiled loops of `coar.regression.coordinate_descent`, which imports them when it needs them.

A sweep takes the coordinates in blocks. Within a block, coordinate descent touches a piece of the residual
and one tile of G, both in the fastest cache. What the block has changed is then subtracted from the rest
of the residual, four coordinates at a time: each number of the residual is loaded and stored once for four
changes, not once for each. A tile is used by many columns before the next is read. The order of the
arithmetic within a column does not depend on the columns beside it, so neither do the bits of its solution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

SIZE = 256  # coordinates of a block; a tile takes 256 KiB
ZERO = np.float32(0.0)
# Not "nnan", "ninf": what is not finite must stay visible.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call; the machine code is kept, if there is a folder that may be written to."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST, cache=True)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache
        return numba.njit(nogil=True, fastmath=_FAST)(function)


@_compiled
def _subtract_one(step: Any, row: Any, target: Any) -> None:
    if len(target) == SIZE:  # most are: a loop of known length needs no care for its end
        for j in range(SIZE):
            target[j] -= step * row[j]
    else:
        for j in range(len(target)):
            target[j] -= step * row[j]


@_compiled
def _subtract_four(
    s0: Any, row0: Any, s1: Any, row1: Any, s2: Any, row2: Any, s3: Any, row3: Any, target: Any
) -> None:
    if len(target) == SIZE:
        for j in range(SIZE):
            target[j] -= s0 * row0[j] + s1 * row1[j] + s2 * row2[j] + s3 * row3[j]
    else:
        for j in range(len(target)):
            target[j] -= s0 * row0[j] + s1 * row1[j] + s2 * row2[j] + s3 * row3[j]


@_compiled
def _subtract(tile: Any, steps: Any, rows: Any, target: Any) -> None:
    """Subtract steps @ tile[rows] from the target."""
    k = 0
    while k + 4 <= len(steps):
        a, b, c, d = tile[rows[k]], tile[rows[k + 1]], tile[rows[k + 2]], tile[rows[k + 3]]
        _subtract_four(steps[k], a, steps[k + 1], b, steps[k + 2], c, steps[k + 3], d, target)
        k += 4
    while k < len(steps):
        _subtract_one(steps[k], tile[rows[k]], target)
        k += 1


@_compiled
def _pack(change: Any, order: Any, steps: Any, positions: Any) -> Any:
    """Collect what is not 0; its number."""
    found = 0
    for j in range(len(change)):
        order[found] = j
        found += change[j] != ZERO
    for k in range(found):
        positions[k], steps[k] = order[k], change[order[k]]
    return found


@_compiled
def _misses(w: Any, r: Any, l1: Any, curvature: Any, tolerance: Any, missed: Any) -> Any:
    """Mark coordinates that violate their optimality condition by more than the tolerance; their number."""
    found = 0
    for j in range(len(w)):
        left = r[j] + w[j]
        target = left - max(min(left, l1), -l1)
        off = abs(target - curvature * w[j])
        # A weight with the wrong sign violates by l1 and more, however small it is.
        crosses = ((target > ZERO) != (w[j] > ZERO)) | ((target < ZERO) != (w[j] < ZERO))
        miss = (off > tolerance) | (crosses & (w[j] != ZERO))
        missed[j] = miss
        found += miss
    return found


@_compiled
def _settle(tile: Any, w: Any, r: Any, penalties: Any, missed: Any, order: Any, moved: Any) -> Any:
    """Coordinate descent within a block; `moved` is what was added to w. Whether there was anything to do."""
    l1, curvature, tolerance = penalties[0], np.float32(1.0) + penalties[1], penalties[2]
    if not _misses(w, r, l1, curvature, tolerance, missed):
        return False
    moved[:] = ZERO
    found = 0
    for j in range(len(w)):  # positions of what is missed, without a branch
        order[found] = j
        found += missed[j]
    for j in order[:found]:
        left = r[j] + w[j]
        new = (left - max(min(left, l1), -l1)) / curvature
        moved[j] = new - w[j]
        w[j] = new
        _subtract_one(moved[j], tile[j], r)
    return True


@_compiled
def solve(  # noqa: D103 - described by its arguments
    tiles: Any,  # float32 [blocks, blocks, size, size]; the diagonal of G is 1
    weights: Any,  # float32 [columns, components]; changed
    residual: Any,  # the same
    penalties: Any,  # float32 [3, columns]: l1, l2, tolerance
    chosen: Any,  # int64 [k], columns to solve
    max_sweeps: Any,
    sweeps: Any,  # int64 [k], written: max_sweeps + 1 where they were not enough
) -> None:
    size, count = SIZE, len(chosen)
    missed, order = np.empty(size, np.uint8), np.empty(size + 1, np.int64)
    moved = np.empty(size, np.float32)
    changes, positions = np.empty((count, size), np.float32), np.empty((count, size), np.int64)
    counts, wanted, live = np.empty(count, np.int64), np.empty(count, np.int64), np.arange(count)
    changed = np.empty(count, np.bool_)
    for _ in range(max_sweeps):
        changed[:] = False
        for block in range(len(tiles)):
            here = slice(block * size, min(weights.shape[1], (block + 1) * size))
            some = 0
            for k in live:
                column = chosen[k]
                w, r = weights[column, here], residual[column, here]
                if _settle(tiles[block, block], w, r, penalties[:, column], missed, order, moved):
                    counts[some] = _pack(moved[: len(w)], order, changes[some], positions[some])
                    wanted[some], changed[k] = column, True
                    some += 1
            for other in range(len(tiles)):
                if other != block:
                    there = slice(other * size, min(weights.shape[1], (other + 1) * size))
                    for m in range(some):
                        steps, rows = changes[m, : counts[m]], positions[m, : counts[m]]
                        _subtract(tiles[block, other], steps, rows, residual[wanted[m], there])
        sweeps[live] += 1
        live = live[changed[live]]
        if not len(live):
            break
    sweeps[live] = max_sweeps + 1


@_compiled
def subtract_product(tiles: Any, change: Any, image: Any, chosen: Any) -> None:
    """image[chosen] -= change @ matrix; change float32 [k, components], image [columns, components]."""
    size, count, width = SIZE, len(chosen), change.shape[1]
    order = np.empty(size + 1, np.int64)
    changes, positions = np.empty((count, size), np.float32), np.empty((count, size), np.int64)
    counts = np.empty(count, np.int64)
    for block in range(len(tiles)):
        for k in range(count):
            part = change[k, block * size : min(width, (block + 1) * size)]
            counts[k] = _pack(part, order, changes[k], positions[k])
        for other in range(len(tiles)):
            there = slice(other * size, min(width, (other + 1) * size))
            for k in range(count):
                steps, rows = changes[k, : counts[k]], positions[k, : counts[k]]
                _subtract(tiles[block, other], steps, rows, image[chosen[k], there])
