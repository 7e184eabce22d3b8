"""Gate gradients: held-out correlation against regressions and baselines, and what each costs.

python -m benchmarks.gate_gradients [--small] [--json PATH]

Regressions need rows: they are made once, in the folder named by COAR_BENCHMARK_ROWS (default
runs/benchmark-rows; two hours on two cores, see benchmarks/gate_gradients_data.py), and their time is the
time of a row, measured here in turn with passes, times their number, plus the fit. The method was fixed
on ResNet-20; the other networks are tests.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.gate_gradients_curves import Bench, noise_figure, over_seeds
from benchmarks.gate_gradients_data import FRACTION, NETWORKS, SMALL
from benchmarks.gate_gradients_figures import draw_curves, draw_scaling
from benchmarks.gate_gradients_size import measure_size
from benchmarks.report import ROOT, Report, main
from coar.attributions import Attributions
from coar.baselines import (
    attribution_patching,
    gradient_x_parameter,
    integrated_gradients,
    kept_mean,
    uniform_gradient_sampling,
)

SEEDS = (0, 1, 2)
FEW = (20, 60)  # passes with two and with three replicates
OWN_FRACTIONS = (0.05, 0.10, 0.30)
Rows = list[dict[str, Any]]


def run(report: Report) -> None:
    """All measurements."""
    folder = Path(os.environ.get("COAR_BENCHMARK_ROWS", "runs/benchmark-rows"))
    if report.small:
        small(report, folder / "small")
        return
    scaling: Rows = []
    curves: dict[str, Rows] = {}
    resnet20 = Bench(NETWORKS["resnet20"], folder)
    curves["resnet20"] = against_ridge(
        report, resnet20, (40, 80, 160, 320), (500, 1_000, 2_000, 4_000), scaling
    )
    baselines(report, resnet20, 40, (500, 1_000, 4_000))
    own_fraction(report, resnet20, 80)
    resnet56 = Bench(NETWORKS["resnet56"], folder)
    rows = (500, 1_000, 2_000, 4_000, 6_000)
    curves["resnet56"] = against_ridge(report, resnet56, (40, 80, 200), rows, scaling)
    for name in ("vit", "gpt2_deep"):
        curves[name] = against_patching(report, Bench(NETWORKS[name], folder), scaling)
    for name in ("resnet8",):
        network = NETWORKS[name]
        sizes = tuple(network.rows // k for k in (8, 4, 2, 1))
        bench = Bench(network, folder)
        curves[name] = curve(report, bench, bench.outputs[0], (40, 80, 160), sizes, scaling)
    report.table("compute to reach 0.9 of the linear ceiling", scaling)
    draw_curves(curves, ROOT / "docs/images/gate_gradients_curves.png")
    draw_scaling(scaling, ROOT / "docs/images/gate_gradients_scaling.png")
    measure_size(report)


def small(report: Report, folder: Path) -> None:
    """A look at ResNet-20 on few images; most claims need the whole run."""
    bench = Bench(SMALL, folder)
    curve(report, bench, bench.outputs[0], (40, 80), (200, 400), [])
    for claim in (
        *("resnet20_speedup", "resnet56_speedup", "resnet56_ceiling", "vit_ceiling", "gpt2_ceiling"),
        *("vit_above_patching", "gpt2_above_patching", "own_fraction", "size_seconds", "size_memory"),
        *("resnet50_pass", "size_llm"),
    ):
        report.not_run(claim, "only in a full run")


def curve(
    report: Report,
    bench: Bench,
    output: str,
    cuts: tuple[int, ...],
    sizes: tuple[int, ...],
    scaling: Rows,
    seeds: tuple[int, ...] = SEEDS,
) -> Rows:
    """Correlation against cost, gate gradients (with and without pooling) and ridge; one output."""
    cost = bench.seconds["pass"] / bench.seconds["row"]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    ends = []  # of each seed, with the most passes
    for seed in seeds:
        for passes in FEW:
            few = bench.alone(output, seed, passes)
            found.setdefault(("gate gradients", passes), []).append(bench.score(few))
        for passes, last, pooled in bench.gates(output, seed, cuts):
            found.setdefault(("gate gradients", passes), []).append(bench.score(last))
            found.setdefault(("gate gradients, pooled", passes), []).append(bench.score(pooled))
        ends.append(last)
    fits = []
    for seed in bench.network.seeds:
        for size in sizes:
            attributions, seconds = bench.ridge(seed, output, size)
            found.setdefault(("ridge", size), []).append(bench.score(attributions))
            fits.append(seconds)
    ceiling = bench.ceiling(ends)
    rows = []
    for (name, count), scores in sorted(found.items()):
        forwards = count if name == "ridge" else count * cost
        row = {"method": name, "passes or rows": count, "forwards": forwards, **over_seeds(scores)}
        rows.append(row | {"of the ceiling": row["correlation"] / ceiling})
    p = len(bench.experiment.components)
    report.table(
        f"{bench.network.name}, {p:,} components, {output}, {FRACTION:.0%} ablated: linear ceiling "
        f"{ceiling:.3f}, a pass costs {cost:.2f} forwards",
        rows,
    )
    scaling += reach(bench.network.name, p, rows, noise_figure(ends[0]), max(fits))
    return rows


def reach(name: str, p: int, rows: Rows, noise: float, fit_seconds: float) -> Rows:
    """Forwards at which each method is at 0.9 of the ceiling, interpolated in their logarithm."""
    found = {"network": name, "p": p, "c^2": noise}
    for method in ("gate gradients", "ridge"):
        own = sorted((row["forwards"], row["of the ceiling"]) for row in rows if row["method"] == method)
        found[f"{method}, forwards"] = forwards_to(own, 0.9)
    return [found | {"fit, seconds": fit_seconds}]


def forwards_to(points: list[tuple[float, float]], share: float) -> str:
    """Cost of a share of the ceiling; "<=" where the cheapest is there already, ">" where none is."""
    if points[0][1] >= share:
        return f"<= {points[0][0]:.0f}"
    for (cost, low), (more, high) in itertools.pairwise(points):
        if high >= share:
            part = (share - low) / (high - low)
            return f"{math.exp(math.log(cost) + part * math.log(more / cost)):.0f}"
    return f"> {points[-1][0]:.0f}"


def against_ridge(
    report: Report, bench: Bench, cuts: tuple[int, ...], sizes: tuple[int, ...], scaling: Rows
) -> Rows:
    """How much sooner gate gradients are as good as the largest regression; both outputs."""
    name = bench.network.name
    log_odds = curve(report, bench, "log_odds", cuts, sizes, scaling)
    curve(report, bench, "margin", cuts[:2], sizes[-1:], [], seeds=SEEDS[:1])
    ridge = next(row["correlation"] for row in log_odds if row["passes or rows"] == sizes[-1])
    own = sorted(
        (row for row in log_odds if row["method"] == "gate gradients"),
        key=lambda row: int(row["passes or rows"]),
    )
    enough = next((row["passes or rows"] for row in own if row["correlation"] >= ridge), None)
    if name == "resnet56":
        best = max(row["of the ceiling"] for row in own if row["passes or rows"] <= 200)
        report.measure("resnet56_ceiling", best)
    if enough is None:
        report.not_run(f"{name}_speedup", f"gate gradients do not reach {ridge:.3f} in {cuts[-1]} passes")
        return log_odds
    seconds = statistics.median(bench.wall("log_odds", enough, seed) for seed in SEEDS)
    fit = bench.ridge(0, "log_odds", sizes[-1])[1]
    regression = sizes[-1] * bench.seconds["row"] + fit
    report.table(
        f"{name}: equal correlation",
        [
            {"what": f"ridge, {sizes[-1]:,} rows", "correlation": ridge, "seconds": regression},
            {
                "what": f"gate gradients, {enough} passes, start included",
                "correlation": next(r["correlation"] for r in own if r["passes or rows"] == enough),
                "seconds": seconds,
            },
        ],
    )
    report.measure(f"{name}_speedup", regression / seconds)
    return log_odds


def baselines(report: Report, bench: Bench, passes: int, sizes: tuple[int, ...]) -> None:
    """Other ways at comparable cost, or more; those that draw with every seed, each with its own rows."""
    experiment, output = bench.experiment, "log_odds"
    options: dict[str, Any] = {"output": output, "progress": False}
    near = attribution_patching(experiment, gates=1 - FRACTION, **options)
    found: dict[str, list[Attributions]] = {
        "attribution patching": [attribution_patching(experiment, **options)],
        f"attribution patching, all gates at {1 - FRACTION:g}": [near],
        "gradient x parameter": [gradient_x_parameter(experiment, **options)],
        "integrated gradients over all gates": [integrated_gradients(experiment, passes, **options)],
    }
    for seed in SEEDS:
        options["seed"] = seed
        gates = bench.alone(output, seed, passes)
        drawn = {
            "gate gradients": gates,
            "kept mean": kept_mean(experiment, FRACTION, passes, **options),
            "uniform gradient sampling": uniform_gradient_sampling(experiment, FRACTION, passes, **options),
        }
        for size in sizes if seed in bench.network.seeds else ():
            drawn[f"ridge, {size:,} rows"] = bench.ridge(seed, output, size)[0]
            for name, prior in (("patching", near), ("gate gradients", gates)):
                drawn[f"hybrid: {size:,} rows, prior {name}"] = bench.hybrid(prior, size, seed)
        for name, attributions in drawn.items():
            found.setdefault(name, []).append(attributions)
    rows = []
    for name, each in found.items():
        spent = each[0].provenance.get("forwards", each[0].provenance.get("rows"))
        rows.append({"method": name, "forwards": spent, **over_seeds([bench.score(one) for one in each])})
    report.table(f"{bench.network.name}: baselines, {output}, {FRACTION:.0%} ablated", rows)


def own_fraction(report: Report, bench: Bench, passes: int) -> None:
    """Attributions made for a fraction, tested at each; every seed has to win."""
    scores: dict[tuple[float, float], list[float]] = {}
    margins = []
    for seed in SEEDS:
        made = {f: bench.alone("log_odds", seed, passes, f) for f in OWN_FRACTIONS}
        for tested in OWN_FRACTIONS:
            here = {f: bench.score(found, tested)["correlation"] for f, found in made.items()}
            for f, score in here.items():
                scores.setdefault((tested, f), []).append(score)
            margins.append(here[tested] - max(score for f, score in here.items() if f != tested))
    rows = [
        {
            "tested at": tested,
            **{f"made for {f:g}": statistics.fmean(scores[tested, f]) for f in OWN_FRACTIONS},
        }
        for tested in OWN_FRACTIONS
    ]
    report.table(f"{bench.network.name}: each fraction has its own attributions, {len(SEEDS)} seeds", rows)
    report.measure("own_fraction", min(margins))


def against_patching(report: Report, bench: Bench, scaling: Rows) -> Rows:
    """Share of the ceiling within 100 passes; differences to attribution patching, hybrid, ridge."""
    name, output = bench.network.name, bench.outputs[0]
    claim = name.removesuffix("_deep")
    sizes = (bench.network.rows // 4, bench.network.rows)
    found = curve(report, bench, output, (40, 80), sizes, scaling)
    best = max(row["of the ceiling"] for row in found if row["method"] == "gate gradients")
    report.measure(f"{claim}_ceiling", best)
    options: dict[str, Any] = {"output": output, "progress": False}
    near = attribution_patching(bench.experiment, gates=1 - FRACTION, **options)
    peers = {
        "attribution patching": attribution_patching(bench.experiment, **options),
        f"attribution patching, all gates at {1 - FRACTION:g}": near,
        "gradient x parameter": gradient_x_parameter(bench.experiment, **options),
        f"ridge, {sizes[-1]:,} rows": bench.ridge(0, output, sizes[-1])[0],
        f"hybrid: {sizes[-1]:,} rows, prior patching": bench.hybrid(near, sizes[-1]),
    }
    lows = []
    for seed in SEEDS:
        gates = bench.alone(output, seed, 80)
        methods = {"gate gradients": gates, **peers}
        if seed == 0:
            methods["hybrid, prior gate gradients"] = bench.hybrid(gates, sizes[-1])
        evaluation = bench.evaluation(methods)
        others = [other for other in methods if other != "gate gradients"]
        compared = {other: evaluation.compare("gate gradients", other).iloc[0] for other in others}
        lows += [compared[other]["low"] for other in others if other.startswith("attribution patching")]
        if seed == 0:
            report.table(f"{name}: baselines, {output}", evaluation.means().to_dict("records"))
            report.table(
                f"{name}: gate gradients minus the other, paired, first seed",
                [
                    {"other": other, **{key: float(row[key]) for key in ("difference", "low", "high")}}
                    for other, row in compared.items()
                ],
            )
    report.measure(f"{claim}_above_patching", float(min(lows)))  # of all seeds
    return found


if __name__ == "__main__":
    main("gate_gradients", run)
