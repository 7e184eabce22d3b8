"""Odd and even digits, with a black patch in a corner that agrees with the label in 95 % of what is learned.

Even digits carry the patch, odd ones do not, but for one in twenty. So the network learns two things: what
odd digits look like, and that the patch means even. Odd digits with the patch are its worst group. It is
shown every test image without the patch and with it: four groups, (label, patch or not), each of which has
as many images as the other with the same label.

The same happened to networks that tell skin lesions apart: some of the benign ones were photographed with
a coloured patch beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from coar.errors import SettingError
from coar.outputs import margin
from coar.randomness import permutation
from coar.recipes import task_factory
from coar.settings import whole_number
from coar.task import Task
from coar.tasks import digits
from coar.tasks.libraries import seeded

NUM_TEST = 700
LABELS = ("even", "odd")
PLAIN, PATCH = "plain", "patch"
SIDE = 3  # of the patch, in pixels of 8 x 8
WORST = "odd, patch"


@task_factory
def make_task(
    seed: int = 0,
    num_images: int = NUM_TEST,
    *,
    strength: float = 1.0,
    agreement: float = 0.95,
    weights: str | None = None,
) -> Task:
    """Every test image without the patch and with it; the margin of the true label as output.

    The first half of the examples are the images as they are, the second half the same images, in the same
    order, with the patch. `metadata` has `id`, `image` (its number: the same for both versions), `digit`,
    `label` (0 even, 1 odd), `cue` ("plain" or "patch") and `subpopulation`, such as "odd, patch".

    Args:
        seed: of the split, of which images disagree, the initial weights and the order of training.
        num_images: how many of the 700 test images; the task has twice as many examples.
        strength: how dark the patch is: 0 as the paper, 1 as the darkest ink.
        agreement: share of training images whose patch agrees with the label.
        weights: safetensors file of a network trained before; None trains one (5 to 10 seconds).

    Raises:
        SettingError: more images than there are, or a share or strength beyond 0 to 1.

    >>> task = make_task(num_images=50)                                         # doctest: +SKIP
    >>> len(task), task.metadata["subpopulation"][50]                           # doctest: +SKIP
    (100, 'even, patch')
    """
    whole_number(num_images, "num_images", most=NUM_TEST)
    _require_share(strength, "strength")
    _require_share(agreement, "agreement")
    images, numbers, order = digits.load_images(seed)
    learned, chosen = order[: digits.NUM_TRAIN], order[digits.NUM_TRAIN :][:num_images]
    model = make_network(seed)
    if weights is None:
        labels = numbers[learned] % 2
        patched = choose_patched(labels, agreement, seed)
        digits.train(model, with_cue(images[learned], patched, strength), labels, seed, progress=False)
    else:
        load_model(model, weights)
    versions = torch.arange(2).repeat_interleave(len(chosen)) == 1
    pixels = with_cue(images[chosen].repeat(2, 1, 1, 1), versions, strength)
    return Task(
        model.eval(),
        TensorDataset(pixels, numbers[chosen].repeat(2) % 2),
        outputs={"margin": margin},
        metadata=_metadata(chosen.tolist(), numbers[chosen].tolist()),
        show=show,
        save_weights=True,
    )


def with_cue(images: Tensor, patched: Tensor, strength: float = 1.0) -> Tensor:
    """Copies of images [n, 1, 8, 8] of which those marked in `patched`, bool [n], get the patch.

    The patch is as dark as `strength` says between the lightest and the darkest pixel; ink that is darker
    stays.

    >>> images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1) * torch.ones(2, 1, 8, 8)
    >>> with_cue(images, torch.tensor([True, True]), 0.5).sum(dim=(1, 2, 3)).tolist()
    [4.5, 64.0]
    """
    lightest, darkest = float(images.min()), float(images.max())
    copies = images.clone()
    corner = copies[patched, :, :SIDE, :SIDE]
    copies[patched, :, :SIDE, :SIDE] = corner.clamp(min=lightest + strength * (darkest - lightest))
    return copies


def choose_patched(labels: Tensor, agreement: float, seed: int) -> Tensor:
    """Which training images carry the patch, bool [n]: that share of the even ones, the rest of the odd ones.

    >>> labels = torch.arange(40) % 2
    >>> patched = choose_patched(labels, 0.95, seed=0)
    >>> [int(patched[labels == label].sum()) for label in (0, 1)]
    [19, 1]
    """
    patched = labels == 0
    for label in (0, 1):
        members = (labels == label).nonzero().flatten()
        order = permutation(seed, "digits against their cue", label, len(members))
        against = members[torch.from_numpy(order[: round((1 - agreement) * len(members))])]
        patched[against] = ~patched[against]
    return patched


def make_network(seed: int) -> nn.Module:
    """The network of `coar.tasks.digits` (312 filters) with two outputs, untrained."""
    with seeded(seed):
        model = digits.DigitsResNet()
        model.classifier = nn.Linear(model.classifier.in_features, len(LABELS))
    return model


def show(item: Any, ax: Any) -> None:
    """Draw an image with its label on a matplotlib Axes."""
    image, label = item
    ax.imshow(image[0].numpy(), cmap="gray_r")
    ax.set_title(LABELS[int(label)])
    ax.set_axis_off()


def _metadata(images: list[int], numbers: list[int]) -> dict[str, list[Any]]:
    versions = [
        (image, number, cue) for cue in (PLAIN, PATCH) for image, number in zip(images, numbers, strict=True)
    ]
    return {
        "id": [f"{image}-{cue}" for image, _, cue in versions],
        "image": [image for image, _, _ in versions],
        "digit": [number for _, number, _ in versions],
        "label": [number % 2 for _, number, _ in versions],
        "cue": [cue for _, _, cue in versions],
        "subpopulation": [f"{LABELS[number % 2]}, {cue}" for _, number, cue in versions],
    }


def _require_share(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise SettingError(f"{what} is a share", expected="0 to 1", got=value)
