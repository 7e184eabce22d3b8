"""AblationRunner: a private copy of the model with gates, and the examples, on one device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import OutputError, TaskError
from coar.fingerprints import digest_value
from coar.gates import Bias, ScaledWeights, Value
from coar.task import Task

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CACHE_BYTES = 2 * 2**30  # examples are collated once and kept on the device up to this size


class AblationRunner:
    """Runs masks; see `coar.experiments.base.Runner`.

    Args:
        task: model, examples, outputs.
        gated: components, bias and value of the ablation.
        device: where.
        batch_size: examples at a time; None chooses by their size.
        precision: a key of `DTYPES`.
    """

    def __init__(
        self,
        task: Task,
        gated: tuple[ComponentSet, Bias, Value],
        device: torch.device,
        batch_size: int | None,
        precision: str,
    ) -> None:
        self.task, self.device, self.precision = task, device, precision
        self.batch_size = min(batch_size or _default_batch_size(self.task, device), len(self.task))
        self.lengths: dict[str, np.ndarray] = {}
        model = private_copy(self.task.model, device, DTYPES[precision])
        self.gates = ScaledWeights(model, *gated)
        self._model = model
        self._shared = _SharedForward(model) if len(self.task.outputs) > 1 else None
        self._cache: list[tuple[int, Any]] | None = None

    def __call__(self, masks: np.ndarray) -> dict[str, np.ndarray]:
        """Run each mask over all examples; see `coar.experiments.base.Runner`."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in self.task.outputs}
        with torch.inference_mode():
            for mask in masks:
                self.gates.set(mask)
                for name, values in self._run_all().items():
                    rows[name].append(values)
        return {name: np.stack(values) for name, values in rows.items()}

    def record(self) -> dict[str, Any]:
        """Execution record: equal records give bit-identical outputs."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": None if cuda else torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "precision": self.precision,
            "batch_size": self.batch_size,
        }

    def check_repeatable(self) -> None:
        """Run the first batch in several ways that must not matter.

        Raises:
            TaskError: the model is random; an output function changes what others see; or an example's
                output depends on the batch that it is in (a collate function that reorders, say).
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            count, batch = next(iter(self._batches()))
            alone = {name: self._one_output(name, batch, count)[0] for name in self.task.outputs}
            again = {name: self._one_output(name, batch, count)[0] for name in self.task.outputs}
            _require_equal(alone, again, "of the same batch differs between two runs", _RANDOM)
            together = {name: values for name, (values, _) in self._all_outputs(batch, count).items()}
            _require_equal(alone, together, "differs when other outputs are read before it", _IN_PLACE)
            for example in sorted({0, count // 2, count - 1}) if count > 1 else ():
                self._check_alone(example, batch, count)

    def _check_alone(self, example: int, batch: Any, count: int) -> None:
        single = move(self.task.batch([example]), self.device, DTYPES[self.precision])
        for name in self.task.outputs:
            values, counts = self._one_output(name, batch, count)
            start = int(counts[:example].sum())
            inside = values[start : start + int(counts[example])]
            alone = self._one_output(name, single, 1)[0]
            # Loose: batch size changes rounding; another example changes everything.
            close = len(inside) == len(alone) and torch.allclose(
                inside, alone, rtol=0.01, atol=0.01, equal_nan=True
            )
            if not close:
                raise TaskError(
                    f"output {name!r} of example {example} alone is not what it is in its batch",
                    expected=f"{inside.tolist()[:3]} (in a batch of {count})",
                    got=f"{alone.tolist()[:3]} (alone)",
                    todo="let collate keep the order of its items; let examples not influence each other",
                )

    def _one_output(self, name: str, batch: Any, count: int) -> tuple[Tensor, np.ndarray]:
        if self._shared:
            self._shared.clear()
        return per_example(self.task.outputs[name](self._model, batch), count, name)

    def _all_outputs(self, batch: Any, count: int) -> dict[str, tuple[Tensor, np.ndarray]]:
        if self._shared:
            self._shared.clear()
        outputs = self.task.outputs.items()
        return {name: per_example(function(self._model, batch), count, name) for name, function in outputs}

    def _run_all(self) -> dict[str, np.ndarray]:
        values: dict[str, list[Tensor]] = {name: [] for name in self.task.outputs}
        lengths: dict[str, list[np.ndarray]] = {name: [] for name in self.task.outputs}
        for count, batch in self._batches():
            for name, (flat, counts) in self._all_outputs(batch, count).items():
                values[name].append(flat)
                lengths[name].append(counts)
        self._check_lengths({name: np.concatenate(parts) for name, parts in lengths.items()})
        return {name: torch.cat(parts).cpu().numpy() for name, parts in values.items()}

    def _check_lengths(self, lengths: dict[str, np.ndarray]) -> None:
        for name, found in lengths.items():
            expected = self.lengths.setdefault(name, found)
            if not np.array_equal(expected, found):
                example = int(np.flatnonzero(expected != found)[0])
                raise OutputError(
                    f"output {name!r} of example {example} changes its length between rows",
                    expected=f"{expected[example]} values",
                    got=f"{found[example]} values",
                    todo="return as many values whatever the mask",
                )

    def _batches(self) -> Sequence[tuple[int, Any]] | Any:
        if self._cache is not None:
            return self._cache
        stream = (
            (len(indices), move(batch, self.device, DTYPES[self.precision]))
            for indices, batch in self.task.batches(self.batch_size)
        )
        if _example_bytes(self.task) * len(self.task) > CACHE_BYTES:
            return stream
        # Made outside inference mode, so that autograd can use the same cache.
        with torch.inference_mode(False):
            self._cache = list(stream)
        return self._cache


_RANDOM = "switch off dropout and sampling in the forward pass"
_IN_PLACE = "let output functions work on copies: the model's result is shared between them"


def _require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str, todo: str) -> None:
    for name, values in ours.items():
        if digest_value(values) != digest_value(theirs[name]):
            raise TaskError(
                f"output {name!r} {what}",
                expected="a deterministic model in eval mode and output functions without side effects",
                got="two different results",
                todo=todo,
            )


class _SharedForward:
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


def move(value: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A batch on another device; floating-point tensors also take the dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: move(entry, device, dtype) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [move(entry, device, dtype) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)  # named tuples
    return value


def private_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A deep copy on a device; floating-point numbers take the dtype, complex and whole numbers stay."""
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TaskError(
            "the model cannot be copied",
            expected="a model that copy.deepcopy can copy",
            got=f"{type(error).__name__}: {error}",
            todo="remove old-style weight norm and the like, or whatever the message names",
        ) from error
    # Not .to(dtype), which drops the imaginary part of complex buffers.
    return copied.to(device)._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)


def _as_float(value: Tensor) -> Tensor:
    if value.is_complex():
        raise OutputError(
            "an output is complex", expected="real numbers", got=value.dtype, todo="return .abs() or .real"
        )
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _example_bytes(task: Task) -> int:
    return max(1, sum(t.nbytes for t in _tensors(task.batch([0]))))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for entry in value for t in _tensors(entry)] if isinstance(value, list | tuple) else []


def _default_batch_size(task: Task, device: torch.device) -> int:
    """A power of two by the size of an example: a rule, not a measurement, so that results repeat."""
    budget, low, high = (2**20, 16, 256) if device.type == "cpu" else (2**26, 32, 1024)
    return int(2 ** np.floor(np.log2(np.clip(budget / _example_bytes(task), low, high))))
