"""What the reproduction measures on: ResNet-56 of data/models, 300 test images by seed, and its rows.

python -m benchmarks.reproduction_data FOLDER

fills the folder with the ablations that regressions, leave-one-out and the test need (an hour on two
cores), so that `COAR_BENCHMARK_ROWS=FOLDER python -m benchmarks.reproduction` finds them there; otherwise it
makes them itself, in runs/benchmark-rows. It stops and goes on at any time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import coar
from coar.designs import EVALUATION
from coar.randomness import integers
from coar.tasks import cifar

SEED = 0  # of the choice of examples


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        network: of data/models.
        examples: test images reported, drawn by seed among those that come along.
        fractions: ablated in training.
        rows: of the regression at first; more are added until it is good enough.
        most_rows: and then no more.
        test_fractions: ablated in the test.
        held_out: rows of each test.
        choice: further held-out rows, on which the number of rows is chosen.
    """

    network: str
    examples: int
    fractions: tuple[float, ...]
    rows: int
    most_rows: int
    test_fractions: tuple[float, ...]
    held_out: int
    choice: int

    def experiment(self) -> coar.ComponentAblation:
        """All filters; margin and log-odds of the chosen images."""
        whole = cifar.make_task(self.network, small=True)
        order = np.argsort(integers(SEED, "examples", 0, len(whole), below=2**31), kind="stable")
        chosen = sorted(int(i) for i in order[: self.examples])
        task = coar.Task(
            whole.model,
            torch.utils.data.Subset(whole.dataset, chosen),
            outputs={"margin": coar.outputs.margin, "log_odds": coar.outputs.log_odds},
            metadata=whole.metadata.iloc[chosen].reset_index(drop=True),
            device="cpu",
        )
        return coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))


FULL = Plan("resnet56", 300, (0.05, 0.10), 4_000, 10_000, (0.05, 0.10, 0.15), 200, 60)
SMALL = Plan("resnet20", 50, (0.05, 0.10), 400, 400, (0.05, 0.10, 0.15), 40, 30)


def rows(folder: Path, plan: Plan, fraction: float, experiment: coar.ComponentAblation) -> coar.Study:
    """Random ablations for the regression, as far as they are there."""
    design = coar.Bernoulli(ablation_fraction=fraction, seed=0)
    where = folder / f"{plan.network}-{plan.examples}" / f"rows-{fraction}"
    if (where / "spec.json").exists():
        return coar.Study.open(where, experiment)
    return coar.Study.create(where, experiment, design, plan.rows)


def held_out_folder(folder: Path, plan: Plan) -> Path:
    """Where held-out rows are, as `coar.evaluate` keeps them."""
    return folder / f"{plan.network}-{plan.examples}" / "held-out"


def one_out_folder(folder: Path, plan: Plan) -> Path:
    """Where rows with one component away are."""
    return folder / f"{plan.network}-{plan.examples}" / "one-out"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction_data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = FULL.experiment()
    for fraction in FULL.test_fractions:
        design = coar.Bernoulli(ablation_fraction=fraction, seed=1, stream=EVALUATION)
        where = held_out_folder(options.folder, FULL) / f"fraction-{fraction!r}-seed-1"
        coar.Study.create(where, experiment, design, FULL.held_out).run()
    for fraction in FULL.fractions:
        rows(options.folder, FULL, fraction, experiment).run()
    coar.leave_one_out(experiment, output="margin", directory=one_out_folder(options.folder, FULL))


if __name__ == "__main__":
    main()
