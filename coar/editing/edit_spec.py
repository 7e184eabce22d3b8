"""EditSpec: an edit as one JSON file: experiment, who plays which part, how it is made.

{"format": 1,
"experiment": {"task": {"factory": "coar.tasks.digits:make_task"},
"components": {"kinds": ["conv_filter"]}},
"parts": {"targets": "label == 3", "references": "label != 3", "num_targets": 20},
"edit": {"direction": "lower", "max_accuracy_drop": 0.01}}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from coar.editing.parts import EditParts, draw_parts
from coar.errors import SpecError
from coar.experiments.ablation import ComponentAblation
from coar.settings import Setting
from coar.spec import ExperimentSpec, SpecFile, Strings, experiment_of

Share = Annotated[float, Field(ge=0, le=1)]


class PartsSpec(Setting):
    """Arguments of `draw_parts`."""

    targets: str
    references: str
    guarded: str | None = None
    num_targets: Annotated[int, Field(ge=1)] = 20
    num_references: Annotated[int, Field(ge=1)] = 60
    pairs: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0


class MakingSpec(Setting):
    """Arguments of `make_edit`."""

    direction: Literal["raise", "lower"] = "raise"
    method: Literal["gate_gradients", "derivative", "weight_norm", "random"] = "gate_gradients"
    output: str | None = None
    score: Literal["welch", "difference", "contrast", "cautious", "best"] = "welch"
    ablation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    passes: Annotated[int, Field(ge=1)] = 60
    seed: Annotated[int, Field(ge=0)] = 0
    sizes: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    max_accuracy_drop: Share = 0.005
    max_output_drop: Annotated[float, Field(ge=0)] | None = None
    max_size: Annotated[int, Field(ge=1)] | None = None
    protect: Strings | None = None
    protect_components: Strings = ()

    def arguments(self) -> dict[str, Any]:
        """For `make_edit` and, without the method, `compare_edits`."""
        return {name: getattr(self, name) for name in type(self).model_fields}


class EditSpec(SpecFile):
    """Everything an edit is made of; see the module's text for an example."""

    experiment: ExperimentSpec
    parts: PartsSpec
    edit: MakingSpec = MakingSpec()

    def build(self, allow_import: Sequence[str] | None = None) -> tuple[ComponentAblation, EditParts]:
        """The experiment and its parts; this imports and runs the code that the spec names.

        Raises:
            SpecError: not an ablation of a model's components.
        """
        experiment = experiment_of(self.experiment, allow_import=allow_import)
        if not isinstance(experiment, ComponentAblation):
            raise SpecError(
                "an edit ablates components of a model",
                expected='an experiment "component_ablation"',
                got=self.experiment.name,
            )
        return experiment, draw_parts(experiment.task, **dict(self.parts))
