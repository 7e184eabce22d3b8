"""The small GPT-2s of data/models, on tinyshakespeare.txt: the part of `scripts.train_models` about text.

The first 90 % of the characters train; of the rest, the first half chose settings, the second half tests.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coar.files import sha256
from coar.progress import progress_bar
from coar.tasks.data_folder import find_data
from coar.tasks.gpt2_network import POSITIONS, build_gpt2

if TYPE_CHECKING:
    from scripts.train_models import Files, Settings

TEXT = "tinyshakespeare.txt"
VOCABULARY = "gpt2_vocabulary.json"  # one file for all, which read the same text
DROPOUT, WARM_UP = 0.1, 0.1


def read_text() -> str:
    """The whole text."""
    return find_data(TEXT).read_text(encoding="utf-8")


def split_text(text: str) -> dict[str, str]:
    """Parts that train, choose and test.

    >>> {name: len(part) for name, part in split_text("x" * 1000).items()}
    {'train': 900, 'choosing': 50, 'test': 50}
    """
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    return {"train": text[:first], "choosing": text[first:second], "test": text[second:]}


def make_vocabulary(text: str) -> dict[str, int]:
    """Token of every character, in the order of their code points."""
    return {character: token for token, character in enumerate(sorted(set(text)))}


def train(network: str, settings: Settings) -> tuple[nn.Module, Files]:
    """Predict every next character of random passages; an epoch reads as many as the text has."""
    text = read_text()
    vocabulary = make_vocabulary(text)
    tokens = encode(split_text(text)["train"], vocabulary)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = build_gpt2(len(vocabulary), DROPOUT, network).train()
    steps = len(tokens) // (POSITIONS * settings.batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps, pct_start=WARM_UP
    )
    with progress_bar(settings.epochs * steps, f"training {network}, steps") as bar:
        for epoch in range(settings.epochs):
            total = 0.0
            for _ in range(steps):
                starts = torch.randint(len(tokens) - POSITIONS, (settings.batch, 1), generator=generator)
                passages = tokens[starts + torch.arange(POSITIONS + 1)]
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(passages[:, :-1]).logits
                loss = functional.cross_entropy(logits.float().flatten(0, 1), passages[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item()
                bar.update(1)
            print(f"{network}: epoch {epoch + 1} of {settings.epochs}, loss {total / steps:.3f}", flush=True)
    content = (json.dumps(vocabulary, indent=0) + "\n").encode()
    return model.eval(), {"vocabulary": (VOCABULARY, content)}


def measure(model: nn.Module, only_choosing: bool = False) -> dict[str, Any]:
    """Loss in nats per character and share of right guesses, on passages of 128 that did not train."""
    text = read_text()
    vocabulary, parts = make_vocabulary(text), split_text(text)
    names = ["choosing"] if only_choosing else ["choosing", "test"]
    found = {name: next_character(model, encode(parts[name], vocabulary)) for name in names}
    return {
        "loss": {name: loss for name, (loss, _) in found.items()},
        "accuracy": {name: accuracy for name, (_, accuracy) in found.items()},
    }


@torch.no_grad()
def next_character(model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy over disjoint passages, each read from its own beginning."""
    passages = tokens[: len(tokens) // POSITIONS * POSITIONS].view(-1, POSITIONS)
    losses, right = [], []
    for some in passages.split(100):
        logits, answers = model(some[:, :-1]).logits.flatten(0, 1), some[:, 1:].flatten()
        losses.append(functional.cross_entropy(logits, answers, reduction="none"))
        right.append(logits.argmax(dim=1) == answers)
    return torch.cat(losses).double().mean().item(), torch.cat(right).double().mean().item()


def encode(text: str, vocabulary: dict[str, int]) -> Tensor:
    """Tokens of a text, [characters]."""
    return torch.tensor([vocabulary[character] for character in text])


def training_data() -> dict[str, Any]:
    """What the record says about the data."""
    text = read_text()
    return {
        "data": TEXT,
        "data_sha256": sha256(find_data(TEXT).read_bytes()),
        "training_characters": len(split_text(text)["train"]),
        "dropout": DROPOUT,
    }
