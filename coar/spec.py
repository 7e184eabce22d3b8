"""Spec, format 1: a study as one JSON file, validated strictly, unknown keys refused.

    {"format": 1,
     "experiment": {"name": "component_ablation",
                    "task": {"factory": "coar.tasks.digits:make_task", "args": {}},
                    "components": {"kinds": ["conv_filter"], "include": ["*"], "exclude": []},
                    "bias": "keep", "value": "zero"},
     "estimator": {"name": "rows", "num_rows": 4000},
     "design": {"name": "bernoulli", "ablation_fraction": 0.1, "seed": 0, "stream": "fit"},
     "outputs": {"margin": {"dtype": "float32"}},
     "execution": {"device": "auto", "batch_size": "auto", "precision": "auto"}}

or, for attributions from derivatives by gates, `"estimator": {"name": "gate_gradients", "passes": "auto"}`.
`execution` and the number of rows or passes may differ between runs of one study; the rest may not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError

from coar.components import ComponentSet
from coar.designs import Design
from coar.discovery import find_components
from coar.errors import SpecError, StoreError
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.files import digest_json, read_json, require_format, safe_name
from coar.recipes import FACTORY_HELP, build_task, import_object
from coar.settings import Setting, explain
from coar.task import Recipe

FORMAT = 1
GROWING = ("num_rows", "passes", "target_correlation", "target_error")  # of an estimator
Strings = Annotated[tuple[str, ...], Field(strict=False)]
OutputName = Annotated[str, BeforeValidator(lambda name: safe_name(name, "an output's name"))]


class TaskSpec(Setting):
    """Import string of a task factory and its arguments; None for a task that exists only in memory."""

    factory: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)


class ComponentsSpec(Setting):
    """Arguments of `find_components`, or the groups themselves where they were put together by hand."""

    kinds: Strings | None = None
    include: Strings | None = None
    exclude: Strings | None = None
    published: str | None = None
    overlap: Literal[True] | None = None
    groups: tuple[dict[str, Any], ...] | None = Field(default=None, strict=False)


class ComponentAblationSpec(Setting):
    """An ablation experiment."""

    name: Literal["component_ablation"] = "component_ablation"
    task: TaskSpec
    components: ComponentsSpec
    bias: Literal["keep", "ablate"] = "keep"
    value: float | Literal["zero", "mean"] = "zero"


class CustomExperimentSpec(Setting):
    """An experiment of one's own: the import string of its class and its arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
    args: dict[str, Any] = Field(default_factory=dict)


class RowsEstimator(Setting):
    """Random masks, one row of outputs each."""

    name: Literal["rows"] = "rows"
    num_rows: Annotated[int, Field(ge=1)]


class GateGradientsEstimator(Setting):
    """Derivatives by gates; how many passes, and when to stop, may differ between runs.

    Attributes:
        passes: how many, or "auto": until the target, or at most 400.
        target_correlation: stop where predictions correlate so well with those of exact weights (over
            columns, estimated from replicates); "auto" without a target means 0.95.
        target_error: stop where the median standard error is so small, in output units.
        examples: positions of the examples to attribute; None = all.
    """

    name: Literal["gate_gradients"] = "gate_gradients"
    passes: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    target_correlation: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_error: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    examples: Annotated[tuple[int, ...], Field(strict=False)] | None = None


class OutputSpec(Setting):
    """How an output is stored; float16 stores the difference to the untouched output."""

    dtype: Literal["float32", "float16"] = "float32"


class ExecutionSpec(Setting):
    """How rows are computed; may differ between runs, except for the precision."""

    device: str = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    precision: Literal["auto", "float32", "float64", "bfloat16", "float16"] = "auto"
    compiled: Literal[True] | None = None


def _experiment_tag(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "custom" if isinstance(name, str) and ":" in name else "component_ablation"


ExperimentSpec = Annotated[
    Annotated[ComponentAblationSpec, Tag("component_ablation")]
    | Annotated[CustomExperimentSpec, Tag("custom")],
    Discriminator(_experiment_tag),
]


class SpecFile(Setting):
    """What one JSON file describes, with a format."""

    format: Literal[1] = 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_json(cls, value: Any, where: str = "spec") -> Self:
        """Validate a JSON value; `where` names the file in errors.

        Raises:
            SpecError: unknown keys, a newer format, values out of range, each named.
        """
        if not isinstance(value, dict):
            raise SpecError(f"{where} is not a spec", expected="a JSON object", got=type(value).__name__)
        _require_format(value.get("format"), where)
        try:
            return cls.model_validate_json(json.dumps(value))
        except ValidationError as error:
            found = explain(error, where, cls)
            raise SpecError(found.what, expected=found.expected, got=found.got, todo=found.todo) from None
        except (ValueError, RecursionError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"{where} is not a spec", got=str(error)[:200]) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a spec file."""
        try:
            value = read_json(Path(path), "spec")
        except StoreError as error:
            raise SpecError(error.what, expected=error.expected, got=error.got, todo=error.todo) from None
        return cls.from_json(value, str(path))


class StudySpec(SpecFile):
    """Everything a study is made of; see the module's text for an example."""

    experiment: ExperimentSpec
    estimator: Annotated[RowsEstimator | GateGradientsEstimator, Field(discriminator="name")]
    design: Annotated[Design, Field(discriminator="name")]
    outputs: dict[OutputName, OutputSpec]
    execution: ExecutionSpec = ExecutionSpec()

    @property
    def digest(self) -> str:
        """Digest of what may not differ between runs: all but execution, and how many rows or passes."""
        return digest_json(self.identity())

    def identity(self) -> dict[str, Any]:
        """The parts that the digest covers."""
        value = self.to_json()
        value.pop("execution")
        for name in GROWING:
            value["estimator"].pop(name, None)
        return value


def _require_format(found: Any, where: str) -> None:
    if found is None:
        raise SpecError(f"{where} has no format", expected=f'"format": {FORMAT}', got="nothing")
    require_format(found, FORMAT, where, SpecError)


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Name each place where two JSON values differ, as `key.key: ours, not theirs`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(set(ours) | set(theirs))
        missing = object()
        pairs = ((key, ours.get(key, missing), theirs.get(key, missing)) for key in keys)
        found = [differences(a, b, f"{path}.{key}" if path else key) for key, a, b in pairs if a != b]
        return [line for lines in found for line in lines]
    return [f"{path}: {_short(ours)}, not {_short(theirs)}"] if ours != theirs else []


def _short(value: Any) -> str:
    return "absent" if type(value) is object else f"{json.dumps(value):.80}"


def can_rebuild(experiment: Experiment) -> bool:
    """Whether `build_experiment` makes this very experiment again, in any process, from its spec alone."""
    kind, spec = type(experiment), experiment.to_spec()
    if spec["name"] == "component_ablation":
        return kind is ComponentAblation and spec["task"].get("factory") is not None
    importable = kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__
    return importable and spec["name"] == f"{kind.__module__}:{kind.__qualname__}"


def build_experiment(
    spec: StudySpec, weights: str | None = None, allow_import: Sequence[str] | None = None
) -> Experiment:
    """Make the experiment that a spec describes; this imports and runs the code that it names.

    Args:
        spec: the study's spec.
        weights: path of model weights that the study keeps.
        allow_import: prefixes of modules that may be imported; None allows all.
    """
    return experiment_of(spec.experiment, weights, allow_import)


def experiment_of(
    part: ExperimentSpec, weights: str | None = None, allow_import: Sequence[str] | None = None
) -> Experiment:
    """As `build_experiment`, from the `experiment` part of a spec."""
    if isinstance(part, CustomExperimentSpec):
        kind = import_object(part.name, allow_import)
        if not (isinstance(kind, type) and hasattr(kind, "prepare")):
            raise SpecError(
                f"{part.name} is not an experiment",
                expected="a class that keeps the contract of coar.experiments.base.Experiment",
                got=type(kind).__name__,
            )
        return cast("Experiment", kind(**part.args))
    if part.task.factory is None:
        raise SpecError(
            "the study's task was only in memory, and a spec cannot make it again",
            expected="a task made by a task factory",
            got="no factory",
            todo=f"pass experiment= when opening the study, or {FACTORY_HELP}",
        )
    task = build_task(Recipe(part.task.factory, part.task.args), weights, allow_import)
    chosen = part.components
    if chosen.groups is not None:
        components = ComponentSet.from_json(chosen.groups, "spec", bool(chosen.overlap))
    else:
        components = find_components(
            task.model,
            chosen.kinds,
            chosen.include,
            chosen.exclude,
            published=chosen.published,
            overlap=bool(chosen.overlap),
        )
    return ComponentAblation(task, components, part.bias, part.value)
