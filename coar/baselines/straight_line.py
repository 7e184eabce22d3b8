"""StraightLine: run a model at points between a baseline and its own input, or embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from coar.errors import OutputError, SettingError, TaskError
from coar.fingerprints import digest_value

STAY = ("mask", "label", "target")  # arguments with such names are no inputs, although they may be floats


class StraightLine:
    """Takes the place of a private copy's `forward`, and moves what that is given.

    What moves are the floating-point tensors that the model is called with; where there are none
    (tokens), what the model's input embedding emits. Positions, masks and labels stay.

    Args:
        model: a private copy; its outputs must come from calls of the model itself.
        baseline: from `read_baseline`: values that fit one example's input or embedding, or None for 0.

    Attributes:
        moved: "input" or "embedding"; empty before the first run.
    """

    def __init__(self, model: nn.Module, baseline: Tensor | None) -> None:
        self.moved = ""
        self._model, self._baseline, self._forward = model, baseline, model.forward
        self._fraction = 1.0
        model.forward = self._run

    @contextmanager
    def at(self, fraction: float) -> Iterator[None]:
        """Runs inside are at baseline + fraction (input - baseline).

        Raises:
            OutputError: nothing inside called the model.
        """
        self._fraction, self.moved = fraction, ""
        yield
        if not self.moved:
            raise OutputError(
                "an output that does not call the model has no path from a baseline to its input",
                expected="an output function that runs model(...)",
                got="one that calls other methods, or layers, of the model",
                todo="wrap what it runs in an nn.Module whose forward it is, and make the Task with that",
            )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        count = len(_inputs_in(args)) + len(_inputs_in(kwargs))
        if count > 1 and self._baseline is not None:
            raise SettingError(
                "one baseline, and several inputs",
                expected="a model with one floating-point input",
                got=f"{count} of them",
                todo='baseline="zero", which is of all inputs',
            )
        if count:
            self.moved = "input"
            return self._forward(*self._with_moved(args), **self._with_moved(kwargs))
        embedding = _input_embedding(self._model)
        handle = embedding.register_forward_hook(self._embedded)
        try:
            return self._forward(*args, **kwargs)
        finally:
            handle.remove()

    def _embedded(self, module: nn.Module, given: Any, result: Tensor) -> Tensor:
        del module, given
        self.moved = "embedding"
        return self._point(result)

    def _with_moved(self, value: Any, name: str = "") -> Any:
        if _is_input(value, name):
            return self._point(value)
        if isinstance(value, Mapping):
            return {key: self._with_moved(entry, str(key)) for key, entry in value.items()}
        if isinstance(value, list | tuple) and _inputs_in(value):
            entries = [self._with_moved(entry) for entry in value]
            return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
        return value

    def _point(self, value: Tensor) -> Tensor:
        value = value.detach()
        if self._baseline is None:
            return (self._fraction * value).requires_grad_()
        start = self._fitting(value)
        return (start + self._fraction * (value - start)).requires_grad_()

    def _fitting(self, value: Tensor) -> Tensor:
        assert self._baseline is not None  # asked for only where there is one
        start, example = self._baseline.to(value.device, value.dtype), value.shape[1:]
        try:
            fits = torch.broadcast_shapes(start.shape, example) == example
        except RuntimeError:
            fits = False
        if not fits:
            raise SettingError(
                f"the baseline does not fit an example's {self.moved}",
                expected=f"shape {list(example)}, or one that broadcasts to it",
                got=f"shape {list(start.shape)}",
                todo='give values for one example, without the batch dimension; or baseline="zero"',
            )
        return start


def read_baseline(baseline: Any) -> Tensor | None:
    """A user's baseline as a tensor; None for "zero"."""
    if isinstance(baseline, str) and baseline == "zero":
        return None
    try:
        found = torch.as_tensor(baseline, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        found = torch.tensor(float("nan"))
    if not bool(found.isfinite().all()):
        raise SettingError(
            "a baseline is an input",
            expected='"zero", or finite numbers in the shape of one example\'s input',
            got=f"{baseline!r:.80}",
        )
    return found


def baseline_record(baseline: Tensor | None) -> str:
    """What provenance says of a baseline: "zero", or a digest."""
    return "zero" if baseline is None else digest_value(baseline)


def _is_input(value: Any, name: str) -> bool:
    stays = any(name.lower().rstrip("s").endswith(word) for word in STAY)
    return isinstance(value, Tensor) and value.is_floating_point() and not stays


def _inputs_in(value: Any, name: str = "") -> list[Tensor]:
    if _is_input(value, name):
        return [value]
    if isinstance(value, Mapping):
        return [found for key, entry in value.items() for found in _inputs_in(entry, str(key))]
    entries = value if isinstance(value, list | tuple) else []
    return [found for entry in entries for found in _inputs_in(entry)]


def _input_embedding(model: nn.Module) -> nn.Module:
    """What turns tokens into vectors, as the model or the first module in it says."""
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        with suppress(NotImplementedError):  # of transformers' base class
            if callable(getter) and isinstance(found := getter(), nn.Module):
                return found
    raise TaskError(
        f"{type(model).__name__} is called without floating-point inputs: there is no path from a baseline",
        expected="floating-point inputs, or a model with get_input_embeddings(), as in transformers",
        got="whole numbers, and no module that says which one embeds them",
        todo="give the model a method get_input_embeddings() that returns its nn.Embedding",
    )
