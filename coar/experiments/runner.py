"""AblationRunner: a private copy of the model with gates, and the examples, on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from coar.components import ComponentSet
from coar.errors import OutputError, TaskError
from coar.experiments.examples import Examples, default_batch_size
from coar.experiments.memory import halving, keep_freed_memory
from coar.experiments.private_model import PrivateModel
from coar.experiments.reading import SharedForward, per_example
from coar.fingerprints import digest_value
from coar.gates import Bias, Means, ScaledWeights, Value
from coar.task import Task

T = TypeVar("T")
AGAIN = 3  # a few outputs under dropout may agree once


class AblationRunner:
    """Runs masks; see `coar.experiments.base.Runner`.

    Args:
        task: model, examples, outputs.
        gated: components, bias, value and means of the ablation.
        device: where.
        batch_size: examples at a time; None chooses by their size. Where memory does not suffice it is
            halved until it does, and the record says so.
        precision: a key of `coar.experiments.private_model.DTYPES`.
        fold: fold BatchNorm into convolutions: faster, equal up to rounding.
        compiled: see `coar.experiments.private_model.PrivateModel`.
    """

    def __init__(
        self,
        task: Task,
        gated: tuple[ComponentSet, Bias, Value, Means | None],
        device: torch.device,
        batch_size: int | None,
        precision: str,
        fold: bool = True,
        compiled: bool = False,
    ) -> None:
        if device.type == "cpu":
            keep_freed_memory()
        self.task, self.device, self.precision, self.compiled = task, device, precision, compiled
        self.lengths: dict[str, np.ndarray] = {}
        options = precision, fold, compiled
        self._private = halving(lambda _: PrivateModel(task, gated, device, *options), 1, device)
        rule = default_batch_size(task, device, self._private.largest)
        self.batch_size = min(batch_size or rule, len(task))
        self._model = self._private.model
        self.gates = ScaledWeights(self._model, gated[0], sites=self._private.sites)
        self._shared = SharedForward(self._model) if len(task.outputs) > 1 else None
        self._examples = Examples(task, device, self._private.dtype, self._private.channels_last)

    def __call__(self, masks: np.ndarray) -> dict[str, np.ndarray]:
        """Run each mask over all examples; see `coar.experiments.base.Runner`."""
        rows: dict[str, list[np.ndarray]] = {name: [] for name in self.task.outputs}
        with torch.inference_mode():
            for mask in masks:
                self.gates.set(mask)
                for name, values in self._fitting(self._run_all).items():
                    rows[name].append(values)
        return {name: np.stack(values) for name, values in rows.items()}

    def record(self) -> dict[str, Any]:
        """Execution record: equal records give bit-identical outputs."""
        return self._private.record(self.batch_size)

    def check_repeatable(self) -> None:
        """Run the first batch in several ways that must not matter.

        Raises:
            OutputError: an output is not finite although nothing is ablated.
            TaskError: the model is random; an output function changes what others see; or an example's
                output depends on the batch that it is in (a collate function that reorders, say).
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=devices):
            self._fitting(self._check_batch)

    def _check_batch(self) -> None:
        count, batch = next(iter(self._batches()))
        alone = {}
        for name in self.task.outputs:
            alone[name], counts = self._one_output(name, batch, count)
            _require_finite(name, alone[name], counts)
        for _ in range(AGAIN):
            again = {name: self._one_output(name, batch, count)[0] for name in self.task.outputs}
            _require_equal(alone, again, "of the same batch differs between two runs", _RANDOM)
        if len(self.task.outputs) > 1:
            together = {name: values for name, (values, _) in self._all_outputs(batch, count).items()}
            _require_equal(alone, together, "differs when other outputs are read before it", _IN_PLACE)
        for example in sorted({0, count // 2, count - 1}) if count > 1 else ():
            self._check_alone(example, batch, count)

    def _check_alone(self, example: int, batch: Any, count: int) -> None:
        single = self._examples.place(self.task.batch([example]))
        for name in self.task.outputs:
            values, counts = self._one_output(name, batch, count)
            start = int(counts[:example].sum())
            inside = values[start : start + int(counts[example])]
            alone = self._one_output(name, single, 1)[0]
            # Loose: batch size changes rounding; another example changes everything.
            spread = float(values.float().std()) if len(values) > 1 else 0.0
            close = len(inside) == len(alone) and torch.allclose(
                inside, alone, rtol=0.01, atol=0.01 * spread + 1e-9, equal_nan=True
            )
            if not close:
                raise TaskError(
                    f"output {name!r} of example {example} alone is not what it is in its batch",
                    expected=f"{inside.tolist()[:3]} (in a batch of {count})",
                    got=f"{alone.tolist()[:3]} (alone)",
                    todo="let the data set give the same item whenever it is asked (no random crops, no "
                    "noise); let collate keep the order of its items; let examples not influence each other",
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

    def _fitting(self, work: Callable[[], T]) -> T:
        """Do something with batches, smaller ones if memory does not suffice."""

        def with_batches_of(size: int) -> T:
            if size != self.batch_size:
                self.batch_size = size
                self._examples.forget()
                if self._shared:
                    self._shared.clear()
            return work()

        return halving(with_batches_of, self.batch_size, self.device)

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

    def _batches(self) -> Iterable[tuple[int, Any]]:
        return self._examples.batches(self.batch_size)


_RANDOM = "switch off dropout and sampling in the forward pass"
_IN_PLACE = "let output functions work on copies: the model's result is shared between them"


def _require_finite(name: str, values: Tensor, counts: np.ndarray) -> None:
    wrong = ~torch.isfinite(values)
    if not wrong.any():
        return
    position = int(wrong.nonzero()[0])
    example = int(np.searchsorted(np.cumsum(counts), position, side="right"))
    raise OutputError(
        f"output {name!r} of example {example} is {float(values[position])} although nothing is ablated",
        expected="finite outputs",
        got=f"{int(wrong.sum())} of {len(values)} values of the first batch are not finite",
        todo="look for NaN in this example and in the model's weights, for a division by 0 or the "
        "logarithm of 0 in the output, and for overflow at low precision",
    )


def _require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str, todo: str) -> None:
    for name, values in ours.items():
        if digest_value(values) != digest_value(theirs[name]):
            raise TaskError(
                f"output {name!r} {what}",
                expected="a deterministic model in eval mode and output functions without side effects",
                got="two different results",
                todo=todo,
            )
