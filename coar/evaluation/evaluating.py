"""evaluate: how well attributions predict ablations that nobody has fitted.

For each ablation fraction, fresh masks are drawn from a stream of their own, the model is really ablated,
and every method predicts the same outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from coar.attributions import Attributions
from coar.axes import Axis
from coar.baselines.cost import spent
from coar.designs import EVALUATION, Bernoulli
from coar.errors import FitError, SettingError
from coar.evaluation.ceiling import (
    ceiling_from_replicates,
    has_replicates,
    linear_ceiling,
    tells_ceiling,
)
from coar.evaluation.evaluation import Evaluation
from coar.evaluation.held_out import RowsWanted, own_fraction, require_unseen
from coar.evaluation.predicted import Chosen, Predicted
from coar.executors.base import Executor
from coar.experiments.base import Experiment
from coar.metrics import Estimate, Table
from coar.settings import whole_number
from coar.study import Study

CeilingSource = Attributions | Study
LEAST_ROWS = 3
PRECISE = 0.06  # width of the interval of a ceiling


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
        AxisError: attributions of another model, other components or other columns.
        FitError: fewer than 3 rows.
        SettingError: attributions that were fitted to, or calibrated on, these very rows.

    >>> from coar.baselines import attribution_patching, leave_one_out
    >>> from coar.testing import linear_experiment
    >>> experiment, _ = linear_experiment()
    >>> methods = {"leave-one-out": leave_one_out(experiment, progress=False)}
    >>> found = evaluate(experiment, methods, [0.1, 0.3], num_rows=20, progress=False)
    >>> found.means().correlation.round(3).tolist()
    [1.0, 1.0]
    """
    if not isinstance(methods, Mapping):
        raise SettingError(
            "methods have names", expected='{"ridge": attributions}', got=type(methods).__name__
        )
    fractions = _fractions(ablation_fractions)
    num_rows = whole_number(num_rows, "num_rows", least=-(2**40))
    if num_rows < LEAST_ROWS:
        raise FitError("a correlation needs rows", expected=f"at least {LEAST_ROWS}", got=num_rows)
    output, columns, positions = _common_columns(experiment, methods)
    designs = [Bernoulli(ablation_fraction=f, seed=seed, stream=EVALUATION) for f in fractions]
    for name, attributions in methods.items():
        for design in designs:
            require_unseen(attributions.provenance, design, name)
    found = Evaluation(columns, {}, {name: {} for name in methods}, seed, costs=_costs(methods))
    sources = _sources(ceiling, methods, output)
    for design in designs:
        fraction = design.ablation_fraction
        rows = RowsWanted(experiment, design, num_rows, output).run(directory, executor, progress)
        truth = _of_columns(rows.outputs, positions, num_rows)
        for name, attributions in methods.items():
            found.predictions[name][fraction] = Predicted(attributions, rows.masks)
        found.truth[fraction] = truth
        found.keep(rows.scratch)
        known = _ceiling(sources, output, columns, rows.masks, truth, fraction, seed)
        if known is not None:
            found.ceilings[fraction] = known
    return found


def _fractions(asked: Sequence[float] | float) -> list[float]:
    found = [asked] if isinstance(asked, int | float) else list(asked)
    if not found:
        raise SettingError("nothing to evaluate at", expected="ablation_fractions=[0.05, 0.1]", got="[]")
    if len(set(found)) < len(found):
        raise SettingError("a fraction comes twice", expected="each once", got=found)
    return found


def _common_columns(
    experiment: Experiment, methods: Mapping[str, Attributions]
) -> tuple[str, Axis, np.ndarray]:
    if not methods:
        raise SettingError("nothing to evaluate", expected='{"regression": attributions}', got="{}")
    name, first = next(iter(methods.items()))
    if first.output not in experiment.columns:
        raise SettingError("no such output", expected=", ".join(experiment.columns), got=first.output)
    for other, attributions in methods.items():
        attributions.components.require_same(experiment.components, f"attributions {other!r}", "experiment")
        attributions.columns.require_same(first.columns, f"attributions {other!r}", f"attributions {name!r}")
    positions = first.columns.locate(experiment.columns[first.output], f"attributions {name!r}", "experiment")
    return first.output, first.columns, positions


def _of_columns(outputs: Table, positions: np.ndarray, num_rows: int) -> Table:
    if isinstance(outputs, np.ndarray):
        return outputs[:, positions]
    return Chosen(outputs, positions, num_rows)


def _costs(methods: Mapping[str, Attributions]) -> dict[str, tuple[str, float]]:
    """What made each method, and the forward passes that it took (NaN: it does not say)."""
    found = {}
    for name, attributions in methods.items():
        forwards = spent(attributions.provenance, attributions.columns)
        family = str(attributions.provenance.get("method", "by hand"))
        found[name] = family, float("nan") if forwards is None else float(forwards)
    return found


def _sources(asked: object, methods: Mapping[str, Attributions], output: str) -> list[CeilingSource]:
    if asked is None:
        return []
    if asked == "auto":
        return [one for one in methods.values() if has_replicates(one)]
    found = [asked] if isinstance(asked, Attributions | Study) else list(asked)  # type: ignore[call-overload]
    for one in found:
        if not tells_ceiling(one) or output not in (
            [one.output] if isinstance(one, Attributions) else one.columns
        ):
            raise SettingError(
                "this does not tell the linear ceiling",
                expected=f"40 or more random ablations with output {output!r}, or gate gradients of it",
                got=repr(one)[:100],
                todo='take ceiling="auto" or None',
            )
    return found


def _ceiling(
    sources: Sequence[CeilingSource],
    output: str,
    columns: Axis,
    masks: np.ndarray,
    truth: Table,
    fraction: float,
    seed: int,
) -> Estimate | None:
    """From the sources that were made for this fraction, and of these columns.

    Rows are believed where they tell it well: they know no derivatives that could be wrong.
    """
    known: list[Estimate | None] = []
    for source in sources:
        if isinstance(source, Study):
            if getattr(source.spec.design, "ablation_fraction", None) == fraction:
                with suppress(FitError):  # no output changes: there is nothing to reach
                    found = linear_ceiling(source, output=output, columns=columns.names)
                    if found.high - found.low <= PRECISE:
                        return found
                    known.append(found)
        elif own_fraction(source) == fraction and source.columns == columns:
            predicted = [Predicted(source, masks)]
            known += [ceiling_from_replicates([source], truth, predicted, fraction=fraction, seed=seed)]
    return min((one for one in known if one), key=lambda one: one.high - one.low, default=None)
