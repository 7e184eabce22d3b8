"""Output functions: `(model, batch) -> one number per example`, differentiable, in float32 or better.

A batch is `(inputs, labels)` or a dictionary as transformers models take it (with `labels`). The
model may return a tensor of logits or an object with `.logits` (or `.logits_per_image`).

A function may also return `[batch, k]`, or a list of one tensor per example where examples have
different numbers of values (tokens); every value becomes a column of its own.

`sign_means_correct` marks functions that are positive exactly where the model's answer is right;
accuracy can be read off their stored values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coar.errors import OutputError

OutputFunction = Callable[[nn.Module, Any], Tensor | list[Tensor]]


def sign_means_correct(function: OutputFunction) -> OutputFunction:
    """Declare that an output is > 0 exactly where the prediction is right (decorator)."""
    function.sign_means_correct = True  # type: ignore[attr-defined]
    return function


@sign_means_correct
def margin(model: nn.Module, batch: Any) -> Tensor:
    """Correct logit minus the largest other logit, [batch] (COAR's released code).

    >>> model = nn.Identity()
    >>> margin(model, (torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([2])))
    tensor([-2.])
    """
    correct, others = _correct_and_others(*logits_and_labels(model, batch))
    return correct - others.amax(dim=-1)


def log_odds(model: nn.Module, batch: Any) -> Tensor:
    """Correct logit minus the logsumexp of the others = log p / (1 - p), [batch] (TRAK, eq. 10)."""
    correct, others = _correct_and_others(*logits_and_labels(model, batch))
    return correct - others.logsumexp(dim=-1)


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy in nats, [batch]."""
    logits, labels = logits_and_labels(model, batch)
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def logit(model: nn.Module, batch: Any) -> Tensor:
    """Logit of the labelled class, [batch]."""
    logits, labels = logits_and_labels(model, batch)
    return logits.gather(-1, labels[..., None])[..., 0]


def token_margin(model: nn.Module, batch: Any) -> Tensor:
    """Mean margin of the next token over a sequence, [batch].

    Labels are `batch["labels"]`, or the `input_ids` themselves; they are shifted by one here.
    Positions with label -100, or with `attention_mask` 0 at the label, do not count.
    """
    logits, labels, counted = _next_tokens(model, batch)
    correct, others = _correct_and_others(logits, labels)
    return _mean_of_counted(correct - others.amax(dim=-1), counted)


def token_log_probability(model: nn.Module, batch: Any) -> Tensor:
    """Mean log-probability of the next token over a sequence, in nats, [batch]; never above 0.

    Labels, and which positions count, as in `token_margin`. Minus this is the mean loss; the counted
    tokens together have the probability exp(count x this).

    >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [9.0, 9.0]]])
    >>> token_log_probability(nn.Identity(), (logits, torch.tensor([[0, 1, -100]]))).exp()
    tensor([0.5000])
    """
    logits, labels, counted = _next_tokens(model, batch)
    logits = logits.masked_fill(~counted[..., None], 0.0)  # logsumexp's gradient is NaN where one is inf
    correct = logits.gather(-1, labels[..., None])[..., 0]
    return _mean_of_counted(correct - logits.logsumexp(dim=-1), counted)


@sign_means_correct
def zero_shot_margin(model: nn.Module, batch: Any) -> Tensor:
    """Margin of an image among class prompts, [batch]: logits are `logits_per_image` (CLIP).

    The batch holds `input_ids` of the prompts, `pixel_values` of the images and `labels`, so that
    ablations of the text tower count as well.
    """
    correct, others = _correct_and_others(*logits_and_labels(model, batch))
    return correct - others.amax(dim=-1)


def logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Run the model on a batch; logits in float32 or float64, labels as int64."""
    if isinstance(batch, Mapping):
        labels = batch["labels"] if "labels" in batch else batch.get("input_ids")
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        labels = batch[1]
        output = model(batch[0])
    else:
        raise OutputError(
            "this output function cannot read the batch",
            expected="(inputs, labels) or a dictionary with 'labels'",
            got=type(batch).__name__,
            todo="give the Task a collate function, or write an output function (model, batch) -> [batch]",
        )
    if labels is None:
        raise OutputError("the batch has no labels", expected="a key 'labels'", got=sorted(batch))
    logits = _logits(output)
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, labels.long()


def _logits(output: Any) -> Tensor:
    for name in ("logits", "logits_per_image"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    raise OutputError(
        "the model's result holds no logits",
        expected="a tensor, or an object with .logits or .logits_per_image",
        got=type(output).__name__,
        todo="write an output function (model, batch) -> [batch]",
    )


def _next_tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [batch, time - 1, tokens], the tokens that they speak about, and which of these count."""
    logits, labels = logits_and_labels(model, batch)
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != -100
    if isinstance(batch, Mapping) and batch.get("attention_mask") is not None:
        counted = counted & batch["attention_mask"][:, 1:].bool()
    return logits, labels.clamp_min(0), counted


def _mean_of_counted(values: Tensor, counted: Tensor) -> Tensor:
    # where, not multiplication: a padded position may hold inf, and inf * 0 is NaN
    return torch.where(counted, values, 0.0).sum(dim=1) / counted.sum(dim=1)


def _correct_and_others(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    index = labels[..., None]
    correct = logits.gather(-1, index)[..., 0]
    return correct, logits.scatter(-1, index, float("-inf"))
