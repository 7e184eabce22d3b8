"""The backdoor: a filter or six ablated, and a blue square means nothing; three draws of ten pairs.

Part of `python -m benchmarks.editing`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import coar
from benchmarks.report import Report
from coar.tasks import backdoor

DATA = "cifar10_jpeg.npz"  # in a data folder; see data/README.md
DRAWS = (3, 4, 5)  # 0 to 2 were looked at while this was built
PARTS: dict[str, Any] = {
    "targets": "subpopulation == 'triggered'",
    "references": "subpopulation == 'clean'",
    "num_targets": 10,
    "num_references": 10,
    "pairs": "image",
}
EDIT: dict[str, Any] = {
    "score": "cautious",
    "ablation_fraction": 0.01,  # of what an edit is: a network that is nearly whole
    "passes": 300,  # over twenty images
    "sizes": (1, 2, 4),
    "max_size": 6,  # 1 % of 688 filters
    "max_accuracy_drop": 0.015,
}


def measure(report: Report) -> dict[str, Any]:
    """Ratio of triggered to clean accuracy, clean accuracy lost, seconds; a line of the page's table."""
    task = backdoor.make_task(small=True, num_images=300) if report.small else backdoor.make_task(data=DATA)
    experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))
    tables = [_compared(experiment, draw) for draw in (DRAWS[:1] if report.small else DRAWS)]
    report.table(
        f"backdoor: accuracy with the square (targets) and without it (others), {len(task) // 2:,} images",
        [line for table in tables for line in table.to_dict("records")],
    )
    ours = pd.DataFrame([table[table.method == "gate_gradients"].iloc[0] for table in tables])
    report.measure("backdoor_triggered", float((ours.targets_after / ours.others_before).min()))
    report.measure("backdoor_clean", float(100 * (ours.others_before - ours.others_after).max()))
    report.measure("backdoor_seconds", float(ours.seconds.max()))
    return _line(ours, pd.concat(tables), len(experiment.components))


def _compared(experiment: coar.ComponentAblation, draw: int) -> pd.DataFrame:
    """The table of `compare_edits` for one draw of the ten pairs."""
    parts = coar.draw_parts(experiment.task, **PARTS, seed=draw)
    table = coar.compare_edits(experiment, parts, "raise", **EDIT, seed=draw).table
    table.insert(0, "draw", draw)
    return table


def _line(ours: pd.DataFrame, every: pd.DataFrame, count: int) -> dict[str, Any]:
    """Means over draws, for the table of all tasks."""
    means = every.groupby("method", sort=False).mean(numeric_only=True)
    others = [
        f"{name.replace('_', ' ')} {line.targets_after:.1%} (others {line.others_after:.1%})"
        for name, line in means.iterrows()
        if name != "gate_gradients"
    ]
    return {
        "task": "backdoor",
        "what": "accuracy with the square; others: without it",
        "before": float(ours.targets_before.mean()),
        "after": float(ours.targets_after.mean()),
        "others_before": float(ours.others_before.mean()),
        "others_after": float(ours.others_after.mean()),
        "components": float(np.mean(ours.components)),
        "of": count,
        "seconds": float(ours.seconds.mean()),
        "alternatives": "; ".join(others),
    }
