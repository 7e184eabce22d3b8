"""Gate gradients that keep nothing: passes until the schedule says stop, sums in memory."""

from __future__ import annotations

import torch

from coar.attributions import Attributions
from coar.errors import SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import GateDraws
from coar.gradients.layout import Layout, Step
from coar.gradients.passes import GatePasses
from coar.gradients.results import make_attributions, pass_means
from coar.gradients.schedule import Schedule
from coar.gradients.sums import BlockMeans, MemorySums
from coar.gradients.weights import PassMeans, example_columns
from coar.gradients.worker import GateWorker
from coar.plan import size
from coar.progress import progress_bar
from coar.task import resolve_device

WEIGHT_BYTES = 16  # of a weight and its error, and as much again in `Attributions`


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

    def attributions(
        self, examples: tuple[int, ...], schedule: Schedule, pool: bool, memory: int, progress: bool
    ) -> Attributions:
        """Passes until the schedule says stop, and the weights from them."""
        columns = example_columns(self.axis, [examples])[0]
        self._require_memory(len(columns), schedule.replicates, memory)
        self.sums = MemorySums(schedule.replicates)
        layout = Layout(
            [Step(examples, schedule.first)], self.engine.batch_size, schedule.most, schedule.replicates
        )
        self._until(layout, schedule, pool, progress)
        how = self.draws, schedule, layout.rounds, self.engine.placed_record()
        axes = self.experiment.components, self.axis
        return make_attributions(self._means(layout, pool), axes, self.output, how)

    def _until(self, layout: Layout, schedule: Schedule, pool: bool, progress: bool) -> None:
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
                        found = self._means(layout, pool, item.stop).progress()
            assert found is not None
            done, more = len(items), schedule.next(layout.rounds, found)
            if more is None:
                schedule.warn_missed(layout.rounds, found)
                return
            layout.add(Step((), more))

    def _means(self, layout: Layout, pool: bool, rounds: int | None = None) -> PassMeans:
        """Means over the rounds that all blocks have had."""
        rounds = rounds or layout.rounds

        def means(block: int) -> BlockMeans:
            return self.sums.means(block, self.output, rounds)

        return pass_means(self.experiment, self.axis, layout, self.draws, pool, means)

    def _require_memory(self, columns: int, replicates: int, memory: int) -> None:
        needed = (8 * replicates + WEIGHT_BYTES) * columns * len(self.experiment.components)
        if needed > memory:
            raise SettingError(
                "sums over passes do not fit in memory",
                expected=f"at most {size(memory)} (memory=)",
                got=f"{size(needed)}: {columns:,} columns x {len(self.experiment.components):,} components",
                todo="keep them on disk with directory=, or attribute fewer examples with examples=",
            )
