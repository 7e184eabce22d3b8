"""CIFAR-10: test images of 32 x 32 pixels and ten classes, the margin as output.

`small=True` takes what comes with a source checkout: a network trained on 15,000 images that went
through JPEG, and 1,000 test images that went through JPEG, too. Its accuracy, in data/README.md, is
that of a small network on little data, well below what these architectures reach on all of CIFAR-10.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import MissingDependencyError, SettingError, StoreError, TaskError, install_hint
from coar.outputs import margin
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.cifar_networks import build_network
from coar.tasks.data_folder import find_data, load_weights, read_sample

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # per colour, of the training images
SAMPLE, ORIGINAL = "cifar10_sample.npz", "cifar-10-batches-py"
IMAGES, LABELS = "test_images", "test_labels"
DOWNLOAD = (
    "download it once, 170 MB: python -c \"from torchvision.datasets import CIFAR10; CIFAR10('data', "
    'download=True)"; or take small=True; or give an .npz file as data (see data/README.md)'
)


@task_factory
def make_task(
    network: str = "resnet20",
    *,
    small: bool = False,
    num_examples: int | None = None,
    data: str | None = None,
    checkpoint: str | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> Task:
    """The CIFAR-10 task: test images in their order, the margin as output.

    Args:
        network: "resnet8", "resnet20", "resnet32", "resnet56", "vit", or "published" (COAR's, for which there
            are no weights here).
        small: the 1,000 images that come with a source checkout instead of the 10,000 original ones.
        num_examples: how many images, from the first on; None takes all.
        data: folder with `cifar-10-batches-py` as torchvision downloads it, or an .npz file with uint8
            `test_images` [n, 32, 32, 3] and `test_labels` [n]; None searches the data folders.
        checkpoint: safetensors file of a network of your own; None takes the trained ones of data/models.
        weights: the same, but a study keeps a copy of them instead of the path.
        device: see `coar.Task`.

    Raises:
        StoreError: images or weights are missing, damaged, or not those that were recorded.
        TaskError: the file of images or weights holds something else.

    >>> task = make_task("resnet20", small=True, num_examples=50)               # doctest: +SKIP
    >>> len(task), task.metadata["class"][0]                                    # doctest: +SKIP
    (50, 'truck')
    """
    model = build_network(network)  # first: an unknown name needs no data to be refused
    images, labels = _read(small, data)
    count = len(images) if num_examples is None else num_examples
    if not 1 <= count <= len(images):
        raise SettingError("num_examples out of range", expected=f"1 to {len(images)}", got=num_examples)
    dataset = CifarImages(images[:count], labels[:count])
    return Task(
        load_weights(model, network, weights or checkpoint),
        dataset,
        outputs={"margin": margin},
        metadata={
            "id": list(range(count)),
            "label": dataset.labels,
            "class": [CLASSES[label] for label in dataset.labels],
        },
        show=show,
        device=device,
        save_weights=weights is not None,
    )


class CifarImages(torch.utils.data.Dataset):
    """Items `(image, label)`: float32 [3, 32, 32], centred and scaled, and an int.

    Args:
        images: uint8 [n, 32, 32, 3]; kept as they are, and normalised when asked for.
        labels: class numbers [n].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        self.labels: list[int] = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.pixels[index]), self.labels[index]


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, 32, 32] -> float32, centred and scaled per colour."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images.to(torch.float32) / 255 - mean) / deviation


def show(item: Any, ax: Any) -> None:
    """Draw an image with the name of its class on a matplotlib Axes."""
    image, label = item
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    ax.imshow((image * deviation + mean).clamp(0, 1).permute(1, 2, 0).numpy())
    ax.set_title(CLASSES[int(label)])
    ax.set_axis_off()


def _read(small: bool, data: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n, 32, 32, 3], and labels [n]."""
    if small and data is not None:
        raise SettingError(
            "small=True has its own images", expected="small=True or data=..., not both", got=f"data={data!r}"
        )
    if small:
        return _read_npz(io.BytesIO(read_sample(SAMPLE)), SAMPLE)
    if data is not None and Path(data).is_file():
        return _read_npz(Path(data), data)
    return _read_original(data)


def _read_original(data: str | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise MissingDependencyError(
            "torchvision reads the original CIFAR-10", got=str(error), todo=install_hint("vision")
        ) from error
    try:
        folder = Path(data) if data is not None else find_data(ORIGINAL).parent
    except StoreError as error:
        raise StoreError(
            "CIFAR-10 is not here", expected=error.expected, got=error.got, todo=DOWNLOAD
        ) from None
    return _read_with(CIFAR10, folder)


def _read_with(library_class: Any, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = library_class(str(folder), train=False, download=False)  # compares MD5s
    except RuntimeError as error:
        raise StoreError(
            f"CIFAR-10 is not in {folder}, or its files are damaged",
            expected=f"a folder {ORIGINAL} in it, as torchvision downloads it; or an .npz file",
            got=str(error),
            todo=DOWNLOAD,
        ) from None
    return found.data, np.array(found.targets)


def _read_npz(source: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(source) as arrays:
            images, labels = arrays[IMAGES], arrays[LABELS]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TaskError(
            f"{name} is not a file of images", expected=f"an .npz with {IMAGES} and {LABELS}", got=str(error)
        ) from error
    right = images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3) and labels.ndim == 1
    if not right or len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise TaskError(
            f"{name} holds other arrays than expected",
            expected=f"{IMAGES} uint8 [n, 32, 32, 3], {LABELS} [n] from 0 to {len(CLASSES) - 1}",
            got=f"{IMAGES} {images.dtype} {list(images.shape)}, {LABELS} {labels.dtype} {list(labels.shape)}",
        )
    return images, labels
