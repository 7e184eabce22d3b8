"""Conjugate gradients (Hestenes and Stiefel 1952) for many right-hand sides of one matrix at once.

(G + penalty) w = c, each column with a penalty of its own; columns that are done leave. For masks drawn
independently the eigenvalues of G fill the interval of Marchenko and Pastur, whatever the model:
`expected_iterations` needs no more than the numbers of rows and components. For the same reason there
is nothing to gain from a preconditioner beyond the standardisation of the masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coar.errors import FitError

Multiply = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        weights: float64 [components, columns].
        remainder: float64 [components, columns]: c - (G + penalty) weights, computed anew at the end.
        residual: |remainder| / |c| per column, [columns].
        iterations: int64 [columns].
    """

    weights: np.ndarray
    remainder: np.ndarray
    residual: np.ndarray
    iterations: np.ndarray


def joined(parts: Sequence[Solution]) -> Solution:
    """The solutions of some columns, and those of the columns that follow."""
    arrays = zip(*(vars(part).values() for part in parts), strict=True)
    return Solution(*(np.concatenate(list(array), axis=-1) for array in arrays))


def expected_iterations(components: int, rows: int, penalty: float, tolerance: float) -> int:
    """Iterations for independent masks: sqrt(condition) / 2 * log(2 / tolerance).

    The condition is that of the Marchenko-Pastur interval (1 -+ sqrt(components / rows))^2, without
    the eigenvalues of 0 where rows are fewer: nothing in c points there.

    >>> expected_iterations(22_720, 30_000, penalty=0.05, tolerance=1e-4)
    37
    """
    ratio = math.sqrt(components / rows)
    largest, smallest = (1.0 + ratio) ** 2 + penalty, (1.0 - ratio) ** 2 + penalty
    condition = largest / max(smallest, 1e-12 * largest)
    return math.ceil(0.5 * math.sqrt(condition) * math.log(2.0 / tolerance))


def solve(
    correlation: Multiply,
    right: np.ndarray,
    penalty: float | np.ndarray,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 1000,
    start: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Solution:
    """Solve (G + penalty) w = c for many columns; those that are done leave.

    Args:
        correlation: v -> G v on float64 tensors [components, columns].
        right: c, float64 [components, columns].
        penalty: one for all, or [columns].
        tolerance: a column is done when |c - (G + penalty) w| <= tolerance |c|.
        max_iterations: columns that are not done by then come back as they are.
        start: first guess, [components, columns]; default c / (1 + penalty), right for G = 1.
        device: of the tensors.

    Raises:
        FitError: NaN, infinite numbers, or an iteration that breaks down.
    """
    target = _moved(right, device)
    strength = _moved(np.broadcast_to(penalty, target.shape[1]), device)
    weights = target / (1.0 + strength) if start is None else _moved(start, device).clone()
    size = target.square().sum(dim=0)
    _require_finite(size, np.arange(len(size)))
    remainder = target - correlation(weights) - strength * weights
    columns = _Columns(weights, remainder, strength, size * tolerance**2)
    iterations = _iterate(columns, correlation, weights, max_iterations)
    remainder = target - correlation(weights) - strength * weights
    residual = remainder.norm(dim=0) / torch.where(size > 0, size.sqrt(), 1.0)
    return Solution(
        weights.cpu().numpy(), remainder.cpu().numpy(), residual.cpu().numpy(), iterations.cpu().numpy()
    )


def _iterate(
    columns: _Columns, correlation: Multiply, weights: torch.Tensor, max_iterations: int
) -> torch.Tensor:
    """Write weights as columns are done; return how many iterations each took."""
    iterations = torch.full((weights.shape[1],), max_iterations, device=weights.device)
    for iteration in range(max_iterations):
        _require_finite(columns.squares, columns.numbers.cpu().numpy())
        done = columns.squares <= columns.limit
        if bool(done.any()):
            here = columns.numbers[done]
            weights[:, here], iterations[here] = columns.weights[:, done], iteration
            columns.keep(~done)
        if not len(columns.numbers):
            return iterations
        columns.step(correlation(columns.direction))
    _require_finite(columns.squares, columns.numbers.cpu().numpy())
    weights[:, columns.numbers] = columns.weights
    return iterations


class _Columns:
    """Columns that are still being solved: tensors [components, columns] and [columns]."""

    def __init__(
        self, weights: torch.Tensor, remainder: torch.Tensor, strength: torch.Tensor, limit: torch.Tensor
    ) -> None:
        self.numbers = torch.arange(weights.shape[1], device=weights.device)
        self.weights, self.remainder, self.direction = weights.clone(), remainder, remainder.clone()
        self.strength, self.limit = strength, limit
        self.squares = remainder.square().sum(dim=0)  # |remainder|^2

    def step(self, image: torch.Tensor) -> None:
        """One iteration, given G direction; overwrites it."""
        image += self.direction * self.strength
        length = self.squares / (self.direction * image).sum(dim=0)
        self.weights += self.direction * length
        self.remainder -= image.mul_(length)
        squares = self.remainder.square().sum(dim=0)
        self.direction.mul_(squares / self.squares).add_(self.remainder)
        self.squares = squares

    def keep(self, here: torch.Tensor) -> None:
        """Go on with these alone."""
        for name in ("numbers", "strength", "limit", "squares"):
            setattr(self, name, getattr(self, name)[here])
        for name in ("weights", "remainder", "direction"):
            setattr(self, name, getattr(self, name)[:, here].contiguous())


def _moved(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.require(values, np.float64, ["C", "W"])).to(device)


def _require_finite(squares: torch.Tensor, numbers: np.ndarray) -> None:
    finite = torch.isfinite(squares).cpu().numpy()
    if not finite.all():
        raise FitError(
            f"conjugate gradients: column {numbers[~finite][0]} of the block is not finite",
            expected="finite outputs, and a penalty above 0 where the masks do not determine every weight",
            got=f"NaN or infinity in {int((~finite).sum())} columns",
        )
