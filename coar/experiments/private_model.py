"""PrivateModel: a copy of a task's model made ready for many passes on one device."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coar.components import ComponentSet
from coar.errors import TaskError
from coar.experiments.examples import LargestResult, default_batch_size, move
from coar.experiments.memory import halving
from coar.experiments.reading import per_example
from coar.gates import Bias, Means, Value, fold_batch_norm, make_sites, measure_means, require_reached
from coar.task import Task

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FOLDING_EXAMPLES = 16
FOLDING_TOLERANCE = 1e-3  # of the largest output; folding is exact, so more means that it was not folding


class PrivateModel:
    """A model's copy on a device: cast, images with channels last, BatchNorm folded into convolutions.

    Args:
        task: whose model.
        gated: components, bias, value and means of the ablation.
        device: where.
        precision: a key of `DTYPES`.
        fold: fold BatchNorm.
        compiled: run the model through torch.compile (needs a C++ compiler on the CPU): some seconds once,
            5 to 15 % less per pass measured on the CPU.

    Attributes:
        model: the copy.
        sites: of its gates.
        folded: how many BatchNorm layers were folded.
        channels_last: the layout of images.
        largest: bytes of the largest tensor in the forward pass of the first example.
    """

    def __init__(
        self,
        task: Task,
        gated: tuple[ComponentSet, Bias, Value, Means | None],
        device: torch.device,
        precision: str,
        fold: bool = True,
        compiled: bool = False,
    ) -> None:
        self.device, self.precision, self.compiled = device, precision, compiled
        self.dtype = DTYPES[precision]
        self.channels_last = any(isinstance(module, nn.Conv2d) for module in task.model.modules())
        self.folded = 0
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a model that draws numbers must not be noticed
            if fold and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.model.modules()):
                self._make_folded(task, gated)
            if not self.folded:
                self.model = self._copied(task.model, self.dtype)
                self.sites = make_sites(self.model, *gated)
            self.largest = self._largest_result(task)
            batch = move(task.batch([0]), self.device, self.dtype, self.channels_last)
            runs = [partial(function, self.model, batch) for function in task.outputs.values()]
            require_reached(task.model, self.sites, gated[1:3], runs)
        if compiled:
            # Parameters stay inputs of the compiled code: it sees what masks write to them.
            self.model.forward = torch.compile(self.model.forward)

    def record(self, batch_size: int) -> dict[str, Any]:
        """Execution record: equal records give bit-identical numbers."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": None if cuda else torch.get_num_threads(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "precision": self.precision,
            "batch_size": batch_size,
            "folded": self.folded,
            "channels_last": self.channels_last,
            "compiled": self.compiled,
        }

    def _make_folded(self, task: Task, gated: tuple[ComponentSet, Bias, Value, Means | None]) -> None:
        """Fold in float32 at least, look whether outputs are what they were, cast afterwards."""
        exact = torch.promote_types(self.dtype, torch.float32)
        model = self._copied(task.model, exact)
        sites = make_sites(model, *gated)
        count = min(FOLDING_EXAMPLES, len(task))
        spread = [i * len(task) // count for i in range(count)]  # over the whole data set
        batch = move(task.batch(spread), self.device, exact, self.channels_last)
        runs = {name: partial(function, model, batch) for name, function in task.outputs.items()}
        with torch.no_grad():
            before = {name: per_example(run(), count, name)[0] for name, run in runs.items()}
            folded = fold_batch_norm(model, sites, *runs.values())
            after = {name: per_example(run(), count, name)[0] for name, run in runs.items()}
        if folded and all(_close(values, after[name]) for name, values in before.items()):
            self.folded, self.sites = folded, sites
            self.model = cast(model, self.dtype)
            for site in sites:
                for gate in site.gates:
                    gate.rest = gate.rest.to(self.dtype)

    def _largest_result(self, task: Task) -> int:
        batch = move(task.batch([0]), self.device, self.dtype, self.channels_last)
        return largest_result(task, self.model, batch)

    def _copied(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        copied = private_copy(model, self.device, dtype)
        return copied.to(memory_format=torch.channels_last) if self.channels_last else copied


def _close(before: Tensor, after: Tensor) -> bool:
    scale = float(before.abs().max()) + 1e-6
    return before.shape == after.shape and float((before - after).abs().max()) <= FOLDING_TOLERANCE * scale


def largest_result(task: Task, model: nn.Module, batch: Any) -> int:
    """Bytes of the largest tensor in the forward pass of a batch."""
    with torch.no_grad(), LargestResult() as found:
        next(iter(task.outputs.values()))(model, batch)
    return found.bytes


def private_means(task: Task, components: ComponentSet, device: torch.device) -> Means:
    """Means of a task's components over its examples, in float32; see `coar.gates.means`."""
    model = private_copy(task.model, device, torch.float32)
    largest = largest_result(task, model, move(task.batch([0]), device))
    functions = list(task.outputs.values())

    def measured(size: int) -> Means:
        batches = (move(batch, device) for _, batch in task.batches(size))
        return measure_means(model, components, batches, lambda m, batch: [f(m, batch) for f in functions])

    return halving(measured, default_batch_size(task, device, largest), device)


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
    return cast(copied.to(device), dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> Any:
    """The same model in another precision; complex and whole numbers stay."""
    # Not .to(dtype), which drops the imaginary part of complex buffers.
    return model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
