"""COAR-Edit: rank components -> sweep over sizes -> choose a size on held-out examples -> Edit.

| module | what |
|---|---|
| `columns` | which outputs play which part, and that no two parts overlap |
| `protection` | components that are never ablated, subpopulations that must not be harmed |
| `ranking` | `rank_components`: components by targets against references |
| `ranked`, `sweep` | `Ranking`: components in order, and the first of them ablated, more and more |
| `curve` | `Curve`: outputs against the number of ablated components |
| `choice` | the size that does most within the guard |
| `edit` | `Edit`: named components, applied to a copy or in place, composed, saved, judged |
| `in_place`, `edit_files`, `effect` | its parts: weights put back bit for bit, JSON files, before and after |
| `parts` | `EditParts`, `draw_parts`: which examples are attributed, choose, judge |
| `making` | `make_edit`: from examples to a judged edit in one call, by gate gradients or an alternative |
| `alternatives`, `fine_tuning` | other orders of components; training the last layer instead |
| `comparison` | `compare_edits`: all of them side by side |
| `result` | `EditResult`: an edit, how it was chosen, what it does |
| `removal` | `removed`: filters and neurons cut out, a smaller model with equal outputs |
| `export` | the edited model's weights as a file, zeroed or cut, and back |
| `constants`, `flows`, `cutting` | its parts: what an ablated unit emits, where that goes, what is cut |
| `from_examples` | edits of an attributed study: of given targets, or of every misread example |
"""

from coar.editing.comparison import EditComparison, compare_edits
from coar.editing.curve import Curve
from coar.editing.edit import Edit
from coar.editing.effect import Effect
from coar.editing.export import export_edited, load_exported
from coar.editing.fine_tuning import FineTuned, fine_tune
from coar.editing.from_examples import edit_examples, edit_misread, first_fixed
from coar.editing.making import make_edit
from coar.editing.parts import EditParts, draw_parts
from coar.editing.ranking import rank_components
from coar.editing.removal import RemovedModel, removed
from coar.editing.result import EditResult
from coar.editing.sweep import Ranking

__all__ = [
    "Curve",
    "Edit",
    "EditComparison",
    "EditParts",
    "EditResult",
    "Effect",
    "FineTuned",
    "Ranking",
    "RemovedModel",
    "compare_edits",
    "draw_parts",
    "edit_examples",
    "edit_misread",
    "export_edited",
    "fine_tune",
    "first_fixed",
    "load_exported",
    "make_edit",
    "rank_components",
    "removed",
]
