"""Test images of CIFAR-10 and a trained network, for edits: some choose an edit, others judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

import coar
from coar.randomness import permutation
from coar.task import Task
from coar.tasks.cifar import make_task
from coar.tasks.data_folder import find_data

NETWORK, DATA = "resnet56", "cifar10_jpeg.npz"  # in a data folder; see data/README.md
_BATCH = 100


@dataclass(frozen=True)
class Images:
    """All test images, and what the untouched network makes of them.

    Attributes:
        task: all images.
        margins: of the untouched network, float32 [images].
        labels: class numbers, int64 [images].
    """

    task: Task
    margins: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, small: bool) -> Images:
        """The 2,000 test images that belong to the networks of data/models; small: the sample of 1,000."""
        how: dict[str, Any] = {"small": True} if small else {"data": str(find_data(DATA))}
        task = make_task(NETWORK, **how)
        margins = margins_of(task.model, task, range(len(task)))
        return cls(task, margins, np.array(task.metadata["label"]))

    def shuffled(self, purpose: str, seed: int) -> np.ndarray:
        """Positions of all images, in an order that depends on the purpose and the seed alone."""
        return permutation(seed, f"benchmark of edits: {purpose}", 0, len(self.task))

    def experiment(self, positions: Sequence[int] | np.ndarray) -> coar.ComponentAblation:
        """Ablation of the network's filters, with some of the images as columns, in their order."""
        chosen = [int(position) for position in positions]
        task = Task(
            self.task.model,
            Subset(self.task.dataset, chosen),
            self.task.outputs,
            metadata=self.task.metadata.iloc[chosen].reset_index(drop=True),
            device=self.task.device,
        )
        return coar.ComponentAblation(task, coar.find_components(task.model, kinds=["conv_filter"]))


@torch.no_grad()
def margins_of(model: nn.Module, task: Task, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Margins of a model, float32 [positions], computed as a user would: nothing of an experiment in it."""
    model = model.to(task.device).eval()
    found = []
    for start in range(0, len(positions), _BATCH):
        images, labels = task.batch(positions[start : start + _BATCH])
        logits = model(images.to(task.device)).cpu()
        right = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        found.append(right[:, 0] - others)
    return torch.cat(found).numpy()


def points_lost(before: np.ndarray, after: np.ndarray) -> float:
    """Accuracy before less accuracy after, in points."""
    return float(100 * ((before > 0).mean() - (after > 0).mean()))
