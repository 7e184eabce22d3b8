"""Examples: the batches of a task on one device, collated once and kept where they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coar.gates.layers import tensors_in
from coar.task import Task

CACHE_BYTES = 2 * 2**30  # on the CPU, examples are kept up to this size
CACHE_SHARE = 0.4  # of the memory that is free on a GPU; the rest is for the model's activations


class Examples:
    """All examples of a task, in order, as batches on a device.

    Collated once and kept on the device if they fit; else kept in pinned memory and copied for every
    mask; else read from the data set anew.

    Args:
        task: whose examples.
        device: where to.
        dtype: of their floating-point numbers.
        channels_last: lay images out with the channels last.
    """

    def __init__(self, task: Task, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
        self.task, self.device, self.dtype, self.channels_last = task, device, dtype, channels_last
        self._kept: list[tuple[int, Any]] | None = None
        self._pinned: list[tuple[int, Any]] | None = None

    def batches(self, batch_size: int) -> Iterable[tuple[int, Any]]:
        """Pairs of (number of examples, batch)."""
        if self._kept is not None:
            return self._kept
        if self._pinned is not None:
            return ((count, self.place(batch)) for count, batch in self._pinned)
        stream = ((len(indices), batch) for indices, batch in self.task.batches(batch_size))
        size = example_bytes(self.task) * len(self.task)
        # Made outside inference mode, so that autograd can use the same tensors.
        with torch.inference_mode(False):
            if size <= self._room():
                self._kept = [(count, self.place(batch)) for count, batch in stream]
                return self._kept
            if self.device.type == "cuda" and size <= CACHE_BYTES:
                self._pinned = [(count, _pinned(batch)) for count, batch in stream]
                return self.batches(batch_size)
        return ((count, self.place(batch)) for count, batch in stream)

    def forget(self) -> None:
        """Drop what is kept: the batch size changes."""
        self._kept = self._pinned = None

    def place(self, batch: Any) -> Any:
        """A batch on the device, in the dtype and layout."""
        return move(batch, self.device, self.dtype, self.channels_last)

    def _room(self) -> float:
        if self.device.type != "cuda":
            return CACHE_BYTES
        return CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0]


def move(
    value: Any,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Any:
    """A batch on another device; floating-point tensors also take the dtype, images the layout."""
    if isinstance(value, Tensor):
        floats = value.is_floating_point()
        layout = (
            torch.channels_last if channels_last and floats and value.ndim == 4 else torch.preserve_format
        )
        moved = value.to(device, dtype if floats else value.dtype, non_blocking=value.is_pinned())
        return moved.contiguous(memory_format=layout) if layout is torch.channels_last else moved
    return _map(value, lambda entry: move(entry, device, dtype, channels_last))


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, Tensor) else _map(value, _pinned)


def _map(value: Any, change: Any) -> Any:
    """A collection with its entries changed, of the same type; anything else as it is."""
    if isinstance(value, Mapping):
        return {key: change(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [change(entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)  # named tuples
    return value


def example_bytes(task: Task) -> int:
    """Bytes of the tensors of one example."""
    return max(1, sum(t.nbytes for t in tensors_in(task.batch([0]))))


def default_batch_size(task: Task, device: torch.device, largest: int = 1) -> int:
    """A power of two by the size of an example: a rule, not a measurement, so that results repeat.

    Args:
        task: whose examples.
        device: where they run.
        largest: bytes of the largest tensor in the forward pass of one example, see `LargestResult`:
            the logits of a language model are far larger than its tokens.
    """
    cuda = device.type == "cuda"
    budget, low, high = (2**26, 32, 1024) if cuda else (2**20, 16, 256)
    size = np.clip(budget / example_bytes(task), low, high)
    size = min(size, max(1.0, (2**31 if cuda else 2**28) / largest))
    return int(2 ** np.floor(np.log2(size)))


class LargestResult(TorchFunctionMode):
    """Context manager that notes the bytes of the largest tensor that any torch function returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in place of each of its functions."""
        result = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(tensor.nbytes for tensor in tensors_in(result))])
        return result
