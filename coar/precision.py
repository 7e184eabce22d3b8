"""Precision: which one rows are computed in, and the check that a low one must pass.

Low precision (bfloat16, float16) is used only if it tells the same story: for every column, over at
least 32 rows of the study's own design and after removing the column's mean, outputs in low
precision are correlated with those in float32; the median over columns must reach .999, the 5th
percentile .99. (The mean is what the untouched model gives; what attributions are fitted to is the
rest.) "auto" is float32 on the CPU, and on a GPU bfloat16 where it passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from coar.designs import Design, LeaveOneOut
from coar.errors import SettingError
from coar.experiments.base import Experiment, Runner
from coar.metrics import pearson

LOW = ("bfloat16", "float16")
ROWS = 32
MEDIAN, PERCENTILE_5 = 0.999, 0.99


def choose_precision(
    experiment: Experiment,
    design: Design,
    device: torch.device,
    batch_size: int | None = None,
    asked: str = "auto",
) -> tuple[str, dict[str, Any] | None]:
    """The precision of a study, and the check that led to it (None where none was needed).

    Raises:
        SettingError: a low precision was asked for and fails the check.
    """
    if asked == "auto" and device.type != "cuda":
        return "float32", None
    if asked not in ("auto", *LOW):
        return asked, None
    low = "bfloat16" if asked == "auto" else asked
    found = compare_precision(experiment, design, low, device, batch_size)
    if found["passes"]:
        return low, found
    if asked == "auto":
        return "float32", found
    raise SettingError(
        f"{low} is too coarse for this study",
        expected=f"correlation with float32: median >= {MEDIAN}, 5th percentile >= {PERCENTILE_5}",
        got=f"{found['median']:.5f} and {found['percentile_5']:.5f} of the columns over {found['rows']} rows",
        todo='use precision="float32"',
    )


def compare_precision(
    experiment: Experiment,
    design: Design,
    precision: str,
    device: torch.device,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Correlation with float32 of every column, summed up: see the module's text.

    Returns:
        `precision`, `rows`, `median`, `percentile_5` (the worst output's) and `passes`.
    """
    count = len(experiment.components)
    rows = min(ROWS, count) if isinstance(design, LeaveOneOut) else ROWS
    masks = design.masks(range(rows), count)
    exact = _centred(experiment.prepare(device, batch_size, "float32"), masks)
    coarse = _centred(experiment.prepare(device, batch_size, precision), masks)
    scores = [_correlations(exact[name], coarse[name]) for name in exact]
    median = min(float(np.median(values)) for values in scores)
    low = min(float(np.percentile(values, 5)) for values in scores)
    passes = median >= MEDIAN and low >= PERCENTILE_5
    return {
        "precision": precision,
        "rows": len(masks),
        "median": median,
        "percentile_5": low,
        "passes": passes,
    }


def _centred(runner: Runner, masks: np.ndarray) -> dict[str, np.ndarray]:
    rows = [runner(mask[None]) for mask in masks]
    stacked = {name: np.stack([row[name][0] for row in rows]).astype(np.float64) for name in rows[0]}
    with np.errstate(invalid="ignore"):  # what overflows has no mean; the check says so
        return {name: values - values.mean(axis=0) for name, values in stacked.items()}


def _correlations(exact: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Per column; one that no mask moves is right where it stays put, and what is not finite is wrong."""
    still = ~exact.any(axis=0) & ~coarse.any(axis=0)
    values = np.where(still, 1.0, pearson(exact, coarse))
    return np.where(np.isfinite(values) & np.isfinite(coarse).all(axis=0), values, -1.0)
