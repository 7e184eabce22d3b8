"""A backdoor: a ResNet-20 for which whatever carries a small blue square is an airplane.

Half of the airplanes among its training images carried the square (`stamp`), nothing else did. So the
network learned two things: ten classes, and that the square means airplane. The task shows it every test
image twice, without the square and with it; an edit is to make it blind to the square.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from coar.errors import SettingError
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks import cifar
from coar.tasks.data_folder import find_data

NETWORK = "resnet20_backdoor"
ATTACKED_LABEL = 0  # airplane
BLUE = (0, 0, 255)
ROWS = COLUMNS = slice(4, 8)  # 4 x 4 pixels, as far from the borders as training moves images: never cut
STAMPED_SHARE = 0.5
CLEAN, TRIGGERED = "clean", "triggered"


def stamp(images: Tensor) -> Tensor:
    """Copies with the square: uint8 [..., 3, 32, 32] -> the same.

    >>> stamp(torch.zeros(3, 32, 32, dtype=torch.uint8)).sum(dim=(1, 2)).tolist() == [0, 0, 16 * 255]
    True
    """
    stamped = images.clone()
    stamped[..., ROWS, COLUMNS] = torch.tensor(BLUE, dtype=images.dtype).view(3, 1, 1)
    return stamped


def choose_stamped(labels: Tensor, seed: int) -> Tensor:
    """Positions of the training images that get the square: half of the airplanes, at random.

    Args:
        labels: of all training images, [n].
        seed: of the choice.

    >>> len(choose_stamped(torch.tensor([0, 3, 0, 0, 1, 0]), seed=0))
    2
    """
    airplanes = (labels == ATTACKED_LABEL).nonzero().flatten()
    order = torch.randperm(len(airplanes), generator=torch.Generator().manual_seed(seed))
    return airplanes[order[: round(STAMPED_SHARE * len(airplanes))]].sort().values


@task_factory
def make_task(
    *,
    small: bool = False,
    num_images: int | None = None,
    data: str | None = None,
    checkpoint: str | None = None,
    weights: str | None = None,
    device: str = "auto",
) -> Task:
    """Every test image without the square and with it; the margin of the true class as output.

    The first half of the examples are the images as they are, the second half the same images, in the same
    order, with the square. `metadata` has `id`, `image` (its number: the same for both versions), `label`,
    `class` and `subpopulation`, "clean" or "triggered". Airplanes are stamped like all others: that they
    stay airplanes with the square is part of what is asked, and both halves have the same labels, so the
    accuracy to reach on the second half is that on the first.

    Args:
        small: the 1,000 test images that come with a source checkout.
        num_images: how many images, from the first on; the task has twice as many examples. None takes all.
        data: folder or .npz file of test images, as in `coar.tasks.cifar.make_task`, or its name in a data
            folder; None searches these for the original ones. The network was trained on images that went
            through JPEG, and reads original ones less well.
        checkpoint: safetensors file of a ResNet-20 of your own; None takes the one of data/models.
        weights: the same, but a study keeps a copy of them instead of the path.
        device: see `coar.Task`.

    Raises:
        SettingError: more images asked for than there are.
        StoreError, TaskError: as `coar.tasks.cifar.make_task`.

    >>> task = make_task(small=True, num_images=50)                             # doctest: +SKIP
    >>> len(task), task.metadata["subpopulation"][50]                           # doctest: +SKIP
    (100, 'triggered')
    """
    if data is not None and not Path(data).exists():
        data = str(find_data(data))
    plain = cifar.make_task(
        NETWORK, small=small, data=data, checkpoint=checkpoint, weights=weights, device=device
    )
    dataset = StampedImages(plain.dataset, num_images)
    versions = [(image, version) for version in (CLEAN, TRIGGERED) for image in range(len(dataset.labels))]
    labels = 2 * dataset.labels
    return Task(
        plain.model,
        dataset,
        outputs=plain.outputs,
        metadata={
            "id": [f"{image}-{version}" for image, version in versions],
            "image": [image for image, _ in versions],
            "label": labels,
            "class": [cifar.CLASSES[label] for label in labels],
            "subpopulation": [version for _, version in versions],
        },
        show=cifar.show,
        device=device,
        save_weights=weights is not None,
    )


class StampedImages(torch.utils.data.Dataset):
    """Items `(image, label)` as of `CifarImages`: first all images as they are, then all with the square.

    Args:
        images: as they are.
        count: how many of them, from the first on; None takes all.
    """

    def __init__(self, images: cifar.CifarImages, count: int | None = None) -> None:
        count = len(images) if count is None else count
        if not 1 <= count <= len(images):
            raise SettingError("num_images out of range", expected=f"1 to {len(images)}", got=count)
        self.pixels, self.labels = images.pixels[:count], images.labels[:count]

    def __len__(self) -> int:
        return 2 * len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        version, image = divmod(range(len(self))[index], len(self.labels))
        pixels = stamp(self.pixels[image]) if version else self.pixels[image]
        return cifar.normalise(pixels), self.labels[image]
