"""Findings: what figures and audit mean, in words."""

from __future__ import annotations

from collections import Counter

import numpy as np

from coar.attributions import Attributions
from coar.checking.audited import Audit, Audited
from coar.metrics import Estimate

CALIBRATED = (0.8, 1.25)  # a slope that is outside of this for certain is a problem
ENOUGH = 0.9  # of the ceiling; below, more passes are worth their time
SEND_TO_REGRESSION = "fit a regression on rows, which needs no gradients (coar.Study, coar.fit)"


def problems_of_rows(correlation: Estimate, slope: Estimate) -> list[str]:
    """Why fresh ablations speak against the attributions."""
    if not np.isfinite(correlation.value):
        return ["no column in which both the outputs and the predictions move under ablation"]
    if not correlation.low > 0:
        return [f"predictions are not known to have to do with the outputs: correlation {correlation}"]
    if not slope.known:
        return [f"the slope is not known ({slope}): predictions move too little, or are not finite"]
    low, high = CALIBRATED
    if slope.high < low or slope.low > high:
        return [
            f"effects are too {'large' if slope.value < 1 else 'small'} in scale: slope {slope}; calibrate"
        ]
    return []


def problems_of_audit(found: Audit) -> list[str]:
    """Why gate gradients cannot be right here, component by component."""
    problems = [_said(one, found) for one in found.disagreeing]
    if not found.ends_agree:
        problems.append(
            f"gates of 0 and 1 are not the ablation: outputs differ by up to {found.ends:.3g}; "
            f"{SEND_TO_REGRESSION}"
        )
    if found.disagreeing:
        problems.append(
            f"gate derivatives miss {100 * found.missed:.2g} % of the audited effects, and more passes would "
            f"not help: {SEND_TO_REGRESSION}"
        )
    return problems


def _said(one: Audited, found: Audit) -> str:
    worst = int(np.argmax(np.nan_to_num(np.abs(one.exact - one.integral), nan=np.inf)))
    if one.still:
        why = "the graph is cut (detach, no_grad, rounding), or the gate is elsewhere"
    elif not np.isfinite(one.integral).all():
        why = "the derivative is not finite"
    else:
        why = "the output jumps on the way (JumpReLU, rounding, top-k), or part of the graph is cut"
    return (
        f"{one.name} (group {one.group}): ablating it takes {one.exact[worst]:.4g} from the output of "
        f"{found.columns[worst]!r}, its gate derivative adds up to {one.integral[worst]:.4g} "
        f"({one.nodes} nodes): {why}"
    )


def remarks_on(
    undefined: int, correlation: Estimate, ceiling: Estimate | None, found: Audit | None
) -> list[str]:
    """What is no reason for distrust; `undefined` counts columns without a correlation."""
    said = _remarks_on_rows(undefined, correlation, ceiling)
    if found is None:
        return said
    said += _remarks_on_audit(found)
    return said + [f"gates of {group} stay at the layer: {why}" for group, why in found.fallen.items()]


def _remarks_on_rows(undefined: int, correlation: Estimate, ceiling: Estimate | None) -> list[str]:
    said = []
    if undefined:
        said.append(f"{undefined} columns are constant in truth or prediction, and left out")
    if ceiling is not None and correlation.value < ENOUGH * ceiling.value:
        said.append("the best linear model would predict better: more passes are worth their time")
    return said


def _remarks_on_audit(found: Audit) -> list[str]:
    """What the audit has not looked at, or could not see."""
    said = []
    if problems_of_audit(found):
        said.append("the ceiling is not known where derivatives are wrong")
    if found.unaudited_groups:
        said.append(
            f"{found.unaudited_groups} of {found.num_groups} groups were not audited: "
            f"num_audited={found.num_groups} looks at each"
        )
    if not any(one.exact.any() or one.integral.any() for one in found.components):
        said.append("no audited component has an effect on the examples looked at: the audit says nothing")
    hidden = [one for one in found.components if one.hidden]
    if hidden:
        said.append(
            f"rounding of the outputs hides the effects of {len(hidden)} of {len(found.components)} audited "
            "components, of which the audit says nothing: subtract what is constant in the outputs"
        )
    return said


def audit_lines(found: Audit) -> list[str]:
    """The audit in a summary."""
    groups = len({one.group for one in found.components})
    agree = len(found.components) - len(found.disagreeing)
    worst = max((one.missed for one in found.components if one.agrees), default=0.0)
    where = Counter(found.placements.values()).most_common()
    return [
        f"audit of {len(found.components)} components in {groups} groups on {found.examples} examples, real "
        "differences against integrals of gate derivatives:",
        f"  {agree} agree (within {100 * worst:.2g} % of their effects), {len(found.disagreeing)} do not",
        "  gates act " + ", ".join(f"{label} ({count} groups)" for label, count in where),
    ]


def made_by(attributions: Attributions) -> str:
    """The method of attributions, and what it spent."""
    said = attributions.provenance
    spent = [f"{said[key]:,} {key}" for key in ("passes", "rows") if isinstance(said.get(key), int)]
    if isinstance(said.get("calibration"), dict):
        spent.append(f"calibrated by {said['calibration'].get('rows')} rows")
    return ", ".join([str(said.get("method", "by hand")), *spent])
