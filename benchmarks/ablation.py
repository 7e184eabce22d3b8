"""Ablation at the speed of the bare model: rows and gate-gradient passes, against the limit and a peer.

python -m benchmarks.ablation [--small] [--json PATH]

The limit is the bare forward pass, no masks, no outputs kept, in the fastest setting found here: layout,
batch size, BatchNorm folded (by torch.fx), torch.compile; memory that one pass frees is kept for the next
in all of them, see coar/experiments/memory.py. The peer is the procedure of the COAR paper's code, see
benchmarks/published.py.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import coar
from benchmarks.published import Images, PublishedProcedure
from benchmarks.report import Report, main, median_seconds, ratio
from coar.experiments.examples import Examples
from coar.experiments.memory import keep_freed_memory
from coar.experiments.private_model import DTYPES, PrivateModel
from coar.gates import GatedActivations
from coar.outputs import margin
from coar.precision import compare_precision
from coar.tasks import cifar
from coar.tasks.data_folder import find_data

FRACTION = 0.05
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


def run(report: Report) -> None:
    """All measurements."""
    torch.manual_seed(0)
    keep_freed_memory()  # for the limit as for ours
    images = 100 if report.small else 500
    repeats = 3 if report.small else 15
    images20 = cifar_task(images)
    rows_on(report, "ResNet-20, CPU", images20, torch.device("cpu"), repeats, ("cpu_overhead", "cpu_speedup"))
    resnet50 = _torchvision_resnet50()
    if resnet50 is None:
        report.not_run("resnet50_overhead", "torchvision is not installed")
    else:
        task = make_task(resnet50, 4 if report.small else 16, 224)
        rows_on(report, "ResNet-50, CPU", task, torch.device("cpu"), repeats, ("resnet50_overhead", None))
    passes(report, images20, torch.device("cpu"), repeats)
    if torch.cuda.is_available():
        cuda = cifar_task(10_000)
        rows_on(
            report, "ResNet-20, GPU", cuda, torch.device("cuda"), repeats, ("gpu_overhead", "gpu_speedup")
        )
    else:
        report.not_run("gpu_overhead", "no CUDA device")
        report.not_run("gpu_speedup", "no CUDA device")


def cifar_task(images: int) -> coar.Task:
    """The trained ResNet-20 and real images (repeated where the sample has fewer)."""
    model = cifar.make_task("resnet20", small=True, num_examples=2).model
    with np.load(find_data("cifar10_sample.npz")) as sample:
        pixels, labels = sample["test_images"], sample["test_labels"]
    chosen = np.arange(images) % len(pixels)
    dataset = Images(pixels[chosen], labels[chosen], cifar.MEAN, cifar.DEVIATION)
    return coar.Task(model, dataset, outputs={"margin": margin}, device="cpu")


def make_task(model: nn.Module, images: int, size: int) -> coar.Task:
    """Random weights, random images: for speed, what they show does not matter."""
    generator = np.random.Generator(np.random.Philox(0))
    pixels = generator.integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, images)
    return coar.Task(model.eval(), Images(pixels, labels), outputs={"margin": margin}, device="cpu")


def rows_on(
    report: Report,
    title: str,
    task: coar.Task,
    device: torch.device,
    repeats: int,
    claims: tuple[str, str | None],
) -> None:
    """One row, ours against limit and peer."""
    settings = bare_settings(task, device, "float32", compiled=not report.small)
    found = {name: statistics.median(times) for name, times in median_seconds(settings, 3).items()}
    best = min(found, key=found.__getitem__)
    best_eager = min((name for name in found if "compiled" not in name), key=found.__getitem__)
    masks = coar.Bernoulli(ablation_fraction=FRACTION).masks(range(50), len(coar.find_components(task.model)))
    published, turn = PublishedProcedure(task.model, task.dataset, device), iter(np.tile(masks, (100, 1)))
    actions: dict[str, Callable[[], object]] = {
        "limit": settings[best],
        "limit without torch.compile": settings[best_eager],
        "ours": our_row(task, device, masks),
        "published procedure": lambda: published(next(turn)),
    }
    if not report.small:
        actions["ours, compiled"] = our_row(task, device, masks, compiled=True)
    if claims[1]:
        actions["ours, bfloat16"] = our_row(task, device, masks, precision="bfloat16")
    times = median_seconds(actions, repeats)
    published.close()
    limit = times["limit"]
    rows = [
        {"what": name, "seconds": statistics.median(values), "of the limit": ratio(values, limit)}
        for name, values in times.items()
    ]
    for row in rows:
        row["setting"] = {"limit": best, "limit without torch.compile": best_eager}.get(str(row["what"]), "")
    report.table(f"{title}: a row of {len(task)} images", rows)
    ours = "ours, compiled" if "compiled" in best else "ours"
    report.measure(claims[0], ratio(times[ours], limit))
    if claims[1]:
        peer = times["published procedure"]
        report.measure(claims[1], ratio(peer, times[ours]))
        low = "ours, bfloat16" if bfloat16_passes(report, title, task, device) else ours
        if device.type == "cpu":
            report.measure(f"{claims[1]}_bfloat16", ratio(peer, times[low]))


def bfloat16_passes(report: Report, title: str, task: coar.Task, device: torch.device) -> bool:
    """Whether a study of these masks may run in bfloat16: the check that every study makes."""
    experiment = coar.ComponentAblation(task, coar.find_components(task.model))
    design = coar.Bernoulli(ablation_fraction=FRACTION)
    found = compare_precision(experiment, design, "bfloat16", device)
    report.table(f"{title}: correlation of outputs with float32 over masks, per image", [found])
    return bool(found["passes"])


def our_row(
    task: coar.Task,
    device: torch.device,
    masks: np.ndarray,
    compiled: bool = False,
    precision: str = "float32",
) -> Callable[[], object]:
    """A row of a study: another mask each time, outputs on the host."""
    experiment = coar.ComponentAblation(task, coar.find_components(task.model))
    runner = experiment.prepare(device, None, precision, compiled=compiled)
    turn = iter(np.tile(masks, (100, 1)))
    return lambda: runner(next(turn)[None])


def bare_settings(
    task: coar.Task, device: torch.device, precision: str, compiled: bool
) -> dict[str, Callable[[], object]]:
    """The forward pass alone, examples on the device, in every setting tried."""
    images = task.batch(range(len(task)))[0].to(device, DTYPES[precision])
    found = {}
    for layout, memory_format in LAYOUTS.items():
        model = fuse(copy.deepcopy(task.model)).to(device, DTYPES[precision]).requires_grad_(False)
        model = model.to(memory_format=memory_format)
        placed = images.contiguous(memory_format=memory_format)
        for size in sorted({min(size, len(images)) for size in (16, 32, 64, 128, 500, 2_000)}):
            found[f"{layout}, batches of {size}"] = _bare(model, placed.split(size), device)
        if compiled and layout == "channels last":
            fast = torch.compile(model)
            for size in sorted({min(size, len(images)) for size in (64, 128)}):
                found[f"{layout}, batches of {size}, compiled"] = _bare(fast, placed.split(size), device)
    return found


def _bare(model: nn.Module, batches: tuple[Tensor, ...], device: torch.device) -> Callable[[], object]:
    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return forward


def passes(report: Report, task: coar.Task, device: torch.device, repeats: int) -> None:
    """A gate-gradient pass (one forward and one backward, a gate vector per example) in bare forwards."""
    table: list[dict[str, Any]] = []
    for precision in ("float32", "bfloat16"):
        settings = bare_settings(task, device, precision, compiled=not report.small)
        found = {name: statistics.median(values) for name, values in median_seconds(settings, 3).items()}
        best = min(found, key=found.__getitem__)
        sizes = sorted({min(size, len(task)) for size in (32, 64, 128)})
        actions = {f"pass, batches of {size}": gate_pass(task, device, precision, size) for size in sizes}
        for size in () if report.small else (64, 128):
            compiled = gate_pass(task, device, precision, size, compiled=True)
            actions[f"pass, batches of {size}, compiled"] = compiled
        warm = {name: statistics.median(values) for name, values in median_seconds(actions, 3).items()}
        chosen = min(warm, key=warm.__getitem__)  # first chosen, then timed
        times = median_seconds({"limit": settings[best]} | actions, repeats)
        forwards = {name: ratio(values, times["limit"]) for name, values in times.items()}
        for name, values in times.items():
            seconds = statistics.median(values)
            row = {"precision": precision, "what": name, "seconds": seconds, "forwards": forwards[name]}
            table.append(row | {"setting": {"limit": best, chosen: "chosen beforehand"}.get(name, "")})
        report.measure(f"pass_{precision}", forwards[chosen])
    report.table(f"gate-gradient pass over {len(task)} images, ResNet-20", table)


def gate_pass(
    task: coar.Task, device: torch.device, precision: str, batch_size: int, compiled: bool = False
) -> Callable[[], object]:
    """Derivatives of every example's margin by every gate, [examples, components]."""
    components = coar.find_components(task.model)
    private = PrivateModel(task, (components, "keep", "zero", None), device, precision)
    private.model.requires_grad_(False)
    gated = GatedActivations(private.model, components, sites=private.sites, fused=True)
    examples = Examples(task, device, private.dtype, private.channels_last)

    def outputs(gates: Tensor, batch: Any) -> Tensor:
        with gated.at(gates):
            return margin(private.model, batch)

    forward = torch.compile(outputs) if compiled else outputs

    def run_pass() -> Tensor:
        found = []
        for count, batch in examples.batches(batch_size):
            gates = torch.rand(count, len(components), device=device).requires_grad_()
            found.append(torch.autograd.grad(forward(gates, batch).sum(), gates)[0])
        return torch.cat(found)

    return run_pass


def _torchvision_resnet50() -> nn.Module | None:
    try:
        from torchvision.models import resnet50
    except ImportError:
        return None
    return resnet50()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")  # of the compiler: no CUDA here, and the like
    main("ablation", run)
