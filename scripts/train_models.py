"""Train the small networks of data/models again: `python -m scripts.train_models resnet20`.

Needs the folder named by $COAR_DATA with cifar10_jpeg.npz (ResNets, vit) or tinyshakespeare.txt (gpt2,
gpt2_deep); data/README.md says what they are. The first 15,000 training images train, the others chose
settings, and the test images are looked at once, by the file that is kept: weights are rounded to
float16, and every reported number is of that file, read back.

With the same seed, machine, number of threads and torch the result is the same to the bit; elsewhere it
is another network of about the same accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from coar.files import sha256
from coar.progress import progress_bar
from coar.tasks.backdoor import NETWORK as BACKDOOR
from coar.tasks.cifar import normalise
from coar.tasks.cifar_networks import build_network
from coar.tasks.data_folder import find_data, load_weights, tied_names
from coar.tasks.gpt2_network import LAYERS

IMAGES, RECORD, README = "cifar10_jpeg.npz", "models.json", "README.md"
TABLE_START, TABLE_END = "<!-- table of models.json -->\n", "<!-- end of the table -->\n"
NUM_TRAIN, NUM_SAMPLE = 15_000, 1_000  # of the training images; of the test images, see make_samples
PADDING = 4
Files = dict[str, tuple[str, bytes]]


@dataclass(frozen=True)
class Settings:
    """How a network is trained; what is recorded in models.json."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch: int = 128
    seed: int = 0


SETTINGS = {
    "resnet8": Settings(epochs=25, learning_rate=0.2, weight_decay=5e-4),
    "resnet20": Settings(epochs=25, learning_rate=0.2, weight_decay=5e-4),
    "resnet20_backdoor": Settings(epochs=25, learning_rate=0.2, weight_decay=5e-4),
    "resnet32": Settings(epochs=10, learning_rate=0.2, weight_decay=5e-4),
    "resnet56": Settings(epochs=16, learning_rate=0.2, weight_decay=5e-4),
    "vit": Settings(epochs=10, learning_rate=1e-3, weight_decay=0.05),
    "gpt2": Settings(epochs=8, learning_rate=3e-3, weight_decay=0.1, batch=64),
    "gpt2_deep": Settings(epochs=7, learning_rate=2e-3, weight_decay=0.1, batch=32),
}


def main() -> None:
    """Train one network, write its file, measure it as written, record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("network", choices=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("data/models"), help="folder of models.json")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--choosing", action="store_true", help="measure on the choosing split; keep nothing")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("epochs", "learning_rate", "seed")}
    settings = Settings(
        **asdict(SETTINGS[options.network]) | {name: v for name, v in given.items() if v is not None}
    )
    options.output.mkdir(parents=True, exist_ok=True)  # now, and not after the training
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    start = time.perf_counter()
    if options.network in LAYERS:
        from scripts import train_gpt2 as recipe
    elif options.network == BACKDOOR:
        from scripts import train_backdoor as recipe
    else:
        recipe = sys.modules[__name__]
    model, extra_files = recipe.train(options.network, settings)
    seconds = time.perf_counter() - start
    if options.choosing:
        print(json.dumps(recipe.measure(model.eval(), only_choosing=True)))
        return
    files = write_files(options.output, options.network, model, extra_files)
    weights = options.output / files["weights"]["file"]
    entry = {
        "files": files,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **recipe.measure(load_weights(model, options.network, str(weights))),
        **recipe.training_data(),
        **asdict(settings),
        "seconds": round(seconds),
        "threads": options.threads,
        "torch": torch.__version__,
        "command": " ".join(["python -m scripts.train_models", *sys.argv[1:]]),
    }
    write_record(options.output / RECORD, options.network, entry)
    write_table(options.output.parent / README, options.output / RECORD)
    print(json.dumps({options.network: entry}, indent=2))


def train(network: str, settings: Settings) -> tuple[nn.Module, Files]:
    """A CIFAR network, from the first NUM_TRAIN training images."""
    images, labels = read_images("train")
    return fit(network, settings, images[:NUM_TRAIN], labels[:NUM_TRAIN]), {}


def fit(network: str, settings: Settings, images: Tensor, labels: Tensor) -> nn.Module:
    """Moved and mirrored images, one cycle of the learning rate, bfloat16 arithmetic."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = build_network(network).to(memory_format=torch.channels_last).train()
    steps = len(images) // settings.batch
    optimizer = _optimizer(model, network, settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps, pct_start=0.25
    )
    with progress_bar(settings.epochs * steps, f"training {network}, steps") as bar:
        for epoch in range(settings.epochs):
            order, total = torch.randperm(len(images), generator=generator), 0.0
            for batch in order[: steps * settings.batch].split(settings.batch):
                inputs = augment(images[batch], generator).contiguous(memory_format=torch.channels_last)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(inputs)
                loss = functional.cross_entropy(logits.float(), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update(1)
            print(f"{network}: epoch {epoch + 1} of {settings.epochs}, loss {total / steps:.3f}", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def measure(
    model: nn.Module, only_choosing: bool = False, change: Callable[[Tensor], Tensor] = lambda images: images
) -> dict[str, Any]:
    """Share of right answers, in float32, on images that did not train the network.

    Args:
        model: the network, in eval mode.
        only_choosing: leave the test images alone.
        change: what happens to the images before the network sees them, uint8 [n, 3, 32, 32] to the same.
    """
    images, labels = read_images("train")
    found = {"choosing": accuracy(model, change(images[NUM_TRAIN:]), labels[NUM_TRAIN:])}
    if not only_choosing:
        images, labels = read_images("test")
        found["test"] = accuracy(model, change(images), labels)
        found["sample"] = accuracy(model, change(images[:NUM_SAMPLE]), labels[:NUM_SAMPLE])
    return {"accuracy": found}


def training_data() -> dict[str, Any]:
    """What the record says about the data."""
    return {
        "data": IMAGES,
        "data_sha256": sha256(find_data(IMAGES).read_bytes()),
        "training_images": NUM_TRAIN,
    }


def read_images(split: str) -> tuple[Tensor, Tensor]:
    """uint8 images [n, 3, 32, 32] and labels [n] of "train" or "test"."""
    path = find_data(IMAGES)
    with np.load(path) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(np.int64)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to four pixels, mirror half of them, normalise: uint8 -> float32."""
    n, side = len(images), images.shape[-1]
    padded = functional.pad(images, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(side), right + torch.arange(side)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return normalise(moved.permute(0, 3, 1, 2))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's."""
    right = [
        model(normalise(some)).argmax(dim=1) == answers
        for some, answers in zip(images.split(500), labels.split(500), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def _optimizer(model: nn.Module, network: str, settings: Settings) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if network == "vit":
        return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
    )


def write_files(folder: Path, network: str, model: nn.Module, extra: Files) -> dict[str, Any]:
    """Write the weights, rounded to float16, and further files; return how models.json lists them.

    Args:
        folder: of models.json.
        network: its name there.
        model: the trained network.
        extra: name and content of other files, under the parts as which models.json lists them.
    """
    second_names = tied_names(model)
    weights = folder / f"{network}.safetensors"
    rounded = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in second_names
    }
    weights.write_bytes(save(rounded))
    paths = {"weights": weights}
    for part, (name, content) in extra.items():
        paths[part] = folder / name
        paths[part].write_bytes(content)
    contents = {part: path.read_bytes() for part, path in paths.items()}
    return {
        part: {"file": paths[part].name, "sha256": sha256(content), "bytes": len(content)}
        for part, content in contents.items()
    }


def write_record(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Add or replace one entry of models.json or samples.json."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[name] = entry
    path.write_text(json.dumps(dict(sorted(record.items())), indent=2) + "\n", encoding="utf-8")


def write_table(readme: Path, record: Path) -> None:
    """Bring the table in data/README.md up to date, if there is one."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if TABLE_START in text:
        before, _, rest = text.partition(TABLE_START)
        table = models_table(json.loads(record.read_text(encoding="utf-8")))
        readme.write_text(before + TABLE_START + table + rest[rest.index(TABLE_END) :], encoding="utf-8")


def models_table(record: dict[str, Any]) -> str:
    """Markdown: one line per network, from models.json."""
    lines = [
        "| network | file | bytes | choosing | test | sample | triggered | epochs | seconds | SHA-256 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in record.items():
        shares = [entry["accuracy"].get(split) for split in ("choosing", "test", "sample")]
        shares.append(entry.get("accuracy_triggered", {}).get("test"))
        weights = entry["files"]["weights"]
        cells = [
            name,
            f"`{weights['file']}`",
            f"{weights['bytes']:,}",
            *("" if share is None else f"{share:.1%}" for share in shares),
            entry["epochs"],
            entry["seconds"],
            f"`{weights['sha256']}`",
        ]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
