"""gate_gradients: attributions from derivatives by gates, without a store and without a regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from coar.attribution_blocks import Block
from coar.attributions import Attributions
from coar.axes import Axis
from coar.errors import OutputError, SettingError
from coar.experiments.ablation import ComponentAblation
from coar.gradients.draws import GateDraws
from coar.gradients.mixing import Mixed, mix
from coar.gradients.passes import GatePasses
from coar.progress import progress_bar
from coar.rows import require_output
from coar.settings import whole_number
from coar.task import resolve_device

REPLICATES = 4
SUMS_BYTES = 2**29  # of the sums of one block of examples
ENOUGH = 0.9  # reliability at which passes="auto" stops
MOST_PASSES = 400  # of passes="auto"


@dataclass
class Sums:
    """Means over the passes of one block of examples, per replicate.

    Attributes:
        probe: derivatives where a component was a probe, float32 [replicates, columns, components].
        kept: derivatives where it was not, likewise.
        values: outputs, float64 [replicates, columns].
        rounds: how many rounds each replicate has seen.
    """

    probe: np.ndarray
    kept: np.ndarray
    values: np.ndarray
    rounds: int = 0


def gate_gradients(
    experiment: ComponentAblation,
    ablation_fraction: float,
    *,
    passes: int | Literal["auto"] = "auto",
    seed: int = 0,
    output: str | None = None,
    examples: Sequence[int] | None = None,
    pool: bool = False,
    device: str | torch.device = "auto",
    batch_size: int | None = None,
    precision: str = "float32",
    progress: bool = True,
) -> Attributions:
    """Attributions from derivatives by gates: a fraction of the passes that a regression needs rows.

    Args:
        experiment: a component ablation whose output has gradients.
        ablation_fraction: of the ablations to predict.
        passes: forward and backward passes over the examples, rounded up to whole rounds of 4 replicates;
            "auto" doubles them until the weights are reliable, or at 400.
        seed: of the gates.
        output: which output; needed where there are several.
        examples: positions of the examples to attribute; default all.
        pool: draw weights towards their means over examples and classes (the task's `label`): less noise
            from few passes, but an example's weights then depend on the others. Not for edits.
        device: where; default the task's.
        batch_size: examples at a time; None chooses.
        precision: of the passes.
        progress: show a bar.

    Returns:
        Attributions with standard errors, in output units per component kept. The provenance names passes,
        where gates act, and how reliable the weights are.

    Raises:
        OutputError: the output has no gradient, or a derivative is not finite.
    """
    if not isinstance(experiment, ComponentAblation):
        raise SettingError(
            "gate gradients need a component ablation",
            expected="coar.ComponentAblation",
            got=type(experiment).__name__,
            todo="run a study and fit it",
        )
    name = require_output(output, list(experiment.task.outputs))
    where = experiment.device if str(device) == "auto" else resolve_device(device)
    engine = GatePasses(experiment, (name,), where, batch_size, precision)
    draws = GateDraws(ablation_fraction, seed, len(experiment.components))
    axis = experiment.columns[name]
    chosen = _examples(examples, len(experiment.task))
    return _Run(experiment, engine, draws, axis, pool).attributions(chosen, passes, progress)


class _Run:
    """One call of `gate_gradients`."""

    def __init__(
        self, experiment: ComponentAblation, engine: GatePasses, draws: GateDraws, axis: Axis, pool: bool
    ) -> None:
        self.experiment, self.engine, self.draws, self.axis = experiment, engine, draws, axis
        self.groups = [flat for _, flat in experiment.component_set.slices()]
        self.classes = _classes(experiment, axis) if pool else None
        self.rounds = 0  # per replicate

    def attributions(self, examples: np.ndarray, passes: int | str, progress: bool) -> Attributions:
        first = self._rounds_of(passes)
        blocks, reliabilities = [], []
        with progress_bar(len(examples), "gate gradients", progress) as bar:
            for block in self._blocks(examples):
                sums, columns = self._empty(block)
                self._run(sums, columns, block, first if not self.rounds else self.rounds)
                if passes == "auto" and not self.rounds:
                    self._until_reliable(sums, columns, block)
                self.rounds = sums.rounds
                mixed = self._mixed(sums, columns)
                reliabilities.append(reliability(sums, mixed))
                blocks.append(self._block(sums, mixed))
                bar.update(len(block))
        whole = {key: np.concatenate([b[key] for b in blocks]) for key in blocks[0]}
        return self._attributions(whole, examples, float(np.median(np.concatenate(reliabilities))))

    def _rounds_of(self, passes: int | str) -> int:
        if passes == "auto":
            return 1
        asked = whole_number(passes, "passes")
        return -(-asked // (REPLICATES * self.draws.passes_per_round))

    def _blocks(self, examples: np.ndarray) -> list[np.ndarray]:
        each = (
            8
            * REPLICATES
            * len(self.experiment.components)
            * max(1, len(self.axis) // len(self.experiment.task))
        )
        size = max(self.engine.batch_size, SUMS_BYTES // each)
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def _empty(self, examples: np.ndarray) -> tuple[Sums, np.ndarray]:
        """Sums of a block, and its columns."""
        columns = np.flatnonzero(np.isin(self.axis.fields["example"], examples))
        shape = (REPLICATES, len(columns), len(self.experiment.components))
        return Sums(np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape[:2])), columns

    def _until_reliable(self, sums: Sums, columns: np.ndarray, examples: np.ndarray) -> None:
        while sums.rounds * REPLICATES * self.draws.passes_per_round * 2 <= MOST_PASSES:
            if np.median(reliability(sums, self._mixed(sums, columns))) >= ENOUGH:
                return
            self._run(sums, columns, examples, 2 * sums.rounds)

    def _run(self, sums: Sums, columns: np.ndarray, examples: np.ndarray, rounds: int) -> None:
        """Bring every replicate to a number of rounds."""
        starts = np.searchsorted(self.axis.fields["example"][columns], examples)
        for here, batch in self.engine.batches(examples):
            some = slice(starts[here.start], starts[here.stop] if here.stop < len(starts) else len(columns))
            owner = self.axis.fields["example"][columns[some]]
            position = np.searchsorted(examples[here], owner)
            for replicate in range(REPLICATES):
                for index in range(sums.rounds, rounds):
                    self._round(sums, replicate, index, rounds, examples[here], batch, some, position)
        sums.rounds = rounds

    def _round(self, sums: Sums, replicate: int, index: int, rounds: int, *where: Any) -> None:
        examples, batch, some, position = where
        probe, kept, values = (
            sums.probe[replicate, some],
            sums.kept[replicate, some],
            sums.values[replicate, some],
        )
        if index == sums.rounds and index:  # means become sums again
            for part in (probe, kept, values):
                part *= index
        others = self.draws.passes_per_round - 1
        for gates in self.draws.round(replicate, index, examples):
            (both,) = self.engine.derivatives(batch, gates).values()
            found, outputs = both.by_gate, both.values
            self._require_finite(found, examples, position)
            mine = gates.probes[position]
            probe += np.where(mine, found, 0)
            kept += np.where(mine, 0, found) / others
            values += outputs / self.draws.passes_per_round
        if index == rounds - 1:
            for part in (probe, kept, values):
                part /= rounds

    def _require_finite(self, found: np.ndarray, examples: np.ndarray, position: np.ndarray) -> None:
        if not np.isfinite(found).all():
            row, component = np.argwhere(~np.isfinite(found))[0]
            raise OutputError(
                f"a derivative is not finite: example {examples[position[row]]}, component "
                f"{self.experiment.components.names[component]!r}",
                expected="finite derivatives",
                got=float(found[row, component]),
                todo="raise the precision, or exclude this layer; usual: sqrt, norms, division at 0",
            )

    def _mixed(self, sums: Sums, columns: np.ndarray) -> Mixed:
        classes = None if self.classes is None else self.classes[columns]
        return mix(sums.probe, sums.kept, self.groups, classes)

    def _block(self, sums: Sums, mixed: Mixed) -> dict[str, np.ndarray]:
        # Gates are on average what masks are: the mean output over passes is that at the mean mask.
        kept = 1 - self.draws.ablation_fraction
        intercept = sums.values.mean(axis=0) - kept * mixed.weights.sum(axis=1)
        assert mixed.errors is not None
        block = Block(0, mixed.weights, intercept, mixed.errors, {"reliability": reliability(sums, mixed)})
        return block.arrays()

    def _attributions(
        self, arrays: dict[str, np.ndarray], examples: np.ndarray, reliable: float
    ) -> Attributions:
        whole = Block.from_arrays(0, arrays)
        columns = np.flatnonzero(np.isin(self.axis.fields["example"], examples))
        everything = len(columns) == len(self.axis)
        provenance = {
            "method": "gate gradients",
            "ablation_fraction": self.draws.ablation_fraction,
            "seed": self.draws.seed,
            "passes": self.rounds * REPLICATES * self.draws.passes_per_round,
            "replicates": REPLICATES,
            "pooled": self.classes is not None,
            "reliability": reliable,
            "placements": self.engine.placements,
            "fallen": self.engine.fallen,
        }
        return Attributions(
            whole.weights,
            whole.intercept,
            self.experiment.components,
            self.axis if everything else self.axis.subset(columns),
            self.engine.outputs[0],
            errors=whole.errors,
            details=whole.details,
            provenance=provenance,
        )


def reliability(sums: Sums, mixed: Mixed) -> np.ndarray:
    """Share of each column's squared weights that is not noise, [columns], from the replicates."""
    assert mixed.errors is not None
    noise, total = (mixed.errors**2).sum(axis=1), (mixed.weights**2).sum(axis=1)
    del sums
    return np.asarray(np.clip(1 - noise / np.maximum(total, 1e-30), 0.0, 1.0))


def _examples(examples: Sequence[int] | None, count: int) -> np.ndarray:
    if examples is None:
        return np.arange(count)
    found = np.array([int(e) for e in examples], dtype=np.int64)
    if not len(found) or len(set(found.tolist())) < len(found) or found.min() < 0 or found.max() >= count:
        raise SettingError(
            "examples to attribute",
            expected=f"positions from 0 to {count - 1}, each once",
            got=f"{examples!r:.80}",
        )
    return np.sort(found)


def _classes(experiment: ComponentAblation, axis: Axis) -> np.ndarray:
    metadata = experiment.task.metadata
    if metadata is None or "label" not in metadata:
        return np.zeros(len(axis), np.int64)
    return np.asarray(metadata["label"])[axis.fields["example"]]
