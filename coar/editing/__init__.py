"""COAR-Edit: rank components -> sweep over sizes -> choose a size on held-out examples -> Edit.

| module | what |
|---|---|
| `columns` | which outputs play which part, and that no two parts overlap |
| `protection` | components that are never ablated, subpopulations that must not be harmed |
| `ranking` | `rank_components`: components by targets against references |
| `sweep` | `Ranking`, and its first components ablated, more and more of them |
| `curve` | `Curve`: outputs against the number of ablated components |
| `choice` | the size that does most within the guard |
| `edit` | `Edit`: named components, applied to a copy or in place, composed, saved, judged |
| `in_place`, `edit_files`, `effect` | its parts: weights put back bit for bit, JSON files, before and after |
| `removal` | `removed`: filters and neurons cut out, a smaller model with equal outputs |
| `constants`, `flows`, `cutting` | its parts: what an ablated unit emits, where that goes, what is cut |
| `from_examples` | all of that in one call, on disjoint examples |
"""

from coar.editing.curve import Curve
from coar.editing.edit import Edit
from coar.editing.effect import Effect
from coar.editing.from_examples import EditResult, edit_examples, edit_misread, first_fixed
from coar.editing.ranking import rank_components
from coar.editing.removal import RemovedModel, removed
from coar.editing.sweep import Ranking

__all__ = [
    "Curve",
    "Edit",
    "EditResult",
    "Effect",
    "Ranking",
    "RemovedModel",
    "edit_examples",
    "edit_misread",
    "first_fixed",
    "rank_components",
    "removed",
]
