"""Reading outputs off a model: one forward pass for several outputs, columns in example order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.errors import OutputError


class SharedForward:
    """Takes the place of a private copy's `forward`, so that several outputs share one pass per batch."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._forward = model, model.forward
        # Kept, not only their ids: a freed tensor's id may be given to another.
        self._inputs: Any = None
        self._result: Any = None
        model.forward = self

    def clear(self) -> None:
        """Forget the last result: another mask or batch follows."""
        self._inputs = self._result = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, computed once per batch and mask."""
        inputs = (args, kwargs | {"parameters of the model": list(self._model.parameters())})
        if self._inputs is None or not _same_objects(self._inputs, inputs):
            self._result = self._forward(*args, **kwargs)
            self._inputs = inputs
        return self._result


def _same_objects(ours: Any, theirs: Any) -> bool:
    (args, kwargs), (other_args, other_kwargs) = ours, theirs
    if len(args) != len(other_args) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = [*zip(args, other_args, strict=True), *((kwargs[key], other_kwargs[key]) for key in kwargs)]
    return all(_same(ours, theirs) for ours, theirs in pairs)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
    return ours is theirs


def per_example(value: Any, count: int, name: str) -> tuple[Tensor, np.ndarray]:
    """Columns of one batch in example order, and how many each example has.

    Raises:
        OutputError: the output of a batch of `count` examples has another length.
    """
    if isinstance(value, Tensor) and value.ndim in (1, 2) and len(value) == count:
        each = 1 if value.ndim == 1 else value.shape[1]
        return _as_float(value).reshape(-1), np.full(count, each)
    if isinstance(value, list | tuple) and len(value) == count:
        flat = [_as_float(v).reshape(-1) for v in value]
        return torch.cat(flat), np.array([len(v) for v in flat])
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise OutputError(
        f"output {name!r} has the wrong length",
        expected=f"[{count}], [{count}, k] or a list of {count} tensors for a batch of {count} examples",
        got=got,
        todo="return one value (or row of values) per example; nothing is broadcast",
    )


def _as_float(value: Tensor) -> Tensor:
    if value.is_complex():
        raise OutputError(
            "an output is complex", expected="real numbers", got=value.dtype, todo="return .abs() or .real"
        )
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
