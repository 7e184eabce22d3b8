"""Rows that nobody has fitted: really ablated models, and what attributions predict for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from coar.attributions import Attributions
from coar.designs import Bernoulli
from coar.errors import FitError, SettingError
from coar.evaluation.held_out import own_fraction, require_unseen
from coar.experiments.base import Experiment
from coar.progress import progress_bar
from coar.settings import whole_number
from coar.task import resolve_device
from coar.work import run_rows

CHECK = "check"  # stream of the rows that `check` compares with
CALIBRATION = "calibration"  # stream of the rows that `calibrate` fits the scale on
LEAST_ROWS = 3


@dataclass(frozen=True)
class HeldOut:
    """True and predicted outputs under the same masks.

    Attributes:
        truth: float64 [rows, columns], of the columns of the attributions.
        predicted: likewise.
    """

    truth: np.ndarray
    predicted: np.ndarray


def held_out_rows(
    experiment: Experiment,
    attributions: Attributions,
    design: Bernoulli,
    num_rows: int,
    *,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    progress: bool = True,
) -> HeldOut:
    """Ablate really, and predict the same.

    Raises:
        AxisError: the attributions are of another model, other components or other columns.
        FitError: fewer than 3 rows.
        SettingError: the attributions were made from these very rows.
    """
    if whole_number(num_rows, "num_rows") < LEAST_ROWS:
        raise FitError("deviations from a mean need rows", expected=f"at least {LEAST_ROWS}", got=num_rows)
    positions = columns_in(experiment, attributions)
    require_unseen(attributions.provenance, design)
    names = {name: axis.names for name, axis in experiment.columns.items()}
    runner = experiment.prepare(device_of(experiment, device), batch_size)
    masks, truth = [], []
    with progress_bar(num_rows, f"{design.stream}: ablations", progress) as bar:
        for mask, values in run_rows(runner, design, range(num_rows), len(experiment.components), names):
            masks.append(mask)
            truth.append(values[attributions.output][positions].astype(np.float64))
            bar.update(1)
    return HeldOut(np.stack(truth), attributions.predict(np.stack(masks)))


def columns_in(experiment: Experiment, attributions: Attributions) -> np.ndarray:
    """Positions of the attributions' columns among the experiment's."""
    if attributions.output not in experiment.columns:
        raise SettingError(
            "no such output", expected=", ".join(experiment.columns), got=repr(attributions.output)
        )
    attributions.components.require_same(experiment.components, "attributions", "experiment")
    return attributions.columns.locate(experiment.columns[attributions.output], "attributions", "experiment")


def fraction_of(attributions: Attributions, asked: float | None) -> float:
    """The ablation fraction asked for, or the one that attributions were made for."""
    if asked is not None:
        return asked
    known = own_fraction(attributions)
    if known is None:
        raise SettingError(
            "these attributions do not say which ablations they are to predict",
            expected="ablation_fraction=0.05, say",
            got=f"attributions by {attributions.provenance.get('method', 'hand')!r}",
            todo="name the fraction of components that is ablated in the rows",
        )
    return known


def device_of(experiment: Experiment, device: str | torch.device) -> torch.device:
    """The device asked for; "auto" is the experiment's."""
    return experiment.device if str(device) == "auto" else resolve_device(device)
