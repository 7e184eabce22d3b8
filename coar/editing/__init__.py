"""COAR-Edit: rank components -> sweep over sizes -> choose a size on held-out examples -> Edit.

| module | what |
|---|---|
| `ranking` | `rank_components`: components by targets against references |
| `sweep` | `Ranking`, and `Curve`: outputs against the number of ablated components, the choice of a size |
| `edit` | `Edit`: named components, applied, saved, judged |
| `from_examples` | all of that in one call, on disjoint examples |
"""

from coar.editing.edit import Edit, Effect
from coar.editing.from_examples import EditResult, edit_examples, edit_misread, first_fixed
from coar.editing.ranking import rank_components
from coar.editing.sweep import Curve, Ranking

__all__ = [
    "Curve",
    "Edit",
    "EditResult",
    "Effect",
    "Ranking",
    "edit_examples",
    "edit_misread",
    "first_fixed",
    "rank_components",
]
