"""The procedure of the COAR paper's code, in our words and in a process of its own: the peer of `ablation`.

For each mask: a deep copy of the model on the CPU, a python loop over the ablated indices with a scan over
the layers for each, the copy to the device, float32, and the loader read again. It gets what its scripts
have: batches of 500, torch's defaults, and nothing of ours (in particular not the memory setting that
`coar` makes for its process).
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from coar.outputs import margin


class Images(Dataset[Any]):
    """Images as data sets keep them: bytes, made into floating-point numbers whenever they are read."""

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        deviation: Sequence[float] = (0.25, 0.25, 0.25),
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self.mean, self.deviation = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = torch.from_numpy(self.pixels[index]).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(self.mean).div_(self.deviation), int(self.labels[index])


class PublishedProcedure:
    """Call it with a mask: the margins of all images, computed in the other process."""

    def __init__(self, model: nn.Module, images: Images, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        arguments = (theirs, model, images, str(device), torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """One row: [images]."""
        self._ours.send(mask)
        return self._ours.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self._ours.send(None)
        self._process.join()


def _serve(pipe: Connection, model: nn.Module, images: Images, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    loader = DataLoader(images, batch_size=500, shuffle=False)
    sizes = {f"{name}.weight": len(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    while (mask := pipe.recv()) is not None:
        masked = masked_copy(model, sizes, mask).to(device)
        with torch.no_grad():
            rows = [margin(masked, [part.to(device) for part in batch]).cpu() for batch in loader]
        pipe.send(torch.cat(rows).numpy())


def masked_copy(model: nn.Module, sizes: dict[str, int], mask: np.ndarray) -> nn.Module:
    """The model with the filters of `mask == False` set to zero."""
    masked = copy.deepcopy(model).cpu().eval()
    removed: dict[str, list[int]] = {}
    for index in (~mask).nonzero()[0]:
        name, position = locate(int(index), sizes)
        removed.setdefault(name, []).append(position)
    with torch.no_grad():
        parameters = dict(masked.named_parameters())
        for name, positions in removed.items():
            parameters[name][positions] = 0
    return masked


def locate(index: int, sizes: dict[str, int]) -> tuple[str, int]:
    """Parameter and position of a flat index, by a scan over the layers."""
    for name, size in sizes.items():
        if index < size:
            return name, index
        index -= size
    raise IndexError
