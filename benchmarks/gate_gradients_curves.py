"""One network: its ceiling, and what gate gradients, regressions and baselines reach for what they cost."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import coar
from benchmarks.gate_gradients_data import FRACTION, Network, held_out, rows
from benchmarks.report import median_seconds
from coar.attributions import Attributions
from coar.baselines import hybrid
from coar.evaluation import Evaluation
from coar.evaluation.ceiling import ceiling_from_replicates
from coar.gradients.draws import GateDraws
from coar.gradients.passes import GatePasses
from coar.regression.fitting import fit_blocks
from coar.regression.problem import Problem


class Bench:
    """A network, its rows and its held-out ablations.

    Args:
        network: which.
        folder: where rows are.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.experiment = network.experiment()
        self.outputs = list(self.experiment.columns)
        self._held: dict[float, coar.Study] = {}

    def held(self, fraction: float = FRACTION) -> coar.Study:
        """Held-out ablations, complete."""
        if fraction not in self._held:
            study = held_out(self.folder, self.network, fraction, self.experiment)
            study.run()
            self._held[fraction] = study
        return self._held[fraction]

    def rows(self, seed: int) -> coar.Study:
        """Rows of a regression, complete."""
        study = rows(self.folder, self.network, seed, self.experiment)
        study.run()
        return study

    def evaluation(self, methods: dict[str, Attributions], fraction: float = FRACTION) -> Evaluation:
        """All methods on the held-out ablations."""
        study = self.held(fraction)
        output = next(iter(methods.values())).output
        masks, truth = np.asarray(study.masks), np.asarray(study.outputs[output])
        predictions = {name: {fraction: found.predict(masks)} for name, found in methods.items()}
        return Evaluation(study.columns[output], {fraction: truth}, predictions, seed=0)

    def score(self, found: Attributions, fraction: float = FRACTION) -> dict[str, float]:
        """Mean correlation over columns, its interval; medians of R2 and slope."""
        row = self.evaluation({"it": found}, fraction).means().iloc[0]
        return {name: float(row[name]) for name in ("correlation", "low", "high", "r2", "slope")}

    def ridge(self, seed: int, output: str, count: int) -> tuple[Attributions, float]:
        """Ridge on the first rows, and its seconds."""
        study = self.rows(seed)
        masks, outputs = np.asarray(study.masks)[:count], np.asarray(study.outputs[output])[:count]
        start = time.perf_counter()
        problem = Problem.from_arrays(masks, outputs)
        block = next(iter(fit_blocks(problem, coar.Ridge().prepare(problem))))
        seconds = time.perf_counter() - start
        made = {"method": "ridge", "rows": count}
        axes = self.experiment.components, self.experiment.columns[output]
        return Attributions(block.weights, block.intercept, *axes, output, provenance=made), seconds

    def hybrid(self, prior: Attributions, count: int, seed: int = 0) -> Attributions:
        """Ridge on what a prior leaves of the first rows."""
        whole = self.rows(seed)
        if count == whole.num_rows:
            return hybrid(whole, prior)
        with tempfile.TemporaryDirectory() as scratch:
            part = Path(scratch) / "part"
            shutil.copytree(whole.directory, part, ignore=shutil.ignore_patterns("shards", "statistics"))
            (part / "shards").mkdir()
            for item in whole.items():
                if item.stop <= count:
                    shutil.copy(whole.store.path(item.index), part / "shards")
            return hybrid(coar.Study.open(part, self.experiment), prior, partial=True)

    def alone(self, output: str, seed: int, passes: int, fraction: float = FRACTION) -> Attributions:
        """Gate gradients of few passes, in two or three replicates where a study that goes on has four."""
        return coar.gate_gradients(
            self.experiment, fraction, passes=passes, seed=seed, output=output, progress=False
        )

    def gates(
        self, output: str, seed: int, cuts: Sequence[int]
    ) -> Iterator[tuple[int, Attributions, Attributions]]:
        """Gate gradients of so many passes, each going on from the last; without and with pooling."""
        with tempfile.TemporaryDirectory() as scratch:
            study = coar.GateGradientStudy.create(
                Path(scratch) / "study",
                self.experiment,
                FRACTION,
                passes=cuts[0],
                seed=seed,
                outputs=[output],
            )
            for cut in cuts:
                if cut > cuts[0]:
                    study.extend(cut)
                study.run()
                found = study.attributions()
                yield int(found.provenance["passes"]), found, study.attributions(pool=True)

    def ceiling(self, found: Sequence[Attributions]) -> float:
        """Correlation that the best linear model could reach, mean over columns; means over seeds."""
        study = self.held()
        masks = np.asarray(study.masks)
        truth = np.asarray(study.outputs[found[0].output], np.float64)
        ceiling = ceiling_from_replicates(
            found, truth, [one.predict(masks) for one in found], fraction=FRACTION, seed=0
        )
        assert ceiling is not None
        return ceiling.value

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of a row and of a pass over all examples, in turn."""
        return seconds_of_row_and_pass(self.experiment, self.outputs[0])

    def wall(self, output: str, passes: int, seed: int) -> float:
        """Seconds of `coar.gate_gradients`, all included."""
        start = time.perf_counter()
        coar.gate_gradients(
            self.experiment, FRACTION, passes=passes, seed=seed, output=output, progress=False
        )
        return time.perf_counter() - start


def seconds_of_row_and_pass(experiment: coar.ComponentAblation, output: str) -> dict[str, float]:
    """Of a row and of a pass over all examples, in turn; medians."""
    passes = GatePasses(experiment, [output], experiment.device)
    runner = experiment.prepare(experiment.device)
    count = len(experiment.components)
    masks = iter(coar.Bernoulli(ablation_fraction=FRACTION, seed=9).masks(range(1_000), count))
    draws, everything = GateDraws(FRACTION, 9, count), np.arange(len(experiment.task))
    batches = [(everything[here], batch) for here, batch in passes.batches(everything)]
    gates = [next(iter(draws.round(0, 0, examples))) for examples, _ in batches]

    def one_pass() -> None:
        for (_, batch), own in zip(batches, gates, strict=True):
            passes.tensors(batch, own)

    actions: dict[str, Callable[[], object]] = {
        "row": lambda: runner(next(masks)[None]),
        "pass": one_pass,
    }
    times = median_seconds(actions, 7)
    return {name: statistics.median(values) for name, values in times.items()}


def over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the range of the correlations."""
    found: dict[str, Any] = {
        name: statistics.fmean(score[name] for score in scores) for name in ("correlation", "r2", "slope")
    }
    each = [score["correlation"] for score in scores]
    found["seeds"] = f"{len(each)}: {min(each):.3f} to {max(each):.3f}" if len(each) > 1 else "1"
    return found


def noise_figure(found: Attributions) -> float:
    """c^2: variance of a single probe's derivative over the squared weight, both summed over components."""
    probes = found.provenance["passes"] * min(2 * FRACTION, 0.2)
    noise, signal = (float(found.detail(name).mean()) for name in ("noise", "signal"))
    return noise * probes / signal
