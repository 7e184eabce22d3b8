"""Fingerprints: how a model, a batch or a data set is recognised again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from coar.errors import TaskError
from coar.files import digest_array, digest_json, sha256


def model_fingerprint(model: nn.Module) -> str:
    """Digest of a model: class of every module by qualified name, and the sorted state dict."""
    # Without the module path: a spawned worker knows the script's classes under another one.
    classes = [[name, type(module).__qualname__] for name, module in model.named_modules()]
    # Buffers that a state dict leaves out shape the outputs, too.
    state = sorted((dict(model.named_buffers()) | model.state_dict()).items())
    return digest_json([classes, [[name, digest_value(value)] for name, value in state]])


def digest_value(value: Any) -> str:
    """Digest of nested tensors, arrays, numbers, strings, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        if value.dtype == torch.bfloat16:  # unknown to NumPy
            value = value.view(torch.int16)
        return digest_array(value.numpy())
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return digest_array(np.asarray(value))
    if isinstance(value, Mapping):
        return digest_json([[str(key), digest_value(value[key])] for key in sorted(value, key=str)])
    if isinstance(value, list | tuple):
        return digest_json([digest_value(entry) for entry in value])
    if value is None or isinstance(value, str | int | float | bool):
        return sha256(repr(value).encode())
    raise TaskError(
        "a batch holds something that cannot be recognised again",
        expected="tensors, arrays, numbers, strings, and lists or dictionaries of them",
        got="an array of objects" if isinstance(value, np.ndarray) else type(value).__name__,
        todo="let the Task's collate function turn it into a tensor",
    )
