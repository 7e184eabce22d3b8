"""calibrate: one factor for all weights of an output, from a few really ablated models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from coar.attributions import Attributions
from coar.checking.figures import slope_of
from coar.checking.held_out import CALIBRATION, HeldOut, fraction_of, held_out_rows
from coar.designs import Bernoulli
from coar.errors import FitError, SettingError
from coar.experiments.base import Experiment
from coar.metrics import Estimate


def calibrate(
    experiment: Experiment,
    attributions: Attributions,
    *,
    num_rows: int = 60,
    seed: int = 0,
    ablation_fraction: float | None = None,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> Attributions:
    """Attributions in the scale of real ablations: weights times one slope, means matched.

    Gate gradients are right in direction and some per cent too large in scale, since the other gates are
    fractional. The slope is that of true on predicted deviations from each column's mean, by least squares
    over all rows and columns together. Each column's intercept is such that its mean prediction over the
    rows is its mean output (unbiased; its error is that of the residual over the root of the rows, less than
    that of a mean over passes). Correlations do not change. Standard errors are multiplied by the slope;
    the slope's own error, shared by all weights, is in the provenance and not in them.

    Args:
        experiment: what is ablated.
        attributions: of all or some columns of one of its outputs.
        num_rows: real ablations of all examples, in a stream of their own: never rows of a fit, of `check` or
            of `evaluate`.
        seed: of the rows and of the bootstrap.
        ablation_fraction: of the rows; default the one that the attributions were made for.
        device: where; default the experiment's.
        batch_size: examples at a time; None chooses.
        progress: show a bar.

    Returns:
        New attributions; `provenance["calibration"]` has rows, seed, stream, slope and its 95 % interval;
        "forwards", where there, counts the rows, and "error" is at the new scale.

    Raises:
        AxisError: attributions of another model, other components or other columns.
        FitError: the rows do not confirm that the predictions have anything to do with the outputs.
        SettingError: attributions that are calibrated already, or that name no ablation fraction.

    >>> from coar.testing import linear_experiment
    >>> experiment, truth = linear_experiment()
    >>> axes = experiment.components, experiment.columns["score"]
    >>> twice = Attributions(2 * truth, np.zeros(len(truth)), *axes, output="score")
    >>> calibrated = calibrate(experiment, twice, ablation_fraction=0.1)
    >>> round(calibrated.provenance["calibration"]["slope"], 4), bool(np.allclose(calibrated.weights, truth))
    (0.5, True)
    """
    if "calibration" in attributions.provenance:
        raise SettingError(
            "these attributions are calibrated already",
            expected="attributions as their method made them",
            got=f"a slope of {attributions.provenance['calibration'].get('slope')}",
            todo="calibrate the attributions that these were made from, with more rows",
        )
    fraction = fraction_of(attributions, ablation_fraction)
    design = Bernoulli(ablation_fraction=fraction, seed=seed, stream=CALIBRATION)
    options = {"device": device, "batch_size": batch_size, "progress": progress}
    rows = held_out_rows(experiment, attributions, design, num_rows, **options)  # type: ignore[arg-type]
    slope = slope_of(rows.truth, rows.predicted, seed)
    _require_confirmed(slope, num_rows)
    said = {"rows": num_rows, "seed": seed, "stream": CALIBRATION, "ablation_fraction": fraction}
    said |= {"slope": slope.value, "interval": [slope.low, slope.high]}
    return _scaled(attributions, rows, slope.value, said)


def _require_confirmed(slope: Estimate, num_rows: int) -> None:
    if np.isfinite(slope.value) and slope.low > 0:
        return
    moves = np.isfinite(slope.value)
    raise FitError(
        f"{num_rows} ablations do not confirm these attributions",
        expected="a slope of true on predicted deviations that is above 0 for certain",
        got=f"a slope of {slope}" if moves else "predictions that are the same whatever is ablated",
        todo="coar.checking.check says why; make the attributions with more passes, or fit a regression",
    )


def _scaled(attributions: Attributions, rows: HeldOut, slope: float, said: dict[str, object]) -> Attributions:
    base = attributions.intercept
    moved = rows.predicted.mean(axis=0) - base  # what the weights add on average
    errors = attributions.errors
    details = {name: attributions.detail(name) for name in next(attributions.blocks()).details or {}}
    for name in {"signal", "noise", "agreement"} & details.keys():  # squares of weights
        details[name] = details[name] * slope**2
    return Attributions(
        attributions.weights * slope,
        rows.truth.mean(axis=0) - slope * moved,
        attributions.components,
        attributions.columns,
        attributions.output,
        errors=None if errors is None else errors * slope,
        details=details,
        provenance=_provenance(attributions.provenance, slope, said),
    )


def _provenance(known: Mapping[str, Any], slope: float, said: Mapping[str, Any]) -> dict[str, Any]:
    """That of the attributions, at the new scale, with the cost of the rows."""
    changed: dict[str, Any] = {"calibration": dict(said)}
    if "forwards" in known:
        changed["forwards"] = known["forwards"] + said["rows"]
    if isinstance(known.get("error"), float):  # in output units
        changed["error"] = known["error"] * slope
    return dict(known) | changed
