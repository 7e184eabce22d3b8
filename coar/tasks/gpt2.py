"""GPT-2 on stories: the mean margin of the next token as output.

As published: the last 500 stories of TinyStories' validation split, in order, cut at the length
that the model takes, padded on the right; padding does not count.

`small=True` takes a small GPT-2 that reads Shakespeare letter by letter (`coar.tasks.gpt2_network` has
two), and 200 passages that it was not trained on. Both are in the data folder: nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coar.errors import SettingError, TaskError
from coar.outputs import token_margin
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.data_folder import read_sample
from coar.tasks.libraries import library

MODEL, STORIES, NUM_EXAMPLES = "gpt2", "roneneldan/TinyStories", 500
IGNORED = -100  # the label that no output counts
TEXT, SMALL_LENGTH = "shakespeare_sample.txt", 128


@task_factory
def make_task(
    *,
    data: str | None = None,
    model: str | None = None,
    small: bool = False,
    network: str | None = None,
    num_examples: int | None = None,
    max_length: int | None = None,
    device: str = "auto",
) -> Task:
    """The GPT-2 task: stories, the mean margin of the next token as output `token_margin`.

    Args:
        data: name of a data set for `datasets.load_dataset`, or a folder that its `save_to_disk` wrote;
            its split `validation` is used, and its column `text`. With `small`, a text file,
            which is cut into passages.
        model: name of a model on the Hugging Face hub, or a folder with model and tokenizer.
        small: a small GPT-2 over characters, on passages of Shakespeare.
        network: which small one: "gpt2" of 4 layers, which None takes too, or "gpt2_deep" of 12.
        num_examples: how many, the last ones; None is 500 stories, or all of the small text's passages.
        max_length: cut stories after so many tokens; None is the most that the model takes (small: 128).
        device: see `coar.Task`.

    Logits are large: 12 stories of 250 tokens take 600 MB with the vocabulary of GPT-2. So give
    studies a batch size (`"execution": {"batch_size": 12}`), which is 12 in the published code.

    Raises:
        SettingError: `network` without `small`, or none that there is; `num_examples` out of range.
        TaskError: model or data are not there, or a story is shorter than two tokens.

    >>> make_task(small=True, num_examples=8)                                       # doctest: +SKIP
    Task(GPT2LMHeadModel, 8 examples, outputs ['token_margin'])
    """
    load = _small if small else _published
    loaded, texts, ids, encode = load(data, model, network, num_examples, max_length)
    loaded.config.use_cache = False  # keys and values of past tokens are of no use here
    stories = [encode(text) for text in texts]
    require_two_tokens(stories, ids)
    lengths = [len(tokens) for tokens in stories]
    return Task(
        loaded.eval(),
        [{"input_ids": tokens, "text": text} for tokens, text in zip(stories, texts, strict=True)],
        outputs={"token_margin": token_margin},
        collate=collate,
        metadata={"id": ids, "text": texts, "tokens": lengths},
        show=show,
        device=device,
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad token ids on the right: `input_ids`, `attention_mask` and `labels`, each [batch, time].

    >>> batch = collate([{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8, 9])}])
    >>> batch["labels"].tolist()
    [[5, 6, 7], [8, 9, -100]]
    """
    ids = [item["input_ids"] for item in items]
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids),  # any token will do: no later one is read, and its label does not count
        "attention_mask": pad([torch.ones_like(tokens) for tokens in ids]),
        "labels": pad(ids, padding_value=IGNORED),
    }


def show(item: dict[str, Any], ax: Any) -> None:
    """Write a story on a matplotlib Axes."""
    text = textwrap.fill(item["text"][:400], width=50)
    ax.text(0, 1, text, va="top", family="monospace", size=7, parse_math=False)
    ax.set_axis_off()


# --------------------------------------------------------------------------------- where they come from

Loaded = tuple[Any, list[str], list[str], Callable[[str], Tensor]]


def _published(
    data: str | None, model: str | None, name: str | None, num_examples: int | None, max_length: int | None
) -> Loaded:
    if name is not None:
        raise SettingError(
            "network= is one of the small GPT-2s",
            expected="small=True with it",
            got=f"network={name!r} and small=False",
            todo="pass model= for a name on the hub, or a folder",
        )
    network, tokenizer = load_published(model or MODEL)
    longest = min(tokenizer.model_max_length, network.config.n_positions)
    stories = read_stories(data or STORIES)
    first = first_of_the_last(NUM_EXAMPLES if num_examples is None else num_examples, len(stories))
    texts = [str(text) for text in stories[first:]["text"]]

    def encode(text: str) -> Tensor:
        ids = tokenizer(text, truncation=True, max_length=min(max_length or longest, longest))["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    return network, texts, [str(i) for i in range(first, len(stories))], encode


def load_published(source: str) -> tuple[Any, Any]:
    """GPT-2 and its tokenizer, by name on the Hugging Face hub or out of a folder that has both."""
    transformers = library("transformers", "language")
    with _explained(f"the model {source}", "pass model=, a folder that save_pretrained wrote"):
        network = transformers.GPT2LMHeadModel.from_pretrained(source)
        return network, transformers.GPT2TokenizerFast.from_pretrained(source)


def read_stories(name: str) -> Any:
    """Validation split of a data set on the hub, or in a folder that `save_to_disk` wrote."""
    datasets = library("datasets", "language")
    with _explained(f"the data set {name}", "pass data=, a folder that save_to_disk wrote"):
        read = datasets.load_from_disk if Path(name).exists() else datasets.load_dataset
        found = read(name)
    if isinstance(found, dict):
        if "validation" not in found:
            raise TaskError("no validation split", expected="validation", got=", ".join(found))
        found = found["validation"]
    return found


def _small(
    data: str | None, model: str | None, name: str | None, num_examples: int | None, max_length: int | None
) -> Loaded:
    from coar.tasks.gpt2_network import NETWORK, small_gpt2

    if model is not None:
        raise SettingError("the small task has its own model", expected="model=None", got=repr(model))
    network: Any
    network, vocabulary = small_gpt2(network=NETWORK if name is None else name)
    length = min(max_length or SMALL_LENGTH, network.config.n_positions)
    texts = passages(data, length)
    require_known_letters(texts, vocabulary, data or TEXT)
    first = first_of_the_last(len(texts) if num_examples is None else num_examples, len(texts))

    def encode(passage: str) -> Tensor:
        return torch.tensor([vocabulary[letter] for letter in passage], dtype=torch.int64)

    return network, texts[first:], [str(i) for i in range(first, len(texts))], encode


def require_known_letters(texts: Sequence[str], vocabulary: dict[str, int], name: str) -> None:
    """Raise `TaskError` where texts, out of a file of this name, have letters without a token."""
    if unknown := sorted(set("".join(texts)) - vocabulary.keys()):
        raise TaskError(
            f"the text {name} has letters that the model does not know",
            expected="".join(vocabulary).strip(),
            got=", ".join(map(repr, unknown[:5])),
        )


def passages(data: str | None, length: int) -> list[str]:
    """The sample's passages, which did not train the model, or pieces of a text file, without rests."""
    if data is None:
        return [json.loads(line)[:length] for line in read_sample(TEXT).decode().splitlines()]
    with _explained(f"the text {data}", "pass data=, a text file in UTF-8"):
        text = Path(data).read_text(encoding="utf-8")
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]


def first_of_the_last(count: int, total: int) -> int:
    """Position of the first of the last `count` out of `total`."""
    if not 1 <= count <= total:
        raise SettingError("num_examples out of range", expected=f"1 to {total}", got=count)
    return total - count


def require_two_tokens(stories: Sequence[Tensor], ids: Sequence[str]) -> None:
    """Raise `TaskError` for a story without a next token."""
    for tokens, name in zip(stories, ids, strict=True):
        if len(tokens) < 2:
            raise TaskError(f"story {name} has no next token", expected="at least 2 tokens", got=len(tokens))


@contextlib.contextmanager
def _explained(what: str, todo: str) -> Iterator[None]:
    """Turn what the libraries raise where something is missing into an error that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        got = f"{type(error).__name__}: {error!s:.300}"
        raise TaskError(f"cannot load {what}", got=got, todo=todo) from error
