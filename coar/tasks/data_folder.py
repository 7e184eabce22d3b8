"""Where data sets and trained networks lie, and reading them: never without their checksum.

```
data/
  samples.json   cifar10_sample.npz   shakespeare_sample.txt      checksums; a few examples for tests
  models/
    models.json  resnet20.safetensors  ...                        checksums, accuracy, how each was made
```
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from coar.errors import StoreError, TaskError
from coar.files import sha256

DATA_VARIABLE = "COAR_DATA"
MODELS, SAMPLES = "models/models.json", "samples.json"


def places() -> list[Path]:
    """Folders that are searched, in order: $COAR_DATA, data/ here, data/ beside a checkout's package."""
    named = os.environ.get(DATA_VARIABLE)
    here, checkout = Path.cwd() / "data", Path(__file__).resolve().parents[2] / "data"
    return list(dict.fromkeys([Path(named).expanduser(), here, checkout] if named else [here, checkout]))


def find_data(name: str) -> Path:
    """First place that has a file or folder of this name, `models/models.json` for example.

    Raises:
        StoreError: no place has it; the error lists them.
    """
    for place in places():
        if (place / name).exists():
            return place / name
    raise StoreError(
        f"no data folder has {name}",
        expected=f"it in one of: {', '.join(str(place) for place in places())}",
        got="none of them has it",
        todo=f"run from a source checkout, whose data/ holds the small files and whose data/README.md says "
        f"how to get the others, or set {DATA_VARIABLE} to a folder that has it",
    )


def read_checked(path: Path, checksum: str, record: str) -> bytes:
    """Bytes of a file whose SHA-256 is the recorded one.

    Args:
        path: the file.
        checksum: what `record`, named in the error, says its SHA-256 is.
        record: name of the file that lists checksums.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"cannot read {path}", expected=f"the file that {record} lists", got=str(error)
        ) from error
    if sha256(content) != checksum:
        raise StoreError(
            f"{path} is not the file that {record} describes",
            expected=f"SHA-256 {checksum}",
            got=f"SHA-256 {sha256(content)} ({len(content):,} bytes)",
            todo="fetch the file again, or pass a network of your own as checkpoint",
        )
    return content


def read_sample(name: str) -> bytes:
    """A sample of a data set, as listed in samples.json."""
    record = find_data(SAMPLES)
    return read_checked(record.parent / name, _entry(record, name)["sha256"], record.name)


def model_record(network: str) -> dict[str, Any]:
    """What models.json says about a trained network: file, sha256, accuracy, how it was made."""
    return _entry(find_data(MODELS), network)


def read_model_file(network: str, part: str = "weights") -> bytes:
    """One of the files of a trained network ("weights", or what else its record lists), checked."""
    record = find_data(MODELS)
    listed = _entry(record, network)["files"][part]
    return read_checked(record.parent / listed["file"], listed["sha256"], record.name)


def load_weights(model: nn.Module, network: str, weights: str | None) -> nn.Module:
    """Fill a network from a safetensors file, in float32, and set it to eval mode.

    Args:
        model: as built, of the same architecture.
        network: its name in models.json, from where the weights come if `weights` is None.
        weights: path of a file of the user's own, which no checksum describes.

    Raises:
        StoreError: the file is missing, damaged, or not the one that models.json describes.
        TaskError: it holds the weights of another architecture.
    """
    origin = weights or f"the weights of {network} in models.json"
    try:
        content = Path(weights).read_bytes() if weights else read_model_file(network)
        state = load(content)
    except (OSError, SafetensorError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot read {origin}", expected="a safetensors file", got=f"{type(error).__name__}: {error}"
        ) from error
    _fill(model, {name: _in_float32(tensor) for name, tensor in state.items()}, origin)
    return model.eval()


def _fill(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    aliases = tied_names(model)
    state = {aliases.get(name, name): tensor for name, tensor in state.items()}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    differing = sorted(
        name
        for name in wanted.keys() | state.keys()
        if name not in wanted or name not in state or wanted[name].shape != state[name].shape
    )
    if differing:
        raise TaskError(
            f"{origin}: another architecture than {type(model).__name__}",
            expected=f"{len(wanted)} tensors, named and shaped as in the model's state_dict()",
            got=f"{len(state)} tensors; {len(differing)} differ, first: {differing[0]}",
        )
    model.load_state_dict(state, strict=False)  # not strict only about second names of tied tensors


def tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of parameters, and their first names: a file holds a tied parameter once."""
    first: dict[int, str] = {}
    names = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return {name: first[i] for name, i in names if first.setdefault(i, name) != name}


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _entry(record: Path, name: str) -> dict[str, Any]:
    entries = json.loads(record.read_text(encoding="utf-8"))
    if name not in entries:
        raise StoreError(
            f"{record} knows no {name}",
            expected=f"one of: {', '.join(entries)}",
            got=name,
            todo="pass a network of your own as checkpoint, or train one: see data/README.md",
        )
    return entries[name]
