"""GatePlan: what gate gradients will cost, from a few measured passes; and how they are cut into items."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from coar.gradients.draws import GateDraws
from coar.gradients.layout import count_items
from coar.gradients.passes import GatePasses
from coar.gradients.schedule import Schedule
from coar.plan import duration, size

ITEM_SECONDS = 60.0  # work lost at most when a worker dies
ITEM_BYTES = 2**28
BLOCKS_AT_LEAST = 8  # where there are examples enough, so that workers finish together


@dataclass(frozen=True)
class GatePlan:
    """Expected cost with one worker.

    Attributes:
        passes: over all examples; at most, where a target may stop them.
        num_examples: how many.
        num_components: gates.
        columns: per output, how many.
        seconds_per_pass: over all examples and outputs, measured.
        block_examples: examples per work item.
        item_rounds: rounds per work item at most.
        rounds: per replicate.
        replicates: how many.
        at_most: whether passes may stop before.
        gates: where gates act, in words.
    """

    passes: int
    num_examples: int
    num_components: int
    columns: dict[str, int]
    seconds_per_pass: float
    block_examples: int
    item_rounds: int
    rounds: int
    replicates: int
    at_most: bool = False
    gates: str = ""

    @property
    def item_bytes(self) -> float:
        """Of the file of one work item."""
        return self.pass_bytes * self.block_examples / self.num_examples

    @property
    def pass_bytes(self) -> float:
        """Of the sums of all examples."""
        return 8.0 * (self.num_components + 1) * sum(self.columns.values())

    def summary(self) -> str:
        """Time, disk and memory in a few lines."""
        items = count_items(
            self.num_examples, self.rounds, self.block_examples, self.item_rounds, self.replicates
        )
        most = "at most " if self.at_most else ""
        outputs = ", ".join(f"{name} ({count:,} columns)" for name, count in self.columns.items())
        backward = max(1, round(sum(self.columns.values()) / self.num_examples))
        several = f"; {backward} backward passes for each forward pass" if backward > 1 else ""
        files = items * self.item_bytes
        return "\n".join(
            [
                f"{most}{self.passes:,} passes x {self.num_examples:,} examples, "
                f"{self.num_components:,} components; outputs {outputs}{several}",
                f"time    {most}{duration(self.passes * self.seconds_per_pass)} with one worker "
                f"({1e3 * self.seconds_per_pass:.0f} ms a pass over all examples, measured)",
                f"disk    {most}{size(files)} in {items:,} files, if kept in a study",
                f"memory  {size(self.replicates * self.pass_bytes)} for sums without a study, "
                f"{size(2 * self.replicates * self.item_bytes)} with one, besides model and activations",
                f"gates   {self.gates}",
            ]
        )


def plan_passes(passes: GatePasses, draws: GateDraws, examples: np.ndarray, schedule: Schedule) -> GatePlan:
    """Time a few passes over one batch, and cut the work.

    Args:
        passes: the model with gates.
        draws: of the gates.
        examples: positions of those to attribute.
        schedule: how many rounds.
    """
    here, batch = next(iter(passes.batches(examples)))
    count = len(examples[here])
    columns, seconds = {}, []
    for gates, _ in zip(draws.round(0, 0, examples[here]), range(3), strict=False):  # the first warms up
        start = time.perf_counter()
        found = passes.tensors(batch, gates)
        columns = {name: len(values) for name, (_, values) in found.items()}
        seconds.append((time.perf_counter() - start) / count)
    each = min(seconds[1:] or seconds)
    width = sum(columns.values()) / count
    round_seconds = each * draws.passes_per_round  # of one example
    block = _block_examples(len(examples), passes.batch_size, round_seconds, 8 * width * draws.num_components)
    return GatePlan(
        passes=schedule.passes(schedule.most),
        num_examples=len(examples),
        num_components=draws.num_components,
        columns={name: round(n / count * len(examples)) for name, n in columns.items()},
        seconds_per_pass=each * len(examples),
        block_examples=block,
        item_rounds=max(1, int(ITEM_SECONDS / (round_seconds * block))),
        rounds=schedule.most,
        replicates=schedule.replicates,
        at_most=schedule.adaptive,
        gates=passes.placed_summary(),
    )


def _block_examples(count: int, batch: int, round_seconds: float, example_bytes: float) -> int:
    """Whole batches, so many that there are some blocks, within what an item may take."""
    most = min(ITEM_SECONDS / max(round_seconds, 1e-9), ITEM_BYTES / example_bytes)
    wanted = max(batch, int(count / BLOCKS_AT_LEAST) // batch * batch)
    return int(max(1, min(wanted, count, most // batch * batch or most)))
