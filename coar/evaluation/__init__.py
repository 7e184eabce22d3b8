"""Evaluation: how well attributions predict ablations that nobody has fitted, and how well they could.

| module | what |
|---|---|
| `evaluating` | `evaluate`: held-out ablations, shared by all methods |
| `held_out` | where their rows come from: memory, or resumable studies on disk |
| `evaluation` | `Evaluation`: figures per column, means, intervals, paired differences, text |
| `predicted` | outputs and predictions that are read or computed as they are indexed |
| `ceiling` | the correlation that the best linear model would reach |
| `reliability` | do two halves of the rows give the same attributions? |
"""

from coar.evaluation.ceiling import linear_ceiling
from coar.evaluation.evaluating import evaluate
from coar.evaluation.evaluation import Evaluation
from coar.evaluation.reliability import split_half

__all__ = ["Evaluation", "evaluate", "linear_ceiling", "split_half"]
