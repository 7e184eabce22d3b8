"""The table of the COAR paper on a network of ours: all methods against held-out ablations.

python -m benchmarks.reproduction [--small] [--json PATH]

ResNet-56 (2,032 filters) instead of the paper's ResNet (2,304 filters) on CIFAR-10, 300 test images drawn by
seed, margins as in the paper. Rows are made once, in the folder named by COAR_BENCHMARK_ROWS (default
runs/benchmark-rows; an hour on two cores, see benchmarks/reproduction_data.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import coar
from benchmarks.gate_gradients_curves import seconds_of_row_and_pass
from benchmarks.report import ROOT, Report, main
from benchmarks.reproduction_data import FULL, SMALL, Plan, held_out_folder, one_out_folder, rows
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
PASSES = 120  # of gate gradients: less than 600 forwards at 3 to 4.5 a pass
MEASURED_PASSES = ("gate gradients", "attribution_patching", "neuron_conductance", "internal_influence")
STEPS = 20  # of path integrals
SEEDS = (0, 1, 2)  # of gates


def run(report: Report) -> None:
    """All measurements."""
    folder = Path(os.environ.get("COAR_BENCHMARK_ROWS", "runs/benchmark-rows"))
    plan = SMALL if report.small else FULL
    experiment = plan.experiment()
    times = seconds_of_row_and_pass(experiment, OUTPUT)
    cost = times["pass"] / times["row"]  # forwards of a pass, measured in turn with rows
    others = fixed(experiment, plan, folder)
    for fraction in plan.fractions:
        study = rows(folder, plan, fraction, experiment)
        regressed = regression(report, experiment, study, plan, folder)
        gates = {
            f"gate gradients, seed {seed}": coar.gate_gradients(
                experiment, fraction, passes=PASSES, seed=seed, output=OUTPUT
            )
            for seed in SEEDS
        }
        methods = {"regression": regressed, **gates, **others}
        found = evaluate(experiment, methods, plan, folder, plan.test_fractions, ceiling=study)
        show(report, found, fraction, cost)
        own = found.means().query("ablation_fraction == @fraction").set_index("method").correlation
        best = max(float(own["regression"]), float(own[list(gates)].mean()))
        report.measure(f"at_{100 * fraction:.0f}", best)
        if not report.small and fraction == plan.fractions[-1]:
            draw(found, fraction)


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
    fractions: Sequence[float],
    choice: bool = False,
    **options: Any,
) -> Evaluation:
    """All methods on the rows of the test, or on those that a choice is made on; both are run once."""
    count, seed = (plan.choice, 2) if choice else (plan.held_out, 1)
    where = held_out_folder(folder, plan)
    return coar.evaluate(experiment, methods, fractions, count, seed, directory=where, **options)


def regression(
    report: Report, experiment: coar.ComponentAblation, study: coar.Study, plan: Plan, folder: Path
) -> Attributions:
    """Ridge on as many rows as it takes to reach 0.9 of the ceiling, judged on rows of their own."""
    fraction = study.spec.design.ablation_fraction  # type: ignore[union-attr]
    table: list[dict[str, Any]] = []
    count = plan.rows // 8
    while True:
        if count > study.num_rows:
            study.extend(count)
        study.run()
        fitted = coar.fit(study, rows=count, output=OUTPUT)
        found = evaluate(experiment, {"it": fitted}, plan, folder, [fraction], choice=True, ceiling=study)
        row = found.means().iloc[0]
        figures_of_fit = ("correlation", "low", "high", "share", "r2", "slope")
        table.append({"rows": count, **{name: float(row[name]) for name in figures_of_fit}})
        if row.share >= ENOUGH or count >= plan.most_rows:
            break
        count = min(plan.most_rows, 2 * count if count < plan.rows else count + plan.rows // 2)
    ceiling, halves = linear_ceiling(study, output=OUTPUT), split_half(study, output=OUTPUT)
    title = f"ridge, {fraction:.0%} ablated, rows of the choice; linear ceiling {ceiling}; {halves}"
    report.table(title, table)
    return fitted


def show(report: Report, found: Evaluation, fraction: float, cost: float) -> None:
    """The paper's table: a method a line, a test fraction a column; the paper's own figure beside."""
    for method, known in found.costs.items():
        if known.forwards and known.family in MEASURED_PASSES:  # nominally, a pass is three forwards
            found.costs[method] = replace(known, forwards=known.forwards * cost / 3)
    means = found.means().set_index(["method", "ablation_fraction"])
    lines = []
    for method in found.methods:
        line: dict[str, Any] = {"method": method}
        for tested in found.truth:
            row = means.loc[(method, tested)]
            line[f"tested at {tested:.0%}"] = f"{row.correlation:.3f} [{row.low:.3f}, {row.high:.3f}]"
        own = means.loc[(method, fraction)]
        line |= {"share of the ceiling": float(own.share), "r2": float(own.r2), "slope": float(own.slope)}
        line["forwards"] = round(own.forwards)
        lines.append(line | {"published (10%)": PUBLISHED.get(method.split(",")[0], "")})
    ceiling = found.ceilings[fraction]
    report.table(f"made for {fraction:.0%} ablated, {OUTPUT}s; linear ceiling there {ceiling}", lines)


def draw(found: Evaluation, fraction: float) -> None:
    """Correlation against fraction, against compute, and over examples."""
    figure, axes = figures.new_figure(columns=2, width=6.4, height=4.2)
    means = found.means()
    figures.correlation_by_fraction(means, axes[0])
    figures.correlation_by_compute(means, fraction, axes[1])
    figures.save_figure(figure, ROOT / "docs/images/reproduction.png")


if __name__ == "__main__":
    main("reproduction", run)
