"""LASSO and elastic net for thousands of columns that share one design.

Objective, per column, on standardised masks x (mean 0, deviation 1), as in scikit-learn:

    (1 / 2 rows) |y - x w - b|^2 + penalty (l1_ratio |w|_1 + (1 - l1_ratio) / 2 |w|^2)

Each column walks down its own path of penalties, from the one that leaves no weight (`penalty_max`), with
warm starts; the penalty with the smallest error on held-out rows is chosen, and the column is fitted again
to all rows. Columns that get worse leave early. Every step works on the sums of `coar.regression.statistics`,
the held-out error, too: no row is read twice, and memory does not grow with their number.

The published work fits datamodels this way (arXiv 2202.00622, section 3); COAR (arXiv 2404.11534, section 3)
takes a penalty of 0.
"""

from __future__ import annotations

from coar.errors import MissingDependencyError
from coar.regression.coordinate_descent import available, why_not
from coar.regression.lasso_path import LassoFitter, Solve
from coar.regression.lasso_settings import LassoSettings
from coar.regression.problem import Problem


class Lasso(LassoSettings):
    """LASSO, or elastic net, with the penalty chosen per column on held-out rows.

    Args:
        penalties: absolute penalties that all columns try (one: no rows are held out); None for a path of
            `num_penalties`, from each column's own `penalty_max` down to `smallest` times it.
        num_penalties: length of that path.
        smallest: last penalty of that path, relative to the first.
        l1_ratio: share of the absolute values in the penalty; 1 is the LASSO, less an elastic net.
        held_out: every how manyth row, by its number, chooses the penalty.
        patience: a column leaves the path after so many worse penalties in a row; None: never.
        tolerance: of the optimality conditions on the path, relative to `penalty_max`.
        refit_tolerance: the same of the fit to all rows.
        max_sweeps: over all components, or iterations of FISTA (times ten), for one penalty.
        algorithm: "coordinate_descent" (CPU, needs numba), "fista", or "auto": the former where it can run.

    No standard errors are claimed. Figures per column: penalty, held_out_error (mean square), r2, kkt
    (largest violation of the optimality conditions, relative to `penalty_max`), sweeps, nonzeros.

    >>> Lasso(l1_ratio=0.5).num_penalties
    50
    """

    def prepare(self, problem: Problem) -> LassoFitter:
        """Make the matrices that all columns share.

        Raises:
            FitError: they do not fit into the memory to plan with, or too few rows are held out.
            MissingDependencyError: coordinate descent where numba is missing, or broken.
        """
        return LassoFitter(self, problem, *self._solver(problem))

    def _solver(self, problem: Problem) -> tuple[Solve, str]:
        on_cpu = problem.device.type == "cpu"
        if self.algorithm == "fista":
            return Solve("fista", problem.device), "as asked"
        asked = self.algorithm == "coordinate_descent"
        if (on_cpu or asked) and available():
            return Solve("coordinate_descent", problem.device), "as asked" if asked else "numba is installed"
        reason = why_not() or "numba is not installed"
        if asked:
            raise MissingDependencyError(
                "coordinate descent needs numba",
                expected="numba, which compiles it",
                got=reason,
                todo="pip install numba (--upgrade if it is there), or algorithm='fista'",
            )
        return Solve("fista", problem.device), reason if on_cpu else "on a GPU"
