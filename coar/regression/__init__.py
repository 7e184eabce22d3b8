"""One linear model per column, from the rows of a study."""

from coar.regression.fitting import fit
from coar.regression.lasso import Lasso
from coar.regression.ridge import Ridge

__all__ = ["Lasso", "Ridge", "fit"]
