"""What the benchmark of gate gradients measures on: trained networks of data/models and their rows.

python -m benchmarks.gate_gradients_data FOLDER [NETWORK ...]

fills the folder with the ablations that the regressions need (two hours on two cores), so that
`COAR_BENCHMARK_ROWS=FOLDER python -m benchmarks.gate_gradients` finds them there, which otherwise makes
them itself, in runs/benchmark-rows. It stops and goes on at any time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import coar
from coar.tasks import cifar, gpt2

FRACTION = 0.05
OUTPUTS = {"log_odds": coar.outputs.log_odds, "margin": coar.outputs.margin}


@dataclass(frozen=True)
class Network:
    """A trained network, its examples, and how much is spent on it.

    Attributes:
        name: of the network.
        examples: how many.
        rows: of the regression that gate gradients are compared with.
        seeds: of regressions: one set of rows each.
        held_out: masks that all methods are tested on.
        test_fractions: at which they are drawn.
    """

    name: str
    examples: int
    rows: int
    seeds: tuple[int, ...] = (0,)
    held_out: int = 200
    test_fractions: tuple[float, ...] = (FRACTION,)

    def experiment(self) -> coar.ComponentAblation:
        """Filters of a ResNet, MLP neurons and heads of a transformer; two outputs."""
        if self.name.startswith("gpt2"):
            task = gpt2.make_task(small=True, network=self.name, num_examples=self.examples)
            outputs = dict(task.outputs)
        else:
            task = cifar.make_task(self.name, small=True, num_examples=self.examples)
            outputs = OUTPUTS
        kinds = ["conv_filter"] if self.name.startswith("resnet") else ["mlp_neuron", "attention_head"]
        task = coar.Task(
            task.model,
            task.dataset,
            outputs=outputs,
            collate=task.collate,
            metadata=task.metadata,
            device="cpu",
        )
        return coar.ComponentAblation(task, coar.find_components(task.model, kinds=kinds))


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet20", 400, 4_000, seeds=(0, 1, 2), test_fractions=(0.05, 0.10, 0.30)),
        Network("resnet56", 150, 6_000),
        Network("vit", 100, 1_500),
        Network("gpt2_deep", 40, 1_500),
        Network("resnet8", 400, 2_000),
    )
}
SMALL = Network("resnet20", 60, 400, held_out=40)


def rows(folder: Path, network: Network, seed: int, experiment: coar.ComponentAblation) -> coar.Study:
    """Random ablations for a regression, as far as they are there."""
    design = coar.Bernoulli(ablation_fraction=FRACTION, seed=seed)
    return coar.Study.create(folder / network.name / f"rows-{seed}", experiment, design, network.rows)


def held_out(
    folder: Path, network: Network, fraction: float, experiment: coar.ComponentAblation
) -> coar.Study:
    """Ablations that every method is tested on."""
    design = coar.Bernoulli(ablation_fraction=fraction, seed=1, stream="evaluation")
    where = folder / network.name / f"held-out-{fraction}"
    return coar.Study.create(where, experiment, design, network.held_out)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_gradients_data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for network in (NETWORKS[name] for name in options.networks):
        experiment = network.experiment()
        for fraction in network.test_fractions:
            held_out(options.folder, network, fraction, experiment).run()
        for seed in network.seeds:
            rows(options.folder, network, seed, experiment).run()


if __name__ == "__main__":
    main()
