"""ComponentAblation: ablate components of a trained model, read its outputs on every example."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.axes import Axis
from coar.components import ComponentSet
from coar.errors import OutputError, SettingError, TaskError
from coar.files import digest_json
from coar.fingerprints import digest_value, model_fingerprint
from coar.gates import Bias, ScaledWeights, Value, check_convention
from coar.task import Task, require_eval

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CACHE_BYTES = 2 * 2**30  # examples are collated once and kept on the device up to this size


class ComponentAblation:
    """Outputs of a task's model with components ablated.

    Args:
        task: model, data set and outputs.
        components: what the masks index; see `coar.find_components`.
        bias: "keep" leaves the bias of an ablated unit, as published; "ablate" removes it too.
        value: what an ablated unit emits instead: "zero" or a number.

    Raises:
        ComponentError: the components are of another model.

    The model is copied once per runner; `task.model` is never modified.
    """

    def __init__(
        self, task: Task, components: ComponentSet, bias: Bias = "keep", value: Value = "zero"
    ) -> None:
        check_convention(bias, value)
        components.require_fits(task.model)
        self.task = task
        self.component_set = components
        self.bias, self.value = bias, value
        self.components = components.axis(task.model_fingerprint(), f"bias={bias} value={value}")
        self._lengths: dict[str, np.ndarray] | None = None

    def __repr__(self) -> str:
        how = f"bias={self.bias!r}, value={self.value!r}"
        return f"ComponentAblation({self.task!r}, {self.component_set!r}, {how})"

    @property
    def device(self) -> torch.device:
        """The task's device."""
        return self.task.device

    @property
    def accuracy_outputs(self) -> frozenset[str]:
        """Outputs whose sign says whether the prediction is right."""
        outputs = self.task.outputs.items()
        return frozenset(name for name, f in outputs if getattr(f, "sign_means_correct", False))

    @cached_property
    def columns(self) -> Mapping[str, Axis]:
        """One column per example, or per value where an output has several per example."""
        if self._lengths is None:
            runner = self.prepare(self.device)
            runner.check_repeatable()
            runner(np.ones((1, len(self.components)), dtype=bool))
            self._lengths = runner.lengths
        data, ids = self.task.data_fingerprint(), self.task.example_ids()
        return {name: _columns_axis(name, data, ids, lengths) for name, lengths in self._lengths.items()}

    def fingerprint(self) -> dict[str, str]:
        """Digests of model, data, components, ablation convention and outputs."""
        outputs = sorted((name, getattr(f, "__qualname__", "")) for name, f in self.task.outputs.items())
        return {
            "model": self.task.model_fingerprint(),
            "data": self.task.data_fingerprint(),
            "components": digest_json(self.component_set.to_json()),
            "ablation": f"bias={self.bias} value={self.value}",
            "outputs": digest_json(outputs),
        }

    def to_spec(self) -> dict[str, Any]:
        """The `experiment` part of a spec; no `factory` where the task only exists in memory."""
        recipe = self.task.recipe
        task = {"factory": recipe.factory, "args": recipe.args} if recipe else {"args": {}}
        return {
            "name": "component_ablation",
            "task": task,
            "components": self.component_set.selection or {"groups": self.component_set.to_json()},
            "bias": self.bias,
            "value": self.value,
        }

    def prepare(
        self, device: torch.device, batch_size: int | None = None, precision: str = "float32"
    ) -> AblationRunner:
        """Copy the model to a device and collate the examples."""
        require_eval(self.task.model)
        if model_fingerprint(self.task.model) != self.components.source["model"]:
            raise TaskError(
                "task.model has changed since this experiment was made",
                expected=f"model {self.components.source['model'][:12]}",
                todo="make the Task and the ComponentAblation again",
            )
        if precision not in DTYPES:
            raise SettingError("unknown precision", expected=" or ".join(DTYPES), got=precision)
        if batch_size is not None and batch_size < 1:
            raise SettingError("batch_size out of range", expected="at least 1 example", got=batch_size)
        return AblationRunner(self, device, batch_size, precision)


class AblationRunner:
    """A private copy of the model with gates, and the examples, on one device."""

    def __init__(
        self, experiment: ComponentAblation, device: torch.device, batch_size: int | None, precision: str
    ) -> None:
        self.task, self.device, self.precision = experiment.task, device, precision
        self.batch_size = min(batch_size or _default_batch_size(self.task, device), len(self.task))
        self.lengths: dict[str, np.ndarray] = {}
        dtype = DTYPES[precision]
        model = copy.deepcopy(self.task.model).to(device, dtype)
        self.gates = ScaledWeights(model, experiment.component_set, experiment.bias, experiment.value)
        self._model = _RunOnce(model)
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
        """Run the first batch twice; raise `TaskError` if the model is random."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            count, batch = next(iter(self._batches()))
            for name, function in self.task.outputs.items():
                first, second = (
                    per_example(function(self._model.fresh(), batch), count, name)[0] for _ in range(2)
                )
                if digest_value(first) != digest_value(second):
                    raise TaskError(
                        f"output {name!r} of the same batch differs between two runs",
                        expected="a deterministic model in eval mode",
                        got="two different results",
                        todo="switch off dropout and sampling in the forward pass",
                    )

    def _run_all(self) -> dict[str, np.ndarray]:
        values: dict[str, list[Tensor]] = {name: [] for name in self.task.outputs}
        lengths: dict[str, list[np.ndarray]] = {name: [] for name in self.task.outputs}
        for count, batch in self._batches():
            model = self._model.fresh()
            for name, function in self.task.outputs.items():
                flat, counts = per_example(function(model, batch), count, name)
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


class _RunOnce:
    """Stands in for the model so that several outputs of one batch share a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inputs: Any = None  # kept, not only their ids: a freed tensor's id may be given to another
        self._result: Any = None

    def fresh(self) -> nn.Module:
        """Forget the last result: another mask or batch follows."""
        self._inputs = self._result = None
        return self  # type: ignore[return-value]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inputs is None or not _same_objects(self._inputs, (args, kwargs)):
            self._result = self._model(*args, **kwargs)
            self._inputs = args, kwargs
        return self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _same_objects(ours: Any, theirs: Any) -> bool:
    (args, kwargs), (other_args, other_kwargs) = ours, theirs
    if len(args) != len(other_args) or kwargs.keys() != other_kwargs.keys():
        return False
    pairs = [*zip(args, other_args, strict=True), *((kwargs[key], other_kwargs[key]) for key in kwargs)]
    return all(ours is theirs for ours, theirs in pairs)


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
        return type(value)(move(entry, device, dtype) for entry in value)
    return value


def _as_float(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _columns_axis(name: str, data: str, ids: list[str], lengths: np.ndarray) -> Axis:
    example = np.repeat(np.arange(len(ids)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else example
    single = bool((lengths == 1).all())
    names = ids if single else [f"{ids[e]}:{p}" for e, p in zip(example, position, strict=True)]
    return Axis("columns", names, {"data": data, "output": name}, {"example": example, "position": position})


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
