"""FISTA for many LASSO columns that share one design: products with G alone, in torch, on any device.

The objective is that of `coar.regression.coordinate_descent`. Accelerated proximal gradient steps (Beck and
Teboulle 2009) with momentum restarted per column when it points uphill (O'Donoghue and Candes 2015).
Columns that are done leave, so that products shrink.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coar.errors import FitError

COMPACT_SHARE = 0.8  # of the columns: below, those that are done are taken out
POWER_STEPS = 50
_MARGIN = 1.02  # over the eigenvalue found, which power iteration approaches from below
_CHECK = 8  # iterations between looks at the optimality conditions


def minimise(
    gram: np.ndarray,
    weights: np.ndarray,
    residual: np.ndarray,
    l1: np.ndarray,
    l2: np.ndarray,
    tolerance: np.ndarray,
    max_iterations: int,
    second: tuple[np.ndarray, np.ndarray] | None = None,
    chosen: np.ndarray | None = None,
    device: torch.device | None = None,
    largest: float | None = None,
) -> np.ndarray:
    """As `coar.regression.coordinate_descent.descend`, iterations instead of sweeps.

    Args:
        gram: float32 [components, components].
        weights: float32 [columns, components]; changed in place.
        residual: float32 [columns, components], c - G w; changed in place.
        l1: float32 [columns].
        l2: float32 [columns].
        tolerance: float32 [columns], of the optimality conditions.
        max_iterations: at most.
        second: another matrix, and its residual, kept up to date like the first.
        chosen: positions of the columns to work on; None for all.
        device: where to compute.
        largest: eigenvalue of G; found if None.

    Raises:
        FitError: numbers that are not finite.
    """
    chosen = np.arange(len(weights)) if chosen is None else chosen
    matrix = torch.from_numpy(gram).to(device)
    start = torch.from_numpy(weights[chosen]).to(device)
    covariance = torch.from_numpy(residual[chosen]).to(device) + start @ matrix
    own = np.stack([l1, l2, tolerance]).astype(np.float32)[:, chosen, None]
    per_column = torch.from_numpy(own).to(device)
    top = largest or largest_eigenvalue(matrix)
    run = _Run(matrix, covariance, start, per_column, top)
    try:
        iterations = run.until(max_iterations)
    except FitError:  # steps too long, if the eigenvalue was missed: row sums bound it
        top = float(matrix.abs().sum(dim=1).max())
        run = _Run(matrix, covariance, start, per_column, top)
        iterations = run.until(max_iterations)
    moved = run.weights - start
    weights[chosen] = run.weights.cpu().numpy()
    residual[chosen] = (covariance - run.weights @ matrix).cpu().numpy()
    if second is not None:
        second[1][chosen] -= (moved @ torch.from_numpy(second[0]).to(device)).cpu().numpy()
    return iterations


class _Run:
    """All columns on their way; `weights` holds the best so far."""

    def __init__(
        self, matrix: Tensor, covariance: Tensor, start: Tensor, per_column: Tensor, top: float
    ) -> None:
        l1, l2, tol = per_column
        self.matrix, self.weights = matrix, start.clone()
        self.iterations = torch.zeros(len(start), dtype=torch.int64)
        self._step = 1.0 / (_MARGIN * top + l2)
        self._all = covariance, l1, l2, tol
        self._open = torch.arange(len(start), device=start.device)

    def until(self, max_iterations: int) -> np.ndarray:
        done = 0
        while len(self._open) and done < max_iterations:
            done += self._stretch(max_iterations - done, done)
        self.iterations[self._open.cpu()] = max_iterations + 1
        return self.iterations.numpy()

    def _stretch(self, most: int, before: int) -> int:
        """Iterate the open columns until enough of them are done."""
        covariance, l1, l2, tol = (value[self._open] for value in self._all)
        step, new = self._step[self._open], self.weights[self._open]
        ahead, momentum = new, torch.ones_like(step)
        for count in range(1, most + 1):
            old = new
            gradient = ahead @ self.matrix - covariance + l2 * ahead
            new = shrunk(ahead - step * gradient, step * l1)
            restart = ((ahead - new) * (new - old)).sum(dim=1, keepdim=True) > 0
            grown = (1 + torch.sqrt(1 + 4 * momentum**2)) / 2
            factor = torch.where(restart, 0.0, (momentum - 1) / grown)
            momentum = torch.where(restart, 1.0, grown)
            ahead = new + factor * (new - old)
            if count % _CHECK and count < most:
                continue
            left = covariance - new @ self.matrix
            if not bool(torch.isfinite(left).all()):
                raise FitError(
                    "FISTA met numbers that are not finite",
                    expected="finite outputs of moderate size",
                    got="NaN or infinity in the residual",
                    todo="look at the outputs; scale them if they are larger than 1e18",
                )
            done = (violation(left, new, l1, l2) <= tol)[:, 0]
            if float(done.float().mean()) > 1 - COMPACT_SHARE or count == most:
                self.weights[self._open] = new
                self.iterations[self._open[done].cpu()] = before + count
                self._open = self._open[~done]
                return count
        return most


def shrunk(values: Tensor, threshold: Tensor) -> Tensor:
    """Soft thresholding."""
    return values.sign() * (values.abs() - threshold).clamp_min(0.0)


def violation(residual: Tensor, weights: Tensor, l1: Tensor, l2: Tensor) -> Tensor:
    """Largest violation of the optimality conditions of each column, [columns, 1].

    |r_j| <= l1 where w_j = 0, and r_j - l2 w_j = l1 sign(w_j) elsewhere.
    """
    inside = (residual.abs() - l1).clamp_min(0.0)
    moved = (residual - l2 * weights - l1 * weights.sign()).abs()
    return torch.where(weights == 0, inside, moved).amax(dim=1, keepdim=True)


def largest_eigenvalue(matrix: Tensor) -> float:
    """By power iteration from a fixed start that looks random: it is orthogonal to nothing special."""
    start = 1.0 + np.modf(np.arange(1, len(matrix) + 1) * 0.618033988749895)[0]
    vector = torch.from_numpy(start).to(matrix)[:, None]
    found = 1.0
    for _ in range(POWER_STEPS):
        product = matrix @ vector
        found = float(product.norm() / vector.norm())
        vector = product / product.norm()
    return found
