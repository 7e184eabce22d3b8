"""Sweep: ablate the first components of a ranking really, more and more of them.

Four sets of examples play four parts and must not overlap: targets (whose outputs are to change), references
(whose outputs are not), a holdout (which chooses the size), and whatever the caller reports on afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coar.axes import Axis
from coar.editing.columns import Columns, positions_in, require_disjoint
from coar.editing.curve import Curve
from coar.editing.protection import Protect, protected_groups
from coar.editing.ranked import Ranked
from coar.errors import EditError
from coar.experiments.base import Experiment
from coar.progress import progress_bar
from coar.work import require_storable


@dataclass(frozen=True, repr=False)
class Ranking(Ranked):
    """Components in an order, to be ablated one after the other; attributes as of `Ranked`."""

    def sweep(
        self,
        experiment: Experiment,
        sizes: Sequence[int],
        holdout: Columns,
        *,
        target_holdout: Columns | None = None,
        protect: Protect | None = None,
        progress: bool = True,
    ) -> Curve:
        """Really ablate the first `size` components, for each size, and read all outputs.

        Args:
            experiment: the one that the attributions are of.
            sizes: numbers of components; 0 is always included.
            holdout: columns that choose the size; neither targets nor references. By name, any of the
                experiment's; by position, those of the attributions.
            target_holdout: further examples like the targets, given as the holdout is: sizes are compared
                by their outputs. None compares by the targets themselves.
            protect: subpopulations that the choice must not harm, see `Curve.protecting`.
            progress: show a bar.

        Raises:
            EditError: the holdout overlaps targets or references, or a size is out of range.
        """
        ours, output = self.attributions, self.attributions.output
        ours.components.require_same(experiment.components, "attributions", "experiment")
        axis = experiment.columns[output]
        where = ours.columns.locate(axis, "attributions", "experiment")
        choosing = {"holdout": holdout}
        choosing |= {} if target_holdout is None else {"target_holdout": target_holdout}
        found = {
            name: positions_in(axis, ours.columns, where, columns, name) for name, columns in choosing.items()
        }
        for name, columns in found.items():
            require_disjoint(axis, columns, name, where[self.targets], "targets")
            require_disjoint(axis, columns, name, where[self.references], "references")
        chosen = found["holdout"]
        steps = _sizes(sizes, len(self.order))
        groups = protected_groups(experiment, axis, chosen, protect)
        outputs = self._outputs(experiment, steps, axis, progress)
        return Curve(self, experiment, steps, chosen, outputs, where, groups, found.get("target_holdout"))

    def _outputs(
        self, experiment: Experiment, steps: Sequence[int], axis: Axis, progress: bool
    ) -> np.ndarray:
        """All outputs of the experiment per size, [sizes, columns]."""
        output = self.attributions.output
        runner = experiment.prepare(experiment.device)
        outputs = []
        with progress_bar(len(steps), "sweep over edit sizes", progress) as bar:
            for size in steps:
                values = runner(self.mask(size)[None])[output][0]
                require_storable(values, size, output, axis.names)
                outputs.append(values)
                bar.update(1)
        return np.stack(outputs)


def _sizes(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    try:
        steps = sorted({0, *(operator.index(size) for size in sizes)})
    except TypeError:
        steps = []
    if not steps or steps[0] < 0 or steps[-1] > limit or len(steps) < 2:
        raise EditError(
            "sizes out of range",
            expected=f"a list with at least one of 1 .. {limit}, the components that may be ablated",
            got=sizes,
            todo="sizes=[1, 2, 4], say",
        )
    return tuple(steps)
