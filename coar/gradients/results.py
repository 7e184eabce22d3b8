"""From what passes have found to `Attributions`: the same whether sums are in memory or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coar.attribution_blocks import write_blocks
from coar.attributions import Attributions
from coar.axes import Axis
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import GateDraws
from coar.gradients.layout import Layout
from coar.gradients.provenance import attributions_provenance, require_unused
from coar.gradients.schedule import Schedule
from coar.gradients.weights import MeansReader, PassMeans, classes_of, example_columns, subset_axis


def pass_means(
    experiment: ComponentAblation,
    axis: Axis,
    layout: Layout,
    draws: GateDraws,
    pool: bool,
    means: MeansReader,
) -> PassMeans:
    """What passes have found of one output.

    Args:
        experiment: whose components and classes.
        axis: of all columns of the output.
        layout: of the passes.
        draws: of the gates.
        pool: whether examples share.
        means: reads the means of a block.
    """
    return PassMeans(
        example_columns(axis, layout.blocks),
        means,
        [flat for _, flat in experiment.component_set.slices()],
        len(experiment.components),
        1 - draws.ablation_fraction,
        classes_of(experiment.task.metadata, axis) if pool else None,
    )


def make_attributions(
    found: PassMeans,
    axes: tuple[Axis, Axis],
    output: str,
    how: tuple[GateDraws, Schedule, int, dict[str, Any]],
    save_to: Path | None = None,
) -> Attributions:
    """Weights of all columns.

    Args:
        found: by passes.
        axes: of the components, and of all columns of the output.
        output: its name.
        how: draws, schedule, rounds done, where gates act.
        save_to: folder to write them to, block by block; None returns them in memory.
    """
    draws, schedule, rounds, placed = how
    mixing, columns = found.mixing(), np.concatenate(found.columns)
    components, axis = axes[0], subset_axis(axes[1], columns)
    examples = len(np.unique(axes[1].fields["example"][columns]))
    backwards, pooled = len(columns) / examples, found.classes is not None
    progress = found.progress(mixing)
    provenance = attributions_provenance(draws, schedule, rounds, backwards, pooled, progress, placed)
    if save_to is not None:
        require_unused(save_to, provenance, output, axis)
        write_blocks(save_to, found.blocks(mixing), components, axis, output, provenance)
        return Attributions.load(save_to)
    whole = found.whole(mixing)
    return Attributions(
        whole.weights,
        whole.intercept,
        components,
        axis,
        output,
        errors=whole.errors,
        details=whole.details,
        provenance=provenance,
    )
