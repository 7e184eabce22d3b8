"""Handwritten digits: 1,797 images of 8 x 8 pixels that come with scikit-learn, and a small ResNet.

The network (312 convolution filters) is trained in seconds on 1,097 images; the task's examples
are the 700 others, which it has not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from coar.errors import SettingError
from coar.outputs import margin
from coar.progress import progress_bar
from coar.randomness import integers, permutation
from coar.recipes import task_factory
from coar.task import Task

NUM_TRAIN = 1097
WIDTHS = (24, 32, 48)
EPOCHS, BATCH, LEARNING_RATE = 30, 64, 0.1


@task_factory
def make_task(seed: int = 0, num_examples: int = 700, weights: str | None = None) -> Task:
    """The digits task: held-out images, the margin as output.

    Args:
        seed: of the split, the initial weights and the order of training.
        num_examples: how many of the 700 held-out images to use.
        weights: safetensors file of a network trained before; None trains one (5 to 10 seconds).

    >>> task = make_task(num_examples=50)                                       # doctest: +SKIP
    >>> len(task)                                                               # doctest: +SKIP
    50
    """
    images, labels, order = load_images(seed)
    test = order[NUM_TRAIN:]
    if not 1 <= num_examples <= len(test):
        raise SettingError("num_examples out of range", expected=f"1 to {len(test)}", got=num_examples)
    chosen = test[:num_examples]
    with _seeded(seed):
        model = DigitsResNet()
    if weights is None:
        train(model, images[order[:NUM_TRAIN]], labels[order[:NUM_TRAIN]], seed)
    else:
        load_model(model, weights)
    return Task(
        model.eval(),
        TensorDataset(images[chosen], labels[chosen]),
        outputs={"margin": margin},
        metadata={"id": chosen.tolist(), "label": labels[chosen].tolist()},
        show=show,
        save_weights=True,
    )


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for 8 x 8 images: 312 filters in nine convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTHS[0])
        self.block1 = Block(WIDTHS[0], WIDTHS[0], stride=1)
        self.block2 = Block(WIDTHS[0], WIDTHS[1], stride=2)
        self.block3 = Block(WIDTHS[1], WIDTHS[2], stride=2)
        self.classifier = nn.Linear(WIDTHS[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 1, 8, 8] -> logits [batch, 10]."""
        hidden = functional.relu(self.bn(self.conv(x)))
        hidden = self.block3(self.block2(self.block1(hidden)))
        return self.classifier(hidden.mean(dim=(2, 3)))


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, progress: bool = True) -> None:
    """Train in place: SGD, one cycle, images moved by up to one pixel. Deterministic on one machine."""
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * steps)
    model.train()
    with progress_bar(EPOCHS, "training, epochs", progress) as bar, torch.enable_grad():
        for epoch in range(EPOCHS):
            order = torch.from_numpy(permutation(seed, "digits training", epoch, len(images)))
            moves = integers(seed, "digits moves", epoch, 2 * steps, below=3) - 1
            for step in range(steps):
                batch = order[step * BATCH : (step + 1) * BATCH]
                moved = _moved(images[batch], *moves[2 * step : 2 * step + 2].tolist())
                optimizer.zero_grad()
                functional.cross_entropy(model(moved), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            bar.update(1)


def load_images(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """All images, float [1797, 1, 8, 8] (mean 0, deviation 1), their digits, and an order of them.

    The first `NUM_TRAIN` of the order are for training.

    Args:
        seed: of the order.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    images = (images - 0.3053) / 0.3763  # mean and deviation over all pixels
    return images, torch.tensor(labels), permutation(seed, "digits split", 0, len(images))


def show(item: Any, ax: Any) -> None:
    """Draw an image with its label on a matplotlib Axes."""
    image, label = item
    ax.imshow(image[0].numpy(), cmap="gray_r")
    ax.set_title(f"a {int(label)}")
    ax.set_axis_off()


def _moved(images: Tensor, down: int, right: int) -> Tensor:
    padded = functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    return padded[:, :, 1 - down : 9 - down, 1 - right : 9 - right]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator, seeded here and restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
