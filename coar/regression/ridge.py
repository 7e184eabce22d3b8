"""Ridge regression for thousands of columns that share one design.

Objective, per column, on standardised masks x (mean 0, deviation 1):

    (1 / 2 rows) |y - x w - b|^2 + (penalty / 2) |w|^2

The penalty is chosen per column by generalised cross-validation, from the statistics alone, or by exact
leave-one-row-out errors, which takes a second pass over the rows. Weights come back in output units
per component kept. Which algorithm solves it does not change the answer for one penalty; with several,
conjugate gradients choose on held-out rows instead:

    eigen               one eigendecomposition for all penalties; exact leave-one-out
    cholesky            a factor per penalty: the fastest for one to three
    dual                rows x rows instead of components x components: for few rows
    conjugate_gradient  nothing of either size in memory: for very many components
"""

from __future__ import annotations

from coar.regression.algorithms import Fitter, choose, without_factors
from coar.regression.cholesky import IllConditionedError
from coar.regression.doubts import say
from coar.regression.problem import Problem
from coar.regression.ridge_settings import RidgeSettings


class Ridge(RidgeSettings):
    """Ridge regression; the default solver.

    Args:
        penalties: candidates, or one number; on standardised masks, so 1 is as strong as the data.
        choose: how each column picks its penalty: "gcv" (no second pass) or "loo" (exact, slower).
            Conjugate gradients know neither and choose on held-out rows.
        errors: also compute standard errors (for the penalty chosen, noise of one size per column).
        algorithm: "auto" chooses from the sizes and the memory at hand.
        tolerance: of conjugate gradients: size of the residual relative to the right-hand side.
        max_iterations: of conjugate gradients.
        held_out: of conjugate gradients with several penalties: every how manyth row chooses.

    >>> Ridge(penalties=0.5).grid
    (0.5,)
    """

    def prepare(self, problem: Problem) -> Fitter:
        """Do the work shared by all columns.

        Raises:
            FitError: a penalty of 0 where the masks do not determine every weight; too little memory.
        """
        chosen = choose(self, problem)
        try:
            fitter = chosen.make(self, problem)
        except IllConditionedError as error:
            if self.algorithm != "auto":
                raise
            chosen = without_factors(self, problem, error.what)
            fitter = chosen.make(self, problem)
        if self.algorithm == "auto" and chosen.algorithm == "conjugate_gradient" and len(self.grid) > 1:
            say("conjugate gradients choose the penalty on held-out rows, not by GCV, and give no errors")
        fitter.notes["why"] = chosen.why
        return fitter
