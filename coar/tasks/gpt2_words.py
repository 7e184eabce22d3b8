"""GPT-2 on a text, one word of it apart: how probable the word is where it comes next, and all else.

The text is cut into passages. Every passage is an example of kind `elsewhere`, in which all tokens count
but those of the word. For every time that the word stands in it, whole and with some context before, there
is an example of kind `word` as well: the passage up to the end of the word, in which only its tokens count.

The output is the mean log-probability of the tokens that count: in examples of kind `elsewhere`, minus the
loss. The probability of a word is the product over its tokens, exp(count x output): see `probabilities`.

| | model | text |
|---|---|---|
| `make_task("thou")` | small GPT-2, characters | the last 10 % of tinyshakespeare.txt |
| `small=True` | the same | 200 passages out of the last 5 %, which come along |
| `model=` | a GPT-2 of transformers, with its tokenizer | the last stories of a data set's validation split |

The last 10 % of Shakespeare trained no weight; the first half of them chose how to train
(`scripts/train_gpt2.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from coar.editing.effect import Effect
from coar.errors import SettingError, TaskError
from coar.outputs import token_log_probability
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks import gpt2
from coar.tasks.data_folder import find_data
from coar.tasks.gpt2 import IGNORED

OUTPUT, TEXT, HELD_OUT = "log_probability", "tinyshakespeare.txt", 10  # per cent of the text
MIN_CONTEXT = 16  # with less, a model can hardly know what comes next


class Passage(NamedTuple):
    """A name, a text, its tokens [time], and where each token begins and ends in the text."""

    name: str
    text: str
    tokens: Tensor
    spans: list[tuple[int, int]]


@task_factory
def make_task(
    word: str = "thou",
    *,
    small: bool = False,
    data: str | None = None,
    model: str | None = None,
    num_passages: int | None = None,
    num_elsewhere: int | None = None,
    num_places: int | None = None,
    min_context: int = MIN_CONTEXT,
    max_length: int | None = None,
    device: str = "auto",
) -> Task:
    """The task of a word: its log-probability where it comes next, and that of everything else.

    Args:
        word: which, as it is written: "thou" is neither "Thou" nor part of "without".
        small: the passages that come along, which are fewer.
        data: another text file, all of which is used (it must have trained nothing); with `model`, a data
            set as in `coar.tasks.gpt2.make_task`.
        model: name of a model on the Hugging Face hub, or a folder with model and tokenizer.
        num_passages: how many, the last ones; None is all of the text, or 500 stories.
        num_elsewhere: how many of the passages, at even distances, are examples of kind "elsewhere"; None is
            all. Word by word there are few places, so that fewer of the others do not make much less sure.
        num_places: at most so many places of the word, at even distances among all of them; None is all.
            Of a common word there are hundreds. The others count nowhere.
        min_context: tokens that must stand before the word; where there are fewer it is not counted at all.
        max_length: tokens of a passage; None is 128 characters, or the most that a `model` takes.
        device: see `coar.Task`.

    Returns:
        A task with output `log_probability`, and the metadata `id`, `kind` ("word" or "elsewhere"),
        `passage`, `word`, `text` and `counted` (tokens that count). Examples of one passage share text: draw
        parts of an edit with `pairs="passage"`.

    Raises:
        SettingError: no word, or a length or number out of range.
        TaskError: the word does not stand in the text; model or data are not there.

    >>> task = make_task("thou", small=True)                                    # doctest: +SKIP
    >>> task.metadata.kind.value_counts().to_dict()                             # doctest: +SKIP
    {'elsewhere': 200, 'word': 34}
    """
    if not word or word != word.strip():
        raise SettingError("word= is a word", expected="'thou', without spaces around it", got=repr(word))
    if num_places is not None and num_places < 1:
        raise SettingError("num_places out of range", expected="at least 1", got=num_places)
    if min_context < 1:  # the first token of a passage is never predicted
        raise SettingError("min_context out of range", expected="at least 1", got=min_context)
    if model is None:
        network, passages = _characters(data, small, num_passages, max_length)
    elif small:
        raise SettingError("the small task has its own model", expected="model=None", got=repr(model))
    else:
        network, passages = _full_size(model, data, num_passages, max_length)
    network.config.use_cache = False
    others = _spread(len(passages) if num_elsewhere is None else num_elsewhere, len(passages))
    items, metadata = _examples(passages, word, min_context, others, num_places)
    return Task(
        network.eval(),
        items,
        outputs={OUTPUT: token_log_probability},
        collate=collate,
        metadata=metadata,
        show=show,
        device=device,
    )


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right, as `coar.tasks.gpt2.collate` does, with labels where tokens count.

    >>> first = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, -100, 7])}
    >>> collate([first, {"input_ids": torch.tensor([8, 9]), "labels": torch.tensor([-100, 9])}])["labels"]
    tensor([[-100, -100,    7],
            [-100,    9, -100]])
    """
    labels = [item["labels"] for item in items]
    padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return gpt2.collate(items) | {"labels": padded}


def probabilities(task: Task, outputs: np.ndarray, examples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Probability of the tokens that count, all of them together: exp(count x mean log-probability).

    Args:
        task: made by `make_task`.
        outputs: `log_probability` of these examples, [..., examples].
        examples: their positions in the task.

    Returns:
        float64, of the shape of `outputs`; in examples of kind "word", the probability of the word.
    """
    return np.exp(np.asarray(outputs, dtype=np.float64) * _counted(task, examples))


def mean_loss(task: Task, outputs: np.ndarray, examples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Mean loss per token that counts, in nats: every token has the same weight, not every example.

    Args and shapes as in `probabilities`; returns float64 [...].
    """
    losses = -np.asarray(outputs, dtype=np.float64)
    return np.average(losses, axis=-1, weights=_counted(task, examples))


def fall(task: Task, effect: Effect, examples: Sequence[int] | np.ndarray) -> float:
    """By which share the mean probability of the word fell; 0.9 is by nine tenths.

    Args:
        task: made by `make_task`.
        effect: of an edit on these examples, in `log_probability`.
        examples: of kind "word", their positions in the task.
    """
    before, after = (probabilities(task, part, examples).mean() for part in (effect.before, effect.after))
    return float(1 - after / before)


def loss_rise(task: Task, effect: Effect, examples: Sequence[int] | np.ndarray) -> float:
    """By which share the mean loss rose; 0.01 is by one per cent.

    Args as in `fall`; examples are of kind "elsewhere".
    """
    before, after = (mean_loss(task, part, examples) for part in (effect.before, effect.after))
    return float(after / before - 1)


def _counted(task: Task, examples: Sequence[int] | np.ndarray) -> np.ndarray:
    return task.metadata["counted"].to_numpy()[np.asarray(examples)]


def show(item: dict[str, Any], ax: Any) -> None:
    """Write a passage on a matplotlib Axes; a word that is to come next stands in brackets."""
    gpt2.show({"text": item["text"][-400:]}, ax)


# ------------------------------------------------------------------------------------------- examples


def _examples(
    passages: Sequence[Passage], word: str, min_context: int, others: set[int], num_places: int | None
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Items and metadata: of each passage what is elsewhere, if it is one of `others`, then its words."""
    pattern = re.compile(rf"(?<![\w']){re.escape(word)}(?![\w'])")
    items = []
    for position, passage in enumerate(passages):
        found = [match.span() for match in pattern.finditer(passage.text)]
        places = [_tokens_in(passage, *span) for span in found]
        if position in others:
            items.append(_elsewhere(passage, [token for place in places for token in place]))
        for number, (span, place) in enumerate(zip(found, places, strict=True)):
            # At the very end it may go on, as "thou" does in "though": the passage was cut there.
            if place[0] >= min_context and span[1] < len(passage.text):
                items.append(_word(passage, span, place, f"{passage.name} {word} {number}"))
    items = [item for item in items if (item["labels"][1:] != IGNORED).any()]
    numbers = [number for number, item in enumerate(items) if item["kind"] == "word"]
    if not numbers:
        raise TaskError(
            f"{word!r} does not stand in the text",
            expected=f"it in one of {len(passages)} passages, after {min_context} tokens or more",
            got="no such place",
            todo="choose a word that is in the text, as it is written there",
        )
    kept = _spread(min(num_places or len(numbers), len(numbers)), len(numbers))
    left_out = {number for i, number in enumerate(numbers) if i not in kept}
    items = [item for number, item in enumerate(items) if number not in left_out]
    metadata = {name: [item[name] for item in items] for name in ("id", "kind", "passage", "text")}
    metadata["counted"] = [int((item["labels"][1:] != IGNORED).sum()) for item in items]
    return items, metadata | {"word": [word] * len(items)}


def _spread(count: int, total: int) -> set[int]:
    """Positions of so many out of a total, at even distances."""
    if not 1 <= count <= total:
        raise SettingError("num_elsewhere out of range", expected=f"1 to {total}", got=count)
    return {i * total // count for i in range(count)}


def _elsewhere(passage: Passage, ignored: list[int]) -> dict[str, Any]:
    labels = passage.tokens.clone()
    labels[ignored] = IGNORED
    names = {"id": passage.name, "kind": "elsewhere", "passage": passage.name, "text": passage.text}
    return {"input_ids": passage.tokens, "labels": labels, **names}


def _word(passage: Passage, span: tuple[int, int], place: list[int], name: str) -> dict[str, Any]:
    tokens = passage.tokens[: place[-1] + 1].clone()
    labels = torch.full_like(tokens, IGNORED)
    labels[place] = tokens[place]
    text = f"{passage.text[: span[0]]}[{passage.text[slice(*span)]}]"
    names = {"id": name, "kind": "word", "passage": passage.name, "text": text}
    return {"input_ids": tokens, "labels": labels, **names}


def _tokens_in(passage: Passage, start: int, stop: int) -> list[int]:
    """Positions of the tokens that have a letter of this stretch of the text."""
    return [i for i, (first, last) in enumerate(passage.spans) if first < stop and start < last]


# --------------------------------------------------------------------------------- where they come from

Loaded = tuple[Any, list[Passage]]


def _characters(data: str | None, small: bool, num_passages: int | None, max_length: int | None) -> Loaded:
    from coar.tasks.gpt2_network import small_gpt2

    network: Any
    network, vocabulary = small_gpt2()
    length = min(max_length or gpt2.SMALL_LENGTH, network.config.n_positions)
    texts = gpt2.passages(data, length) if small or data is not None else _held_out(length)
    gpt2.require_known_letters(texts, vocabulary, data or TEXT)
    first = gpt2.first_of_the_last(len(texts) if num_passages is None else num_passages, len(texts))
    return network, [
        Passage(
            str(first + i),
            text,
            torch.tensor([vocabulary[letter] for letter in text], dtype=torch.int64),
            [(k, k + 1) for k in range(len(text))],
        )
        for i, text in enumerate(texts[first:])
    ]


def _held_out(length: int) -> list[str]:
    """The end of the text that trained no weight, in passages, without rests."""
    text = find_data(TEXT).read_text(encoding="utf-8")
    text = text[len(text) * (100 - HELD_OUT) // 100 :]
    return [text[start : start + length] for start in range(0, len(text) - length + 1, length)]


def _full_size(model: str, data: str | None, num_passages: int | None, max_length: int | None) -> Loaded:
    network, tokenizer = gpt2.load_published(model)
    longest = min(tokenizer.model_max_length, network.config.n_positions)
    stories = gpt2.read_stories(data or gpt2.STORIES)
    wanted = gpt2.NUM_EXAMPLES if num_passages is None else num_passages
    first = gpt2.first_of_the_last(wanted, len(stories))
    passages = []
    for number, text in enumerate(stories[first:]["text"], start=first):
        found = tokenizer(
            text, truncation=True, max_length=min(max_length or longest, longest), return_offsets_mapping=True
        )
        spans = [(int(start), int(stop)) for start, stop in found["offset_mapping"]]
        tokens = torch.tensor(found["input_ids"], dtype=torch.int64)
        passages.append(Passage(str(number), text[: spans[-1][1]] if spans else "", tokens, spans))
    gpt2.require_two_tokens([passage.tokens for passage in passages], [p.name for p in passages])
    return network, passages
