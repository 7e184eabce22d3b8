"""Gate gradients that keep nothing: passes until the schedule says stop, sums in memory."""

from __future__ import annotations

import numpy as np
import torch

from coar.attributions import Attributions
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import GateDraws
from coar.gradients.layout import REPLICATES, Layout, Step
from coar.gradients.passes import GatePasses
from coar.gradients.provenance import attributions_provenance
from coar.gradients.schedule import Schedule
from coar.gradients.sums import MemorySums
from coar.gradients.weights import PassMeans, Progress, classes_of, example_columns, subset_axis
from coar.gradients.worker import GateWorker
from coar.plan import size
from coar.progress import progress_bar
from coar.task import resolve_device


class InMemory:
    """One run of passes whose sums are kept in memory; arguments as of `gate_gradients`."""

    def __init__(
        self,
        experiment: ComponentAblation,
        ablation_fraction: float,
        seed: int,
        output: str,
        execution: tuple[str | torch.device, int | None, str],
    ) -> None:
        self.experiment, self.output = experiment, output
        self.axis = experiment.columns[output]
        self.draws = GateDraws(ablation_fraction, seed, len(experiment.components))
        device, batch_size, precision = execution
        where = experiment.device if str(device) == "auto" else resolve_device(device)
        self.engine = GatePasses(experiment, (output,), where, batch_size, precision)
        self.sums = MemorySums()

    def attributions(
        self, examples: tuple[int, ...], schedule: Schedule, pool: bool, memory: int, progress: bool
    ) -> Attributions:
        """Passes until the schedule says stop, and the weights from them."""
        columns = example_columns(self.axis, [examples])[0]
        self._require_memory(len(columns), memory)
        classes = classes_of(self.experiment.task.metadata, self.axis) if pool else None
        layout = Layout([Step(examples, schedule.first)], self.engine.batch_size, schedule.most)
        found = self._until(layout, schedule, classes, progress)
        means = self._means(layout, classes)
        whole = means.whole(means.mixing())
        spent = schedule.passes(layout.rounds)
        return Attributions(
            whole.weights,
            whole.intercept,
            self.experiment.components,
            subset_axis(self.axis, columns),
            self.output,
            errors=whole.errors,
            details=whole.details,
            provenance=attributions_provenance(
                self.draws, spent, len(columns) / len(examples), pool, found, self.engine.placed_record()
            ),
        )

    def _until(
        self, layout: Layout, schedule: Schedule, classes: np.ndarray | None, progress: bool
    ) -> Progress:
        """Run items, and go on to more rounds until the schedule says stop."""
        owners = {self.output: self.axis.fields["example"]}
        names = self.experiment.components.names
        worker = GateWorker(self.engine, self.draws, owners, names, self.sums)
        done, found = 0, None
        while True:
            items = layout.items()
            total, before = sum(map(len, items)), sum(map(len, items[:done]))
            with progress_bar(total, "gate gradients", progress, before) as bar:
                for item, after in zip(items[done:], [*items[done + 1 :], None], strict=True):
                    if found:
                        bar.set_postfix_str(str(found), refresh=False)
                    worker.do(item)
                    bar.update(len(item))
                    if after is None or (not bar.disable and after.start > item.start):
                        found = self._means(layout, classes, item.stop).progress()
            assert found is not None
            done, more = len(items), schedule.next(layout.rounds, found)
            if more is None:
                schedule.warn_missed(layout.rounds, found)
                return found
            layout.add(Step((), more))

    def _means(self, layout: Layout, classes: np.ndarray | None, rounds: int | None = None) -> PassMeans:
        """Means over the rounds that all blocks have had."""
        rounds = rounds or layout.rounds
        return PassMeans(
            example_columns(self.axis, layout.blocks),
            lambda block: self.sums.means(block, self.output, rounds),
            [flat for _, flat in self.experiment.component_set.slices()],
            len(self.experiment.components),
            1 - self.draws.ablation_fraction,
            classes,
        )

    def _require_memory(self, columns: int, memory: int) -> None:
        needed = 8 * (REPLICATES + 1) * columns * len(self.experiment.components)
        if needed > memory:
            raise SettingError(
                "sums over passes do not fit in memory",
                expected=f"at most {size(memory)} (memory=)",
                got=f"{size(needed)}: {columns:,} columns x {len(self.experiment.components):,} components",
                todo="keep them on disk with directory=, or attribute fewer examples with examples=",
            )
