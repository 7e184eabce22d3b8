"""Photographs in groups: Waterbirds and CelebA as published, for networks that lean on a cue of the group.

What lies in a folder is described in `coar.tasks.group_tables`. There are no published weights that
everybody uses, so the network is yours: a ResNet of torchvision, fine-tuned on the training part, as a file
with its state dict. Images are resized, cropped and normalised as torchvision's weights for ImageNet ask.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coar.errors import SettingError, TaskError
from coar.outputs import margin
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.group_tables import SPLITS, Photograph, read_celeba, read_waterbirds
from coar.tasks.image_folders import Images, normalised, show
from coar.tasks.imagenet import SMALL_PIXELS, crop, load_checkpoint, small_network
from coar.tasks.libraries import library, seeded

BIRDS, PLACES = ("landbird", "waterbird"), ("land", "water")
NETWORKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@task_factory
def make_waterbirds_task(
    data: str,
    checkpoint: str | None = None,
    *,
    network: str = "resnet50",
    splits: Sequence[str] = ("test",),
    stride: int = 1,
    num_examples: int | None = None,
    cache: str | None = None,
    small: bool = False,
    device: str = "auto",
) -> Task:
    """Waterbirds: is it a waterbird, on land or on water? The margin of the true class as output.

    `metadata` has `id`, `label` (0 landbird, 1 waterbird), `class`, `place`, `split`, and `subpopulation`,
    such as "waterbird on land". The test part has as many images on land as on water, for each label.

    Args:
        data: folder with metadata.csv and the folders of images.
        checkpoint: file with a state dict (.safetensors, or torch's own format) of the network, two outputs.
        network: a ResNet of torchvision: "resnet18", 34, 50, 101 or 152.
        splits: parts to take: "train", "val", "test".
        stride: 10 takes every tenth image.
        num_examples: how many, at even distances among those that `stride` leaves; None takes all.
        cache: folder for a file of decoded images (150 kB each), written at first use; else images are
            decoded again for every row where they are more than 2 GB.
        small: an untrained small network on 32 x 32 pixels: exercises the code, its numbers mean nothing.
        device: see `coar.Task`.

    Raises:
        TaskError: files that are missing or not of the published form, or a checkpoint of another network.
        SettingError: an unknown network or split, or no checkpoint.

    >>> make_waterbirds_task("data/waterbirds", "resnet50.pt")                  # doctest: +SKIP
    Task(ResNet, 5794 examples, outputs ['margin'])
    """
    found = _of_splits(read_waterbirds(Path(data)), splits)
    options = _Options(checkpoint, network, stride, num_examples, cache, small, device)
    names = {(y, place): f"{BIRDS[y]} on {PLACES[place]}" for y in (0, 1) for place in (0, 1)}
    return _task(found, options, BIRDS, "place", PLACES, names)


@task_factory
def make_celeba_task(
    data: str,
    checkpoint: str | None = None,
    *,
    label: str = "Blond_Hair",
    group: str = "Male",
    network: str = "resnet50",
    splits: Sequence[str] = ("test",),
    stride: int = 1,
    num_examples: int | None = None,
    cache: str | None = None,
    small: bool = False,
    device: str = "auto",
) -> Task:
    """CelebA: is the hair blond? With the group of an image beside its label; the margin as output.

    `metadata` has `id`, `label` (1 where the attribute is there), `class`, the group's attribute in lower
    case, `split`, and `subpopulation`, such as "Blond_Hair, Male" or "not Blond_Hair, not Male".

    Args:
        data: folder with list_attr_celeba.txt, list_eval_partition.txt and img_align_celeba.
        checkpoint: as in `make_waterbirds_task`, like all that follows but the two attributes.
        label: the attribute that the network tells.
        group: the attribute that it should not go by.
        network: a ResNet of torchvision.
        splits: parts to take.
        stride: every how manyth image.
        num_examples: how many images.
        cache: folder for decoded images.
        small: an untrained small network.
        device: see `coar.Task`.

    Raises:
        TaskError, SettingError: as `make_waterbirds_task`.

    >>> make_celeba_task("data/celeba", "resnet50.pt", stride=10)               # doctest: +SKIP
    Task(ResNet, 1997 examples, outputs ['margin'])
    """
    found = _of_splits(read_celeba(Path(data), label, group), splits)
    options = _Options(checkpoint, network, stride, num_examples, cache, small, device)
    sides = (f"not {label}", label), (f"not {group}", group)
    names = {(y, side): f"{sides[0][y]}, {sides[1][side]}" for y in (0, 1) for side in (0, 1)}
    return _task(found, options, sides[0], group.lower(), sides[1], names)


@dataclass(frozen=True)
class _Options:
    """What both tasks take; see `make_waterbirds_task`."""

    checkpoint: str | None
    network: str
    stride: int
    num_examples: int | None
    cache: str | None
    small: bool
    device: str


def _task(
    photographs: Sequence[Photograph],
    options: _Options,
    classes: Sequence[str],
    cue: str,
    sides: Sequence[str],
    names: Mapping[tuple[int, int], str],
) -> Task:
    """The task of these photographs.

    Args:
        photographs: of the splits asked for.
        options: see there.
        classes: names of the two labels.
        cue: the column of the metadata that has the group.
        sides: names of its two values.
        names: of the subpopulations, by label and group.
    """
    preset = _preset(options.network, options.small)
    model = _network(options)
    decode = functools.partial(_decoded, preset=preset)
    labels, ids = [photo.label for photo in photographs], [photo.id for photo in photographs]
    found = Images([_present(photo.path) for photo in photographs], labels, ids, classes, decode)
    picked = found.pick(options.stride, options.num_examples)
    images = picked.cached(options.cache, f"{options.network} {preset}", picked.sources)
    by_id = {photo.id: photo for photo in photographs}
    chosen = [by_id[name] for name in images.ids]
    more = {
        cue: [sides[photo.group] for photo in chosen],
        "split": [photo.split for photo in chosen],
        "subpopulation": [names[photo.label, photo.group] for photo in chosen],
    }
    return Task(
        model.eval(),
        images,
        outputs={"margin": margin},
        collate=functools.partial(normalised, mean=preset.mean, std=preset.std),
        metadata=images.metadata() | more,
        show=functools.partial(show, classes=images.classes),
        device=options.device,
    )


def _of_splits(photographs: Sequence[Photograph], splits: Sequence[str]) -> list[Photograph]:
    unknown = [split for split in splits if split not in SPLITS]
    if isinstance(splits, str) or unknown or not splits:
        raise SettingError("unknown split", expected=f"a list of some of {', '.join(SPLITS)}", got=splits)
    found = [photo for photo in photographs if photo.split in splits]
    if not found:
        raise TaskError(
            "no image is of these splits",
            expected=f"images of {', '.join(splits)}",
            got=f"{len(photographs)} images, all of other splits",
            todo="name other splits, or look at the table of the data set",
        )
    return found


def _network(options: _Options) -> nn.Module:
    """The user's ResNet, or a small untrained one."""
    with seeded(0):
        if options.small:
            return small_network("resnet50", 2)
        if options.checkpoint is None:
            raise SettingError(
                "this task needs a network of yours",
                expected=f"checkpoint=, a file with the state dict of a {options.network} with two outputs",
                todo="fine-tune torchvision's on the training part; small=True takes an untrained one",
            )
        models = library("torchvision.models", "vision")
        model = models.get_model(options.network, weights=None, num_classes=2)
    return load_checkpoint(model, options.checkpoint)


def _preset(network: str, small: bool) -> Any:
    if network not in NETWORKS:
        raise SettingError("unknown network", expected=", ".join(NETWORKS), got=repr(network))
    sizes = {"crop_size": SMALL_PIXELS, "resize_size": SMALL_PIXELS} if small else {}
    models = library("torchvision.models", "vision")
    return models.get_model_weights(network)["IMAGENET1K_V1"].transforms(**sizes)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise TaskError(
            f"the image {path.name} is missing",
            expected=path,
            todo="unpack the whole archive of images beside the table",
        )
    return path


def _decoded(path: Path, preset: Any) -> Tensor:
    try:
        return crop(str(path), preset)
    except OSError as error:  # PIL's own, too
        raise TaskError(f"cannot read the image {path}", got=f"{type(error).__name__}: {error}") from error
