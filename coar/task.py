"""Task: the model, the examples and the outputs. The one thing a user supplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from coar.errors import SettingError, TaskError
from coar.files import digest_json
from coar.fingerprints import digest_value, model_fingerprint
from coar.outputs import OutputFunction, margin
from coar.randomness import permutation

FINGERPRINTED_ITEMS = 64  # items read (twice) to recognise a data set and to catch one that changes


@dataclass(frozen=True)
class Recipe:
    """How to build a task again elsewhere: import string of a factory and its JSON arguments."""

    factory: str
    args: dict[str, Any] = field(default_factory=dict)


class Task:
    """A trained model, a map-style data set and what is read off the model.

    Args:
        model: in eval mode; never modified.
        dataset: `dataset[i]` is always the same example i; no shuffling, no random augmentation.
        outputs: `{name: function}` with functions as in `coar.outputs`; default the margin.
        collate: turns a list of items into a batch; default torch's `default_collate`.
        metadata: a DataFrame (or dictionary of lists) with one entry per example. `label`,
            `subpopulation` and `id` have a meaning here; ids name the columns.
        show: `show(item, ax)` draws an example on a matplotlib Axes.
        device: "auto" is the first GPU where there is one, else the CPU.
        save_weights: the model was trained on the fly: studies keep its weights, and give their
            path to the factory's `weights` argument instead of training again.

    Raises:
        TaskError: a model in train mode, a loader instead of a data set, metadata of another length.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        outputs: Mapping[str, OutputFunction] | OutputFunction = margin,
        *,
        collate: Callable[[list[Any]], Any] = default_collate,
        metadata: Any = None,
        show: Callable[[Any, Any], None] | None = None,
        device: str | torch.device = "auto",
        save_weights: bool = False,
    ) -> None:
        self.model = require_eval(require_runnable(model))
        self.dataset = _require_map_style(dataset)
        self.outputs = _named_outputs(outputs)
        self.collate = collate
        self.metadata = _require_length(metadata, len(dataset))
        self.show = show
        self.device = resolve_device(device)
        self.save_weights = save_weights
        self.recipe: Recipe | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"Task({type(self.model).__name__}, {len(self)} examples, outputs {sorted(self.outputs)})"

    def batch(self, indices: Sequence[int] | np.ndarray) -> Any:
        """Collate some examples, on the CPU."""
        return self.collate([self.dataset[int(i)] for i in indices])

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """All examples in order, as `(indices, batch)`."""
        for start in range(0, len(self), batch_size):
            indices = np.arange(start, min(start + batch_size, len(self)))
            yield indices, self.batch(indices)

    def example_ids(self) -> list[str]:
        """Names of the examples: `metadata["id"]` where given, else their numbers."""
        if self.metadata is not None and "id" in self.metadata:
            return [str(value) for value in self.metadata["id"]]
        return [str(i) for i in range(len(self))]

    def model_fingerprint(self) -> str:
        """Digest of the model's classes and of its sorted state dict."""
        return model_fingerprint(self.model)

    def data_fingerprint(self) -> str:
        """Digest of length, ids, labels and 64 addressed items.

        Raises:
            TaskError: an item differs between two reads.
        """
        chosen = np.sort(permutation(0, "fingerprint", 0, len(self))[:FINGERPRINTED_ITEMS])
        items = [self._digest_item(int(i)) for i in chosen]
        labels = None
        if self.metadata is not None and "label" in self.metadata:
            labels = [str(value) for value in self.metadata["label"]]
        return digest_json([len(self), self.example_ids(), labels, items])

    def _digest_item(self, index: int) -> str:
        first, second = (digest_value(self.batch([index])) for _ in range(2))
        if first != second:
            raise TaskError(
                f"item {index} of the data set changes between two reads",
                expected="dataset[i] returns the same example every time",
                got="two different contents",
                todo="remove random augmentation and shuffling; use the evaluation transform",
            )
        return first


def require_runnable(model: nn.Module) -> nn.Module:
    """The model itself; `TaskError` if it has no weights yet, lies on several devices or is quantised."""
    if not isinstance(model, nn.Module):
        raise TaskError("the model is not a torch model", expected="nn.Module", got=type(model).__name__)
    require_not_compiled(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    devices = sorted({str(tensor.device) for tensor in tensors.values()})
    if "meta" in devices:
        name = next(name for name, tensor in tensors.items() if tensor.is_meta)
        raise TaskError(
            "the model has no weights",
            expected="real tensors",
            got=f"{name} on the meta device",
            todo="load the weights (model.to_empty and load_state_dict, or build it without device='meta')",
        )
    if len(devices) > 1:
        raise TaskError(
            "the model lies on several devices",
            expected="one device",
            got=", ".join(devices),
            todo="model.to(one device) before making the task; each worker copies the whole model",
        )
    quantised = [name for name, module in model.named_modules() if "quantized" in type(module).__module__]
    if quantised:
        raise TaskError(
            "the model is quantised, and gates scale floating-point weights",
            expected="float32, bfloat16 or float16 weights",
            got=f"{quantised[0] or 'the model'} is {type(model.get_submodule(quantised[0])).__qualname__}",
            todo="load the model unquantised",
        )
    return model


def require_not_compiled(model: nn.Module) -> nn.Module:
    """The model itself; `TaskError` if torch.compile was applied to it: a copy would run the original."""
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None)
        if compiled or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            raise TaskError(
                "the model is compiled",
                expected="the model before torch.compile",
                got=f"{name or 'the model itself'} is compiled",
                todo='pass the plain model; studies compile it themselves: "execution": {"compiled": true}',
            )
    return model


def resolve_device(device: str | torch.device) -> torch.device:
    """Device of a name; "auto" is the first CUDA device, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise SettingError("no CUDA device here", expected="auto or cpu", got=device)
        return found
    except RuntimeError as error:
        raise SettingError("unknown device", expected="auto, cpu, cuda, cuda:0, ...", got=device) from error


def require_eval(model: nn.Module) -> nn.Module:
    """Return the model; raise `TaskError` if any of its modules is in train mode."""
    if not isinstance(model, nn.Module):
        raise TaskError("the model is not a torch model", expected="nn.Module", got=type(model).__name__)
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise TaskError(
            "the model is in train mode: dropout and batch statistics would change its outputs",
            expected="every module in eval mode",
            got=f"{len(training)} modules in train mode, first: {training[0]}",
            todo="call model.eval() first",
        )
    return model


def _require_map_style(dataset: Any) -> Any:
    if isinstance(dataset, DataLoader):
        raise TaskError(
            "got a DataLoader: a shuffling loader would scramble the columns",
            expected="a map-style data set",
            got="DataLoader",
            todo="pass loader.dataset, and its collate_fn as collate=",
        )
    if isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise TaskError(
            "the data set cannot be indexed",
            expected="len(dataset) and dataset[i]",
            got=type(dataset).__name__,
        )
    if isinstance(dataset, list | tuple) and len(dataset) == 2 and _looks_like_arrays(dataset):
        raise TaskError(
            "got arrays instead of a data set: their first dimension would be taken for two examples",
            expected="a data set whose items are examples",
            got=f"a {type(dataset).__name__} of {len(dataset)}",
            todo="wrap them: torch.utils.data.TensorDataset(inputs, labels)",
        )
    if len(dataset) == 0:
        raise TaskError("the data set is empty", expected="at least one example", got=0)
    return dataset


def _looks_like_arrays(entries: Sequence[Any]) -> bool:
    return all(hasattr(entry, "shape") and getattr(entry, "ndim", 0) >= 1 for entry in entries) and (
        len(entries[0]) == len(entries[1]) > 2
    )


def _named_outputs(outputs: Mapping[str, OutputFunction] | OutputFunction) -> dict[str, OutputFunction]:
    if callable(outputs):
        outputs = {getattr(outputs, "__name__", "output"): outputs}
    if not isinstance(outputs, Mapping) or not outputs or "<lambda>" in outputs:
        raise TaskError(
            "a task needs at least one output, by name",
            expected='a named function or {"margin": coar.outputs.margin}',
            got=repr(outputs),
            todo='give a lambda a name: {"logit": lambda model, batch: ...}',
        )
    for name, function in outputs.items():
        if not callable(function):
            raise TaskError(
                f"output {name!r} is not a function", expected="(model, batch) -> [batch]", got=function
            )
    return dict(outputs)


def _require_length(metadata: Any, length: int) -> Any:
    if metadata is None:
        return None
    if isinstance(metadata, Mapping):
        import pandas

        try:
            metadata = pandas.DataFrame(dict(metadata))
        except ValueError as error:
            raise TaskError(
                "metadata is not a table", expected="one entry per example in every column", got=str(error)
            ) from None
    if len(metadata) != length:
        raise TaskError(
            "metadata has the wrong length", expected=f"{length} rows", got=f"{len(metadata)} rows"
        )
    return metadata
