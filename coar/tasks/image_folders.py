"""Images for tasks: folders of files by class, or the small sample, as uint8 pixels with labels.

    FOLDER/CLASS/IMAGE.jpg        a label is the position of CLASS among the sorted folders

Examples are in the order of folders, then files. Items stay uint8 and are normalised by the batch,
so that a file of decoded images (`cached`) is small and quick to read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import SettingError, TaskError
from coar.files import digest_json, write_once
from coar.progress import progress_bar
from coar.randomness import integers
from coar.tasks.cifar import CLASSES, IMAGES, LABELS, SAMPLE
from coar.tasks.data_folder import places, read_sample
from coar.tasks.libraries import library

MADE_UP = 1000  # images there are where the sample is missing


class Images:
    """A data set of `(uint8 image [3, height, width], label)`, with names.

    Args:
        sources: one per image: a path, or anything else that `decode` takes.
        labels: class numbers.
        ids: unique names.
        classes: names of the classes.
        decode: source -> uint8 tensor, the same every time; None where the sources are such tensors.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        labels: Sequence[int],
        ids: Sequence[str],
        classes: Sequence[str],
        decode: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.sources, self.labels, self.ids, self.classes = sources, labels, ids, classes
        self.decode = decode

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        source = self.sources[index]
        return (self.decode(source) if self.decode else source), self.labels[index]

    def pick(self, stride: int = 1, count: int | None = None) -> Images:
        """Every `stride`-th image, and of these `count` at even distances (None: all)."""
        if stride < 1:
            raise SettingError("stride out of range", expected="at least 1", got=stride)
        indices = np.arange(0, len(self), stride)
        if count is not None:
            if not 1 <= count <= len(indices):
                raise SettingError("num_examples out of range", expected=f"1 to {len(indices)}", got=count)
            indices = indices[np.arange(count) * len(indices) // count]
        picked = indices.tolist()
        return Images(
            [self.sources[i] for i in picked],
            [self.labels[i] for i in picked],
            [self.ids[i] for i in picked],
            self.classes,
            self.decode,
        )

    def cached(self, folder: str | None, settings: str, paths: Iterable[Any] = ()) -> Images:
        """The same images, read from a file in `folder` that is written now if it is not there yet.

        Args:
            folder: where; None decodes an image whenever it is asked for.
            settings: whatever decides about the pixels beside the files; part of the file's name.
            paths: of the files; their sizes are part of the file's name.
        """
        if folder is None:
            return self
        sizes = [path.stat().st_size for path in map(Path, paths)]
        path = Path(folder) / f"images-{digest_json([settings, list(self.ids), sizes])[:16]}.npy"
        if not path.exists():
            write_once(path, self._write)
        return Images(np.load(path, mmap_mode="r"), self.labels, self.ids, self.classes, _copied)

    def _write(self, partial: Path) -> None:
        shape = (len(self), *self[0][0].shape)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        with progress_bar(len(self), "decoding, images") as bar:
            for index in range(len(self)):
                array[index] = self[index][0].numpy()
                bar.update(1)
        array.flush()

    def metadata(self) -> dict[str, list[Any]]:
        """Columns `id`, `label` and `class`."""
        names = [self.classes[label] for label in self.labels]
        return {"id": list(self.ids), "label": list(self.labels), "class": names}


def read_folder(
    folder: Path,
    num_classes: int | None,
    decode: Callable[[Any], Tensor] | None,
    todo: str,
    names: Sequence[str] = (),
) -> Images:
    """List the images of a folder.

    Args:
        folder: holds one folder per class.
        num_classes: how many there must be; None takes any number.
        decode: path -> uint8 tensor.
        todo: what an error tells the reader to do.
        names: of the classes, in the order of the sorted folders; default the folders' own.

    Raises:
        TaskError: no folder, a class without images, another number of classes.
    """
    if not folder.is_dir():
        raise TaskError("the folder of images is missing", expected=f"{folder}/CLASS/IMAGE", todo=todo)
    try:
        found = library("torchvision.datasets", "vision").ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise TaskError(f"{folder} is not a folder of images", got=str(error), todo=todo) from error
    if len(found.classes) != (num_classes or len(found.classes)):
        got = f"{len(found.classes)}: {', '.join(found.classes[:5])} ..."
        raise TaskError(f"{folder} has another number of classes", expected=num_classes, got=got, todo=todo)
    paths, labels = zip(*found.samples, strict=True)
    return Images(paths, labels, _ids(paths, folder), names or found.classes, decode)


def sample_images() -> Images:
    """Images of 32 x 32 pixels with ten classes: the sample of CIFAR-10 where it is, else made up."""
    if any((place / SAMPLE).exists() for place in places()):
        with np.load(io.BytesIO(read_sample(SAMPLE))) as arrays:
            pixels, labels = arrays[IMAGES], arrays[LABELS].tolist()
    else:
        labels = integers(0, "made-up labels", 0, MADE_UP, below=len(CLASSES)).tolist()
        pixels = np.stack([_made_up(index, label) for index, label in enumerate(labels)])
    images = list(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    return Images(images, labels, [str(i) for i in range(len(labels))], CLASSES)


def open_image(path: str) -> Any:
    """The PIL image of a file, in RGB."""
    with library("PIL.Image", "vision").open(path) as image:
        return image.convert("RGB")


def normalised(items: Sequence[tuple[Tensor, int]], mean: Sequence[float], std: Sequence[float]) -> Any:
    """Collate items of `Images` into `(float images [batch, 3, height, width], labels)`."""
    pixels = torch.stack([image for image, _ in items]).float() / 255
    shape = (1, 3, 1, 1)
    pixels = (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return pixels, torch.tensor([label for _, label in items])


def show(item: Any, ax: Any, classes: Sequence[str]) -> None:
    """Draw an image with its class on a matplotlib Axes."""
    image, label = item
    ax.imshow(image.permute(1, 2, 0).numpy())
    ax.set_title(classes[label])
    ax.set_axis_off()


def _ids(paths: Sequence[str], folder: Path) -> list[str]:
    """Names of the files, or their paths in the folder where two files have the same name."""
    names = [Path(path).name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [Path(path).relative_to(folder).as_posix() for path in paths]


def _copied(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels))


def _made_up(index: int, label: int) -> np.ndarray:
    """uint8 [32, 32, 3]: stripes whose width and colour tell the class, and noise."""
    noise = integers(0, "made-up images", index, 32 * 32 * 3, below=80).reshape(32, 32, 3)
    stripes = (np.arange(32) // (1 + label % 5) % 2 * 100)[:, None]
    stripes = stripes if label < 5 else stripes.T
    colour = np.eye(3, dtype=int)[label % 3]
    return (noise + stripes[..., None] * (0.4 + 0.6 * colour)).astype(np.uint8)
