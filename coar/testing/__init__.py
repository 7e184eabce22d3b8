"""Contract suites for experiments, components and executors, one's own included, and toy experiments.

The suites raise AssertionError with what was expected and got; call them from a test:

>>> experiment, weights = linear_experiment()
>>> check_experiment(experiment)
"""

from coar.testing.components import check_components
from coar.testing.experiments import check_executor, check_experiment
from coar.testing.rebuilds import zeroed
from coar.testing.toys import (
    LinearSum,
    SubsetMean,
    linear_experiment,
    linear_task,
    residual_experiment,
    score,
)

__all__ = [
    "LinearSum",
    "SubsetMean",
    "check_components",
    "check_executor",
    "check_experiment",
    "linear_experiment",
    "linear_task",
    "residual_experiment",
    "score",
    "zeroed",
]
