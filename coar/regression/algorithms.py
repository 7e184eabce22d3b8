"""Which algorithm solves a ridge problem: from its size and the memory at hand, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from coar.attribution_blocks import Block
from coar.errors import FitError
from coar.plan import size
from coar.regression.cholesky import CholeskyFitter
from coar.regression.eigen import EigenFitter
from coar.regression.problem import Problem
from coar.regression.ridge_settings import RidgeSettings

FEW = 3  # penalties; beyond, one eigendecomposition is faster than as many factors and inverses
# Bytes per entry of a components x components matrix at the peak: X'X in int32 and, in float64, the
# matrix, its eigenvectors and twice as much work space. Factors can do with float32.
_EIGEN_BYTES = 36


class Fitter(Protocol):
    """A solver that has seen the design.

    Attributes:
        notes: what was chosen and why; plain JSON, for the provenance.
    """

    notes: dict[str, Any]

    def fit(self, columns: slice) -> Block:
        """Fit some columns; `start` of the block is that of the slice."""


@dataclass(frozen=True)
class Choice:
    """An algorithm, what makes its fitter, and why it was chosen."""

    algorithm: str
    make: Callable[[RidgeSettings, Problem], Fitter]
    why: str


def choose(settings: RidgeSettings, problem: Problem) -> Choice:
    """Choose the algorithm for a problem.

    Raises:
        FitError: exact leave-one-out does not fit into the memory.
    """
    asked = settings.algorithm
    name, why = _automatic(settings, problem) if asked == "auto" else (asked, "as asked")
    return Choice(name, _fitter(name), why)


def _automatic(settings: RidgeSettings, problem: Problem) -> tuple[str, str]:
    rows, components = problem.num_rows, problem.num_components
    eigen, cholesky = memory_needed(settings, components)
    budget = f"a budget of {size(problem.budget)}"
    if settings.choose == "loo":
        if eigen > problem.budget:
            raise FitError(
                "exact leave-one-out errors need an eigendecomposition that does not fit",
                expected=f"a budget of {size(eigen)}",
                got=budget,
                todo='use choose="gcv"',
            )
        return "eigen", "exact leave-one-out errors need the eigenvectors"
    if 2 * rows < components and (_EIGEN_BYTES * rows + 16 * components) * rows <= problem.budget:
        return "dual", f"{rows} rows are fewer than half of {components} components"
    count = "1 penalty" if len(settings.grid) == 1 else f"{len(settings.grid)} penalties"
    if len(settings.grid) <= FEW and cholesky <= problem.budget:
        return "cholesky", f"{count}; {size(cholesky)} fit into {budget}"
    if eigen <= problem.budget:
        return "eigen", f"{count}; {size(eigen)} fit into {budget}"
    if cholesky <= problem.budget:
        return "cholesky", f"eigenvectors ({size(eigen)}) do not fit into {budget}, factors do"
    need = size(min(eigen, cholesky))
    return "conjugate_gradient", f"{components} x {components} matrices ({need}) do not fit into {budget}"


def without_factors(settings: RidgeSettings, problem: Problem, reason: str) -> Choice:
    """What to take where a Cholesky factor would lose too many digits."""
    eigen, _ = memory_needed(settings, problem.num_components)
    name = "eigen" if eigen <= problem.budget else "conjugate_gradient"
    return Choice(name, _fitter(name), f"not by Cholesky factors: {reason}")


def memory_needed(settings: RidgeSettings, components: int) -> tuple[int, int]:
    """Bytes at the peak for all matrices, by eigendecomposition and by Cholesky factors in float32."""
    inverse = settings.errors or len(settings.grid) > 1
    return _EIGEN_BYTES * components**2, 4 * (3 + len(settings.grid) + inverse) * components**2


def _fitter(name: str) -> Callable[[RidgeSettings, Problem], Fitter]:
    if name == "eigen":
        return EigenFitter
    if name == "cholesky":
        return CholeskyFitter
    if name == "dual":
        from coar.regression.dual import DualFitter

        return DualFitter
    from coar.regression.conjugate_gradient import ConjugateGradientFitter

    return ConjugateGradientFitter
