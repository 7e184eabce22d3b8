"""The table of the COAR paper on a network of ours: all methods against held-out ablations.

python -m benchmarks.reproduction [--small] [--json PATH]

ResNet-56 (2,032 filters) instead of the paper's ResNet (2,304 filters) on CIFAR-10, 300 test images drawn by
seed, margins as in the paper. Rows are made once, in the folder named by COAR_BENCHMARK_ROWS (default
runs/benchmark-rows; an hour on two cores, see benchmarks/reproduction_data.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import coar
from benchmarks.gate_gradients_curves import seconds_of_row_and_pass
from benchmarks.report import ROOT, Report, main
from benchmarks.reproduction_data import FULL, SMALL, Plan, one_out_folder, rows, test_folder
from coar.attributions import Attributions
from coar.evaluation import Evaluation, linear_ceiling, split_half
from coar.report import figures

OUTPUT = "margin"
# Table of the paper (arXiv 2404.11534): mean correlation, trained and tested at 10 % ablated.
PUBLISHED = {
    "regression": 0.75,
    "leave-one-out": 0.52,
    "gradient x parameter": 0.24,
    "neuron conductance": 0.11,
    "internal influence": 0.01,
}
ENOUGH = 0.90  # of the ceiling: where the regression stops
FORWARDS = 600  # that gate gradients may cost
STEPS = 20  # of path integrals
SEEDS = (0, 1, 2)  # of gates


def run(report: Report) -> None:
    """All measurements."""
    folder = Path(os.environ.get("COAR_BENCHMARK_ROWS", "runs/benchmark-rows"))
    plan = SMALL if report.small else FULL
    experiment = plan.experiment()
    cost = pass_cost(experiment)
    others = fixed(experiment, plan, folder)
    for fraction in plan.fractions:
        study = rows(folder, plan, fraction, experiment)
        study.run()
        enough, curve = regression(report, experiment, study, plan, folder)
        passes = int(FORWARDS / cost) // 20 * 20
        gates = [
            coar.gate_gradients(experiment, fraction, passes=passes, seed=seed, output=OUTPUT)
            for seed in SEEDS
        ]
        seeds = {f"gate gradients, seed {seed}": one for seed, one in zip(SEEDS[1:], gates[1:], strict=True)}
        methods = {"regression": curve[enough], "gate gradients": gates[0], **seeds, **others}
        found = evaluate(experiment, methods, plan, folder, ceiling=study)
        show(
            report,
            found,
            fraction,
            {"regression": enough, **dict.fromkeys(["gate gradients", *seeds], passes * cost)},
        )
        own = found.means().query("ablation_fraction == @fraction").set_index("method").correlation
        report.measure(f"at_{100 * fraction:.0f}", float(own[["regression", "gate gradients"]].max()))
        if not report.small and fraction == plan.fractions[-1]:
            draw(found)


def pass_cost(experiment: coar.ComponentAblation) -> float:
    """Forwards that a pass of gate gradients costs, measured in turn with rows."""
    times = seconds_of_row_and_pass(experiment, OUTPUT)
    return times["pass"] / times["row"]


def fixed(experiment: coar.ComponentAblation, plan: Plan, folder: Path) -> dict[str, Attributions]:
    """Methods that know no ablation fraction."""
    options: dict[str, Any] = {"output": OUTPUT}
    return {
        "leave-one-out": coar.leave_one_out(experiment, directory=one_out_folder(folder, plan), **options),
        "gradient x parameter": coar.gradient_x_parameter(experiment, **options),
        "attribution patching": coar.attribution_patching(experiment, **options),
        "neuron conductance": coar.neuron_conductance(experiment, STEPS, **options),
        "internal influence": coar.internal_influence(experiment, STEPS, **options),
        "weight norm": coar.weight_norm(experiment, **options),
        "random": coar.random_attributions(experiment, **options),
    }


def evaluate(
    experiment: coar.ComponentAblation,
    methods: dict[str, Attributions],
    plan: Plan,
    folder: Path,
    **options: Any,
) -> Evaluation:
    """All methods on the rows of the test, which are run once."""
    where = test_folder(folder, plan)
    return coar.evaluate(experiment, methods, plan.test_fractions, plan.held_out, directory=where, **options)


def regression(
    report: Report,
    experiment: coar.ComponentAblation,
    study: coar.Study,
    plan: Plan,
    folder: Path,
) -> tuple[int, dict[int, Attributions]]:
    """Ridge on more and more rows; the number where it reaches 0.9 of the ceiling, or all of them."""
    fraction = study.spec.design.ablation_fraction  # type: ignore[union-attr]
    counts = [study.num_rows * part // 8 for part in (1, 2, 4, 6, 8)]
    fits = {count: coar.fit(study, rows=count, output=OUTPUT) for count in counts}
    found = evaluate(experiment, {str(n): fit for n, fit in fits.items()}, plan, folder, ceiling=study)
    means = found.means().query("ablation_fraction == @fraction").set_index("method")
    table = [
        {"rows": n, **means.loc[str(n), ["correlation", "low", "high", "share", "r2", "slope"]].to_dict()}
        for n in counts
    ]
    ceiling = linear_ceiling(study, output=OUTPUT)
    report.table(
        f"ridge, {fraction:.0%} ablated: linear ceiling {ceiling}; {split_half(study, output=OUTPUT)}", table
    )
    enough = [row["rows"] for row in table if row["share"] >= ENOUGH]
    return (enough or counts[-1:])[0], fits


def show(report: Report, found: Evaluation, fraction: float, costs: dict[str, float]) -> None:
    """The paper's table: a method a line, a test fraction a column; the paper's own figure beside."""
    means = found.means().set_index(["method", "ablation_fraction"])
    lines = []
    for method in found.methods:
        line: dict[str, Any] = {"method": method}
        for tested in found.truth:
            row = means.loc[(method, tested)]
            line[f"tested at {tested:.0%}"] = f"{row.correlation:.3f} [{row.low:.3f}, {row.high:.3f}]"
        own = means.loc[(method, fraction)]
        line |= {"share of the ceiling": float(own.share), "r2": float(own.r2), "slope": float(own.slope)}
        line["forwards"] = round(costs.get(method, own.forwards))
        lines.append(line | {"published (10%)": PUBLISHED.get(method, "")})
    ceiling = found.ceilings[fraction]
    report.table(f"made for {fraction:.0%} ablated, {OUTPUT}s; linear ceiling there {ceiling}", lines)


def draw(found: Evaluation) -> None:
    """Correlation against fraction, against compute, and over examples."""
    figure, axes = figures.new_figure(columns=3, width=4.6, height=3.8)
    means = found.means()
    figures.correlation_by_fraction(means, axes[0])
    fraction = next(iter(found.ceilings))
    figures.correlation_by_compute(means, fraction, axes[1])
    figures.correlation_histogram(found.table, axes[2], fraction)
    figures.save_figure(figure, ROOT / "docs/images/reproduction.png")


if __name__ == "__main__":
    main("reproduction", run)
