"""evaluate: how well attributions predict ablations that nobody has fitted.

For each ablation fraction, fresh masks are drawn from a stream of their own, the model is really ablated,
and every method predicts the same outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.baselines.cost import spent
from coar.designs import EVALUATION, Bernoulli
from coar.errors import CoarWarning, FitError, SettingError
from coar.evaluation.evaluation import Cost, Evaluation
from coar.evaluation.held_out import RowsWanted, own_fraction, require_unseen
from coar.evaluation.known_ceilings import Ceilings, CeilingSource
from coar.evaluation.predicted import Chosen, Predicted
from coar.executors.base import Executor
from coar.experiments.base import Experiment
from coar.metrics import Table
from coar.settings import whole_number

LEAST_ROWS = 3


def evaluate(
    experiment: Experiment,
    methods: Mapping[str, Attributions],
    ablation_fractions: Sequence[float] | float,
    num_rows: int = 100,
    seed: int = 1,
    *,
    ceiling: CeilingSource | Sequence[CeilingSource] | Literal["auto"] | None = "auto",
    directory: str | Path | None = None,
    executor: Executor | None = None,
    progress: bool = True,
) -> Evaluation:
    """Compare attributions with really ablated models (COAR paper, section 4).

    Args:
        experiment: what is ablated.
        methods: attributions by name, all of the same columns.
        ablation_fractions: to test at; correlations fall away from the fraction fitted at.
        num_rows: masks per fraction, at least 3.
        seed: of the masks; their stream is never used for fitting.
        ceiling: what tells the correlation of the best linear model at its own ablation fraction: a study of
            random ablations (`linear_ceiling`), or gate gradients; several for several fractions, or of one
            fraction: a study whose interval is at most 0.06 wide is believed before the others, else the
            narrowest. "auto" takes those of `methods` that can tell; None leaves it away.
        directory: keep the rows there as resumable studies, one per fraction, and reuse them; memory is then
            bounded whatever the number of rows. Without it, rows of more than 1 GB go to a temporary folder.
        executor: where those studies run.
        progress: show a bar per fraction.

    Raises:
        AxisError: attributions, or a source of the ceiling, of another model, other components or columns.
        FitError: fewer than 3 rows.
        SettingError: attributions that were fitted to, or calibrated on, these very rows;
            arguments of another kind.
        OutputError: outputs of a row cannot be stored.

    >>> from coar.baselines import attribution_patching, leave_one_out
    >>> from coar.testing import linear_experiment
    >>> experiment, _ = linear_experiment()
    >>> methods = {"leave-one-out": leave_one_out(experiment, progress=False)}
    >>> found = evaluate(experiment, methods, [0.1, 0.3], num_rows=20, progress=False)
    >>> found.means().correlation.round(3).tolist()
    [1.0, 1.0]
    """
    require_arguments(experiment, methods)
    if isinstance(num_rows, int) and num_rows < LEAST_ROWS:
        raise FitError("a correlation needs rows", expected=f"at least {LEAST_ROWS}", got=num_rows)
    num_rows = whole_number(num_rows, "num_rows", least=LEAST_ROWS)
    output, columns, positions = _common_columns(experiment, methods)
    designs = _designs(ablation_fractions, seed, len(experiment.components))
    for name, attributions in methods.items():
        for design in designs:
            require_unseen(attributions.provenance, design, name)
    known = Ceilings(ceiling, methods, experiment, columns, output, [d.ablation_fraction for d in designs])
    empty: dict[str, dict[float, Table]] = {name: {} for name in methods}
    found = Evaluation(columns, {}, empty, seed, output=output, costs=_costs(methods))
    for design in designs:
        fraction = design.ablation_fraction
        rows = RowsWanted(experiment, design, num_rows, output).run(directory, executor, progress)
        truth = _of_columns(rows.outputs, positions, num_rows)
        for name, attributions in methods.items():
            found.predictions[name][fraction] = Predicted(attributions, rows.masks)
        found.truth[fraction] = truth
        found.keep(rows.scratch)
        if (told := known.at(fraction, rows.masks, truth, seed)) is not None:
            found.ceilings[fraction], found.ceiling_sources[fraction] = told
    return found


def require_arguments(experiment: object, methods: object) -> None:
    """Raise for the natural mistakes, which would end in an AttributeError."""
    if not isinstance(experiment, Experiment):
        raise SettingError(
            "the first argument is an experiment",
            expected="coar.ComponentAblation(task, components), say",
            got=type(experiment).__name__,
        )
    if not isinstance(methods, Mapping):
        raise SettingError(
            "methods have names", expected='{"ridge": attributions}', got=type(methods).__name__
        )
    if not methods:
        raise SettingError("nothing to evaluate", expected='{"regression": attributions}', got="{}")
    for name, one in methods.items():
        if not isinstance(one, Attributions):
            raise SettingError(
                f"method {name!r} is no attributions",
                expected="coar.Attributions",
                got=type(one).__name__,
                todo="of a study: coar.fit(study), or study.attributions() of gate gradients; of a folder: "
                "coar.Attributions.load(path)",
            )


def _designs(asked: Sequence[float] | float, seed: int, components: int) -> list[Bernoulli]:
    several = isinstance(asked, Iterable) and not isinstance(asked, str)
    fractions: list[Any] = list(asked) if several else [asked]  # type: ignore[arg-type]
    if not all(isinstance(f, Real) and 0 < float(f) < 1 for f in fractions):
        raise SettingError(
            "ablation_fractions out of range",
            expected="numbers above 0 and below 1, such as [0.05, 0.1]",
            got=repr(asked)[:80],
            todo="0.05 to 0.1 is usual: the share of components that are ablated at random",
        )
    found = [float(fraction) for fraction in fractions]
    if not found:
        raise SettingError("nothing to evaluate at", expected="ablation_fractions=[0.05, 0.1]", got="[]")
    if len(set(found)) < len(found):
        raise SettingError("a fraction comes twice", expected="each once", got=found)
    for fraction in found:
        if 2 * fraction * components < 1:
            warnings.warn(
                f"at an ablation fraction of {fraction:g} a mask ablates {fraction * components:.2g} of "
                f"{components} components on average: in many rows nothing changes",
                CoarWarning,
                stacklevel=3,
            )
    return [Bernoulli(ablation_fraction=fraction, seed=seed, stream=EVALUATION) for fraction in found]


def _common_columns(
    experiment: Experiment, methods: Mapping[str, Attributions]
) -> tuple[str, Axis, np.ndarray]:
    name, first = next(iter(methods.items()))
    if first.output not in experiment.columns:
        raise SettingError(
            f"no such output: attributions {name!r} are of {first.output!r}",
            expected=f"one of the experiment's: {', '.join(experiment.columns)}",
            got=repr(first.output),
            todo="name it where they are made or loaded: output=...",
        )
    for other, attributions in methods.items():
        attributions.components.require_same(experiment.components, f"attributions {other!r}", "experiment")
        attributions.columns.require_same(first.columns, f"attributions {other!r}", f"attributions {name!r}")
    positions = first.columns.locate(experiment.columns[first.output], f"attributions {name!r}", "experiment")
    return first.output, first.columns, positions


def _of_columns(outputs: Table, positions: np.ndarray, num_rows: int) -> Table:
    if isinstance(outputs, np.ndarray):
        return outputs[:, positions]
    return Chosen(outputs, positions, num_rows)


def _costs(methods: Mapping[str, Attributions]) -> dict[str, Cost]:
    found = {}
    for name, attributions in methods.items():
        forwards = spent(attributions.provenance, attributions.columns)
        found[name] = Cost(
            family=str(attributions.provenance.get("method", "by hand")),
            made_for=own_fraction(attributions),
            forwards=None if forwards is None else float(forwards),
        )
    return found
