"""check: may these attributions be trusted? Fresh ablations, the linear ceiling, and an audit of gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from coar.attributions import Attributions
from coar.axes import Axis
from coar.checking.audit import audit
from coar.checking.audited import Audit
from coar.checking.figures import ceiling_of, correlation_of, r2_of, slope_of
from coar.checking.findings import audit_lines, made_by, problems_of_audit, problems_of_rows, remarks_on
from coar.checking.held_out import CHECK, HeldOut, device_of, fraction_of, held_out_rows
from coar.designs import Bernoulli
from coar.evaluation.held_out import own_fraction
from coar.experiments.ablation import ComponentAblation
from coar.experiments.base import Experiment
from coar.metrics import Estimate, pearson
from coar.settings import whole_number


@dataclass(frozen=True, repr=False)
class Check:
    """What a check found.

    Attributes:
        output: name of the output.
        columns: that the attributions are of.
        ablation_fraction: of the fresh ablations.
        truth: outputs of really ablated models, float64 [rows, columns].
        predicted: what the attributions say, likewise.
        correlation: over rows, mean over columns.
        slope: of true on predicted deviations, all columns together; 1 = calibrated.
        r2: median over columns, in output units.
        ceiling: correlation of the best linear model; None where it is not known (only attributions with
            independent replicates tell), or derivatives are wrong.
        audit: of gate derivatives; None where there was none.
        problems: why the attributions should not be trusted, one text each.
        remarks: what else a careful reader would want to know.
        made_by: the method, and what it spent.
    """

    output: str
    columns: Axis
    ablation_fraction: float
    truth: np.ndarray
    predicted: np.ndarray
    correlation: Estimate
    slope: Estimate
    r2: float
    ceiling: Estimate | None
    audit: Audit | None
    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    made_by: str

    def __repr__(self) -> str:
        found = "ok" if self.ok else f"{len(self.problems)} problems"
        return f"Check({self.output!r}: {found}, correlation {self.correlation})"

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def rows(self) -> int:
        """Fresh ablations that were run for the correlation."""
        return len(self.truth)

    def to_json(self) -> dict[str, Any]:
        """The figures, problems and cost as plain JSON."""
        found = self.audit
        return {
            "output": self.output,
            "ablation_fraction": self.ablation_fraction,
            "correlation": self.correlation.to_json(),
            "ceiling": self.ceiling.to_json() if self.ceiling else None,
            "slope": self.slope.to_json(),
            "r2": self.r2,
            "audited": len(found.components) if found else 0,
            "disagreeing": [one.name for one in found.disagreeing] if found else [],
            "problems": list(self.problems),
            "remarks": list(self.remarks),
            "rows": self.rows + (found.rows if found else 0),
            "passes_of_single_examples": found.passes if found else 0,
        }

    def summary(self) -> str:
        """The findings as text for people."""
        lines = [
            f"check of attributions of {self.output!r} ({self.made_by}), {len(self.columns)} columns",
            f"{self.rows} fresh ablations of {100 * self.ablation_fraction:.3g}% of the components:",
            f"  correlation     {self.correlation}  mean over columns, 95 % interval",
        ]
        if self.ceiling is not None:
            share = f"{100 * self.correlation.value / self.ceiling.value:.0f} % of it is reached"
            lines.append(f"  linear ceiling  {self.ceiling}  of the best linear model; {share}")
        lines.append(f"  slope           {self.slope}  of truth on prediction; 1 = calibrated")
        lines.append(f"  R2              {self.r2:.3f}                 median over columns, output units")
        lines += audit_lines(self.audit) if self.audit else ["no audit of gate derivatives"]
        lines.append(self._cost())
        lines += [f"remark: {text}" for text in self.remarks]
        lines += [f"PROBLEM: {text}" for text in self.problems]
        return "\n".join(lines if self.problems else [*lines, "no problem found"])

    def _cost(self) -> str:
        if self.audit is None:
            return f"spent: {self.rows} ablations of all examples"
        return (
            f"spent: {self.rows} + {self.audit.rows} ablations of all examples, "
            f"{self.audit.passes:,} forward and backward passes of single examples"
        )


def check(
    experiment: Experiment,
    attributions: Attributions,
    *,
    num_rows: int = 60,
    num_audited: int = 20,
    num_examples: int = 8,
    seed: int = 0,
    ablation_fraction: float | None = None,
    audited: bool | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> Check:
    """Hold attributions to real ablations, and gate derivatives to what ablating does.

    Args:
        experiment: what is ablated.
        attributions: of all or some columns of one of its outputs.
        num_rows: fresh ablations, in a stream of their own: never rows of a fit, of `coar.evaluate` or of
            `calibrate`.
        num_audited: components in the audit, from as many groups as possible; see `coar.checking.audit`. A
            remark says how many would look at each group.
        num_examples: examples in the audit.
        seed: of rows, audit and bootstrap.
        ablation_fraction: of the rows; default the one that the attributions were made for.
        audited: whether to audit; default for attributions by gate gradients.
        device: where; default the experiment's.
        batch_size: examples at a time; None chooses.
        progress: show bars.

    Returns:
        A `Check`: `ok`, `problems` and `summary()`.

    Raises:
        AxisError: attributions of another model, other components or other columns.
        SettingError: no ablation fraction is known; an audit of what has no gates.
        OutputError: an audit of an output without gradient.

    >>> from coar.testing import linear_experiment
    >>> experiment, truth = linear_experiment()
    >>> axes = experiment.components, experiment.columns["score"]
    >>> exact = Attributions(truth, np.zeros(len(truth)), *axes, output="score")
    >>> found = check(experiment, exact, ablation_fraction=0.1, audited=True)
    >>> found.ok, round(found.correlation.value, 3), len(found.audit.components)
    (True, 1.0, 12)
    """
    fraction = fraction_of(attributions, ablation_fraction)
    whole_number(num_audited, "num_audited")
    whole_number(num_examples, "num_examples")
    where = device_of(experiment, device)
    design = Bernoulli(ablation_fraction=fraction, seed=seed, stream=CHECK)
    rows = held_out_rows(
        experiment, attributions, design, num_rows, device=where, batch_size=batch_size, progress=progress
    )
    found = None
    if _has_gates(attributions) if audited is None else audited:
        found = audit(
            cast("ComponentAblation", experiment),
            attributions,
            fraction,
            num_audited=num_audited,
            num_examples=num_examples,
            seed=seed,
            device=where,
            batch_size=batch_size,
            progress=progress,
        )
    return _judged(attributions, rows, found, fraction, seed)


def _has_gates(attributions: Attributions) -> bool:
    return str(attributions.provenance.get("method", "")).startswith("gate gradients")


def _judged(
    attributions: Attributions, rows: HeldOut, found: Audit | None, fraction: float, seed: int
) -> Check:
    correlation = correlation_of(rows.truth, rows.predicted, seed)
    slope = slope_of(rows.truth, rows.predicted, seed)
    wrong = problems_of_audit(found) if found else []
    # Replicates agree about what wrong derivatives give: they do not tell what the best linear model is.
    known = not wrong and own_fraction(attributions) == fraction
    ceiling = _ceiling(attributions, correlation, rows) if known else None
    problems = problems_of_rows(correlation, slope) + wrong
    undefined = int(np.isnan(pearson(rows.truth, rows.predicted)).sum())
    return Check(
        output=attributions.output,
        columns=attributions.columns,
        ablation_fraction=fraction,
        truth=rows.truth,
        predicted=rows.predicted,
        correlation=correlation,
        slope=slope,
        r2=r2_of(rows.truth, rows.predicted),
        ceiling=ceiling,
        audit=found,
        problems=tuple(problems),
        remarks=tuple(remarks_on(undefined, correlation, ceiling, found)),
        made_by=made_by(attributions),
    )


def _ceiling(attributions: Attributions, correlation: Estimate, rows: HeldOut) -> Estimate | None:
    known = next(attributions.blocks()).details or {}
    if "signal" not in known:
        return None
    squares = [np.square(block.weights, dtype=np.float64).sum(axis=1) for block in attributions.blocks()]
    agreement = attributions.detail("agreement") if "agreement" in known else None
    return ceiling_of(
        correlation, rows.truth, np.concatenate(squares), attributions.detail("signal"), agreement
    )
