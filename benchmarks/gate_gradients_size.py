"""Size: every neuron and head of a GPT-2-small-shaped model; a pass of a ResNet-50-shaped one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import coar
from benchmarks.report import Report, median_seconds
from coar.experiments.memory import keep_freed_memory
from coar.gradients.draws import GateDraws
from coar.gradients.passes import GatePasses
from coar.plan import duration, size
from coar.recipes import task_factory

LAYERS, WIDTH, HEADS, TOKENS, VOCABULARY = 12, 768, 12, 64, 50_257
EXAMPLES, PASSES, FRACTION = 16, 20, 0.10
IMAGES = 8


@task_factory
def gpt2_shaped(examples: int = EXAMPLES) -> coar.Task:
    """The shape of GPT-2 small with random weights and tokens: for time and memory, values do not matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, use_cache=False
    )
    tokens = torch.randint(VOCABULARY, (examples, TOKENS))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]
    model = GPT2LMHeadModel(config).eval()
    return coar.Task(model, data, outputs={"token_margin": coar.outputs.token_margin}, device="cpu")


def measure_size(report: Report) -> None:
    """The large model in a process of its own; ResNet-50 here."""
    command = [sys.executable, "-m", "benchmarks.gate_gradients_size"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    report.table(
        f"GPT-2-small shape, {TOKENS} tokens, {EXAMPLES} examples, {found['passes']} passes",
        [
            {
                "components": found["components"],
                "time": duration(found["seconds"]),
                "peak memory": size(found["peak"]),
                "seconds a pass": found["seconds"] / found["passes"],
            }
        ],
    )
    report.measure("size_seconds", found["seconds"])
    report.measure("size_memory", found["peak"])
    report.not_run("size_llm", "no CUDA device" if not torch.cuda.is_available() else "not built for CUDA")
    resnet50_pass(report)


def resnet50_pass(report: Report) -> None:
    """Cost of a pass in forwards, the 22,720 filters of the paper."""
    try:
        from torchvision.models import resnet50
    except ImportError:
        report.not_run("resnet50_pass", "torchvision is not installed")
        return
    torch.manual_seed(0)
    images = [(image, 0) for image in torch.randn(IMAGES, 3, 224, 224)]
    task = coar.Task(resnet50().eval(), images, outputs={"margin": coar.outputs.margin}, device="cpu")
    experiment = coar.ComponentAblation(task, coar.find_components(task.model, published="resnet50"))
    passes = GatePasses(experiment, ["margin"], experiment.device)
    runner = experiment.prepare(experiment.device)
    count = len(experiment.components)
    draws, everything = GateDraws(FRACTION, 0, count), np.arange(IMAGES)
    _, batch = next(iter(passes.batches(everything)))
    gates = next(iter(draws.round(0, 0, everything)))
    mask = coar.Bernoulli(ablation_fraction=FRACTION).masks([0], count)
    times = median_seconds(
        {"row": lambda: runner(mask), "pass": lambda: passes.tensors(batch, gates)}, repeats=7
    )
    row, one_pass = (float(np.median(times[name])) for name in ("row", "pass"))
    report.table(
        f"ResNet-50 shape, {count:,} filters, {IMAGES} images",
        [
            {"what": "row (a forward pass with a mask)", "seconds": row, "forwards": 1.0},
            {"what": "pass of gate gradients", "seconds": one_pass, "forwards": one_pass / row},
        ],
    )
    report.measure("resnet50_pass", one_pass / row)


def main() -> None:
    """Attributions of the large model; prints seconds and peak memory as JSON."""
    keep_freed_memory()
    task = gpt2_shaped()
    kinds: list[str] = ["mlp_neuron", "attention_head"]
    experiment = coar.ComponentAblation(task, coar.find_components(task.model, kinds=kinds))
    start = time.perf_counter()
    found = coar.gate_gradients(experiment, FRACTION, passes=PASSES)
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(
        json.dumps(
            {
                "components": len(experiment.components),
                "passes": found.provenance["passes"],
                "seconds": seconds,
                "peak": peak,
                "placements": sorted(set(found.provenance["placements"].values())),
            }
        )
    )


if __name__ == "__main__":
    main()
