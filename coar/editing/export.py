"""Export: the weights of an edited model as one safetensors file, zeroed or with units cut out, and back.

A file with zeroed weights fits the model's own class and any code that loads safetensors. In one with units
cut out some layers are shorter; `load_exported` makes an instance of the class fit first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coar.editing.cutting import SIZES
from coar.editing.edit import Edit
from coar.editing.removal import Inputs, removed
from coar.errors import EditError, StoreError
from coar.files import require_format, write_once

FORMAT = 1
KEY = "coar_edit"


def export_edited(
    model: nn.Module, edit: Edit, path: str | Path, example_inputs: Inputs | None = None
) -> Path:
    """Write the weights of the edited model.

    Args:
        model: that the edit was made for; left untouched.
        edit: what is ablated.
        path: a safetensors file; an equal one may be there already.
        example_inputs: what the model is called with: filters and neurons are then cut out (see
            `removed`) instead of zeroed.

    Returns:
        The path.

    Raises:
        EditError: an edit of another model, or outputs that differ after the cut.

    >>> import tempfile
    >>> from coar import ComponentAblation, Task, find_components
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    >>> task = Task(model, torch.utils.data.TensorDataset(torch.ones(5, 2), torch.zeros(5).long()))
    >>> hidden = find_components(model, kinds=["neuron"], include=["0"])
    >>> edit = Edit.of(ComponentAblation(task, hidden), [1, 3])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = export_edited(model, edit, Path(folder) / "edited.safetensors", torch.ones(1, 2))
    ...     smaller = load_exported(model, written)
    >>> smaller
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    form = "zeroed" if example_inputs is None else "removed"
    edited = edit.apply(model) if example_inputs is None else removed(model, edit, example_inputs).model
    tensors, aliases = _tensors(edited)
    value = {
        "format": FORMAT,
        "form": form,
        "components": list(edit.names),
        "model": edit.source.get("model"),
        "aliases": aliases,
        "sizes": _changed_sizes(model, edited),
    }

    def write(partial: Path) -> None:
        save_file(tensors, partial, metadata={KEY: json.dumps(value, sort_keys=True)})

    write_once(Path(path), write)
    return Path(path)


def load_exported(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a model of the same class with exported weights, in eval mode.

    Args:
        model: an instance as it was before the edit; its weights do not matter. Left untouched.
        path: written by `export_edited`.

    Raises:
        StoreError: the file is missing, damaged, or not written by `export_edited`.
        EditError: its tensors do not belong to such a model.
    """
    value, tensors = _read(Path(path))
    found = copy.deepcopy(model)
    expected = {name for name, _ in _named_tensors(found)}
    given = tensors.keys() | value["aliases"].keys()
    new = {name for name in given - expected if not name.endswith("bias")}  # a cut may need a bias
    if new or expected - given:
        raise EditError(
            f"{path} holds the weights of another kind of model",
            expected=f"tensors such as {min(expected, default='none')!r}",
            got=", ".join(sorted(new | (expected - given))[:3]),
            todo="pass an instance of the class that was exported",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            _require_shape(found, name, tensor, value["sizes"], path)
            _place(found, name, tensor)
        for name, first in value["aliases"].items():
            _place(found, name, _held(found, first))
    for name, sizes in value["sizes"].items():
        vars(found.get_submodule(name)).update(sizes)
    return found.eval()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by all their names."""
    state = model.state_dict(keep_vars=True)
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, each once, and for further names of one the name that it is under."""
    first: dict[int, str] = {}
    tensors, aliases = {}, {}
    for name, tensor in _named_tensors(model):
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous().cpu().clone()
    return tensors, aliases


def _changed_sizes(model: nn.Module, edited: nn.Module) -> dict[str, dict[str, int]]:
    """What layers say of their sizes where the cut changed it."""
    before = dict(model.named_modules())
    found = {}
    for name, module in edited.named_modules():
        sizes = {key: vars(module)[key] for key in SIZES if key in vars(module)}
        changed = {key: size for key, size in sizes.items() if vars(before[name]).get(key) != size}
        if changed:
            found[name] = changed
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        value = json.loads(header[KEY])
        require_format(value["format"], FORMAT, path)
        return {key: dict(value[key]) for key in ("aliases", "sizes")}, tensors
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{path} is no exported edit",
            expected="a file written by export_edited",
            got=f"{type(error).__name__}: {error!s:.200}",
        ) from None


def _require_shape(
    model: nn.Module, name: str, tensor: Tensor, sizes: dict[str, Any], path: str | Path
) -> None:
    """Raise where a tensor has another shape than the model's, and no unit was cut there."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    there = {**module._buffers, **module._parameters}.get(key)
    if there is not None and there.shape != tensor.shape and owner not in sizes:
        raise EditError(
            f"{path} holds the weights of another kind of model",
            expected=f"{name} {list(there.shape)}",
            got=f"{name} {list(tensor.shape)}",
            todo="pass an instance of the class, and of the size, that was exported",
        )


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where its name says, as a parameter if that is what was there."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if key in module._buffers:
        there = module._buffers[key]
        module._buffers[key] = tensor if there is None else tensor.to(there.device)
        return
    old = module._parameters.get(key)
    flag = old.requires_grad if old is not None else True
    place = old.device if old is not None else next(model.parameters()).device
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor.to(place), requires_grad=flag)
    module._parameters[key] = tensor


def _held(model: nn.Module, name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    found = {**module._buffers, **module._parameters}[key]
    assert found is not None  # it was placed before
    return found
