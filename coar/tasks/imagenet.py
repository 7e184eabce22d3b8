"""ImageNet: torchvision's ResNet-50 and ViT-B/16 on validation images, the margin as output.

Images are read from folders as torchvision's `ImageFolder` and `ImageNet` lay them out:

    data/imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG        1,000 folders, 50,000 images

A label is the position of an image's folder among the sorted folders: the order of the network's
classes. Pixels are those of the weights' own `transforms()`.

`small=True` takes networks of the same torchvision classes with random weights, which need no
download. They exercise the code; what they predict, and every number that follows, means nothing.
For small networks that have learned something see `coar.tasks.cifar`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coar.errors import SettingError, TaskError
from coar.outputs import margin
from coar.recipes import task_factory
from coar.task import Task
from coar.tasks.data_folder import places
from coar.tasks.image_folders import Images, normalised, open_image, read_folder, sample_images, show
from coar.tasks.libraries import library, seeded

WEIGHTS = {"resnet50": "ResNet50_Weights", "vit_b_16": "ViT_B_16_Weights"}
NUM_CLASSES, SMALL_CLASSES, SMALL_PIXELS = 1000, 10, 32


@task_factory
def make_task(
    network: str = "resnet50",
    *,
    data: str | None = None,
    small: bool = False,
    num_examples: int | None = None,
    stride: int = 1,
    num_classes: int | None = None,
    checkpoint: str | None = None,
    cache: str | None = None,
    device: str = "auto",
) -> Task:
    """The ImageNet task: validation images, the margin as output.

    Args:
        network: "resnet50" or "vit_b_16".
        data: folder with `val/CLASS/IMAGE`, or with `CLASS/IMAGE`; None is `data/imagenet`, or with
            `small` the sample of CIFAR-10 in `data` (made-up images where that is missing).
        small: a small network with random weights on 32 x 32 pixels; its numbers mean nothing.
        num_examples: how many, at even distances among those that `stride` leaves; None takes all.
        stride: 10 takes every tenth image, as the published study of ViT-B/16 does.
        num_classes: how many folders there must be, and outputs of the network; None is 1,000 (small: 10).
        checkpoint: file with a state dict (.safetensors, or torch's own format), for machines without
            internet; None downloads torchvision's IMAGENET1K_V1. Small networks do without.
        cache: folder for a file of decoded images (150 kB each), written at first use. Without it
            examples that take more than 2 GB are decoded again for every row, which is most of the time.
        device: see `coar.Task`.

    Raises:
        TaskError: no such folder, another number of classes, a checkpoint of another network, no download.

    >>> make_task("vit_b_16", small=True, num_examples=8)                           # doctest: +SKIP
    Task(VisionTransformer, 8 examples, outputs ['margin'])
    """
    if network not in WEIGHTS:
        raise SettingError("unknown network", expected=" or ".join(WEIGHTS), got=repr(network))
    classes = num_classes or (SMALL_CLASSES if small else NUM_CLASSES)
    preset = _preset(network, small)
    found = sample_images() if small and data is None else _validation(data, network, classes, preset)
    with seeded(0):
        model = small_network(network, classes) if small else _trained(network, checkpoint, classes)
    picked = found.pick(stride, num_examples)
    images = picked.cached(cache, f"{network} {preset}", picked.sources if picked.decode else ())
    return Task(
        model.eval(),
        images,
        outputs={"margin": margin},
        collate=functools.partial(normalised, mean=preset.mean, std=preset.std),
        metadata=images.metadata(),
        show=functools.partial(show, classes=images.classes),
        device=device,
    )


def small_network(network: str, num_classes: int) -> nn.Module:
    """A ResNet with 1,984 filters, or a ViT with two blocks, of torchvision's classes, untrained."""
    models = library("torchvision.models", "vision")
    if network == "resnet50":
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
    sizes = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = models.VisionTransformer(image_size=SMALL_PIXELS, num_classes=num_classes, **sizes)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts with zeros: every margin would be 0
    return model


def load_checkpoint(model: nn.Module, path: str) -> nn.Module:
    """Put the state dict in a file (.safetensors, or torch's own format) into a model, and return it.

    Raises:
        TaskError: the file is missing, is no state dict, or is that of another network.
    """
    try:
        state = load_file(path) if path.endswith(".safetensors") else _torch_load(path)
        model.load_state_dict(state)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise errors of their own
        raise TaskError(
            f"cannot load the checkpoint {path}",
            expected=f"a state dict of this {type(model).__name__}",
            got=f"{type(error).__name__}: {error!s:.300}",
        ) from error
    return model


def crop(path: str, preset: Any) -> Tensor:
    """uint8 pixels [3, height, width] of an image file: a torchvision preset without its normalisation."""
    functional = library("torchvision.transforms.functional", "vision")
    resized = functional.resize(
        open_image(path), preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias
    )
    return functional.pil_to_tensor(functional.center_crop(resized, preset.crop_size))


def _trained(network: str, checkpoint: str | None, num_classes: int) -> nn.Module:
    models = library("torchvision.models", "vision")
    if checkpoint is not None:
        return load_checkpoint(models.get_model(network, weights=None, num_classes=num_classes), checkpoint)
    if num_classes != NUM_CLASSES:
        raise SettingError(
            "torchvision's weights are for the classes of ImageNet",
            expected=f"num_classes={NUM_CLASSES}",
            got=num_classes,
            todo="pass checkpoint=, the weights of a network with that many outputs",
        )
    weights = _weights(network)
    try:
        return models.get_model(network, weights=weights)
    except OSError as error:
        raise TaskError(
            f"cannot download the weights of {network}",
            expected=weights.url,
            got=f"{type(error).__name__}: {error}",
            todo="fetch that file on another machine and pass its path as checkpoint=",
        ) from error


def _torch_load(path: str) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _weights(network: str) -> Any:
    return getattr(library("torchvision.models", "vision"), WEIGHTS[network]).IMAGENET1K_V1


def _preset(network: str, small: bool) -> Any:
    sizes = {"crop_size": SMALL_PIXELS, "resize_size": SMALL_PIXELS} if small else {}
    return _weights(network).transforms(**sizes)


def _validation(data: str | None, network: str, num_classes: int, preset: Any) -> Images:
    folders = [Path(data)] if data else [place / "imagenet" for place in places()]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    folder = folder / "val" if (folder / "val").is_dir() else folder
    return read_folder(
        folder,
        num_classes,
        functools.partial(crop, preset=preset),
        todo="data= names the folder of ImageNet's validation images (from image-net.org; the licence "
        "forbids to ship them; data/README.md says how to get them), num_classes= the number of classes; "
        "small=True needs neither",
        names=_weights(network).meta["categories"] if num_classes == NUM_CLASSES else (),
    )
