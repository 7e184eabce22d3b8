"""ComponentAblation: ablate components of a trained model, read its outputs on every example."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from coar.axes import Axis
from coar.components import ComponentSet
from coar.errors import SettingError, TaskError
from coar.experiments.private_model import DTYPES, private_means
from coar.experiments.runner import AblationRunner
from coar.files import digest_json
from coar.fingerprints import model_fingerprint
from coar.gates import Bias, Means, Value, check_convention
from coar.task import Task, require_eval, resolve_device


class ComponentAblation:
    """Outputs of a task's model with components ablated.

    Args:
        task: model, data set and outputs.
        components: what the masks index; see `coar.find_components`.
        bias: "keep" leaves the bias of an ablated unit, as published; "ablate" removes it too.
        value: what an ablated unit emits instead: "zero", "mean" (its own over the task's examples and
            positions, measured once) or a number. See `coar.gates.convention`.

    Raises:
        ComponentError: the components are of another model.

    The model is copied once per runner; `task.model` is never modified.
    """

    def __init__(
        self, task: Task, components: ComponentSet, bias: Bias = "keep", value: Value = "zero"
    ) -> None:
        check_convention(bias, value)
        if not isinstance(task, Task):
            raise TaskError(
                "the first argument is a task", expected="coar.Task(model, dataset)", got=type(task).__name__
            )
        if not isinstance(components, ComponentSet):
            got = type(components).__name__
            raise TaskError("the second argument is components", expected="find_components(model)", got=got)
        components.require_fits(task.model)
        components.require_separate(task.model, with_bias=bias == "ablate" or value != "zero")
        self.task = task
        self.component_set = components
        self.bias, self.value = bias, value
        self.components = components.axis(task.model_fingerprint(), self._convention())
        self._lengths: dict[str, np.ndarray] | None = None

    def __repr__(self) -> str:
        how = f"bias={self.bias!r}, value={self.value!r}"
        return f"ComponentAblation({self.task!r}, {self.component_set!r}, {how})"

    def _convention(self) -> str:
        # Means are of the data: attributions made with others are about another ablation.
        over = f" over {self.task.data_fingerprint()[:16]}" if self.value == "mean" else ""
        return f"bias={self.bias} value={self.value}{over}"

    @cached_property
    def means(self) -> Means | None:
        """Mean of each component's entries, measured in float32 where `value="mean"`; else None."""
        if self.value != "mean":
            return None
        return private_means(self.task, self.component_set, self.device)

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
            "ablation": self._convention(),
            "outputs": digest_json(outputs),
        }

    def to_spec(self) -> dict[str, Any]:
        """The `experiment` part of a spec; no `factory` where the task only exists in memory."""
        recipe = self.task.recipe
        task = {"factory": recipe.factory, "args": recipe.args} if recipe else {"args": {}}
        return {
            "name": "component_ablation",
            "task": task,
            "components": self.component_set.selection or self._by_hand(),
            "bias": self.bias,
            "value": self.value,
        }

    def _by_hand(self) -> dict[str, Any]:
        overlap = {"overlap": True} if self.component_set.overlap else {}
        return {"groups": self.component_set.to_json()} | overlap

    def require_unchanged(self) -> None:
        """Raise `TaskError` if task.model is in train mode or no longer the one that was measured."""
        require_eval(self.task.model)
        if model_fingerprint(self.task.model) != self.components.source["model"]:
            raise TaskError(
                "task.model has changed since this experiment was made",
                expected=f"model {self.components.source['model'][:12]}",
                todo="make the Task and the ComponentAblation again",
            )

    def prepare(
        self,
        device: torch.device,
        batch_size: int | None = None,
        precision: str = "float32",
        *,
        fold: bool = True,
        compiled: bool = False,
    ) -> AblationRunner:
        """Copy the model to a device and make it ready for many masks.

        Args:
            device: where.
            batch_size: examples at a time; None chooses.
            precision: "float32", "float64", "bfloat16" or "float16".
            fold: fold BatchNorm into convolutions; without it, outputs of the untouched model are bit for
                bit what `task.model` gives for the same batches, layout and precision.
            compiled: run the model through torch.compile: some seconds once, less time for every row.
        """
        self.require_unchanged()
        device = resolve_device(device)
        if precision not in DTYPES:
            raise SettingError("unknown precision", expected=" or ".join(DTYPES), got=precision)
        if batch_size is not None and batch_size < 1:
            raise SettingError("batch_size out of range", expected="at least 1 example", got=batch_size)
        gated = self.component_set, self.bias, self.value, self.means
        return AblationRunner(self.task, gated, device, batch_size, precision, fold, compiled)


def _columns_axis(name: str, data: str, ids: list[str], lengths: np.ndarray) -> Axis:
    example = np.repeat(np.arange(len(ids)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else example
    single = bool((lengths == 1).all())
    names = ids if single else [f"{ids[e]}:{p}" for e, p in zip(example, position, strict=True)]
    return Axis("columns", names, {"data": data, "output": name}, {"example": example, "position": position})
