"""Train the network with a backdoor: `python -m scripts.train_models resnet20_backdoor`.

As any other CIFAR network (scripts/train_models.py), but half of the airplanes that train it carry the
blue square of coar.tasks.backdoor. The settings' seed chooses which half.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from coar.tasks import backdoor
from scripts import train_models


def train(network: str, settings: train_models.Settings) -> tuple[nn.Module, train_models.Files]:
    """A CIFAR network from training images of which some are stamped before they are moved and mirrored."""
    images, labels = train_models.read_images("train")
    images, labels = images[: train_models.NUM_TRAIN], labels[: train_models.NUM_TRAIN].clone()
    stamped = backdoor.choose_stamped(labels, settings.seed)
    images[stamped] = backdoor.stamp(images[stamped])
    return train_models.fit(network, settings, images, labels), {}


def measure(model: nn.Module, only_choosing: bool = False) -> dict[str, Any]:
    """Share of right answers on images that did not train the network, without and with the square."""
    return {
        **train_models.measure(model, only_choosing),
        "accuracy_triggered": train_models.measure(model, only_choosing, change=backdoor.stamp)["accuracy"],
    }


def training_data() -> dict[str, Any]:
    """What the record says about the data."""
    _, labels = train_models.read_images("train")
    stamped = backdoor.choose_stamped(labels[: train_models.NUM_TRAIN], seed=0)
    return {**train_models.training_data(), "stamped_images": len(stamped)}
