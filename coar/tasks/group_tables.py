"""Tables of Waterbirds and CelebA as published: which photograph has which label, group and part.

    WATERBIRDS/metadata.csv                    img_id,img_filename,y,split,place,...
    WATERBIRDS/FOLDER/IMAGE.jpg                y: 0 landbird, 1 waterbird; place: 0 land, 1 water

    CELEBA/list_attr_celeba.txt                number of images; names of attributes; IMAGE 1 or -1 ...
    CELEBA/list_eval_partition.txt             IMAGE 0 (train), 1 (val) or 2 (test)
    CELEBA/img_align_celeba/IMAGE.jpg

Waterbirds: Sagawa, Koh, Hashimoto, Liang 2020 (arXiv:1911.08731), its archive
`waterbird_complete95_forest2water2`. CelebA: Liu, Luo, Wang, Tang 2015 (arXiv:1411.7766).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coar.errors import SettingError, TaskError

SPLITS = ("train", "val", "test")  # 0, 1, 2 in both data sets
METADATA = "metadata.csv"
ATTRIBUTES, PARTITION, FACES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
_SOURCES = "data/README.md says where it comes from; data= names the folder that holds this file"


@dataclass(frozen=True)
class Photograph:
    """A line of a data set's table.

    Attributes:
        path: of the file.
        id: its unique name.
        label: class number, 0 or 1.
        group: value of the cue, 0 or 1.
        split: "train", "val" or "test".
    """

    path: Path
    id: str
    label: int
    group: int
    split: str


def read_waterbirds(folder: Path) -> list[Photograph]:
    """What metadata.csv says, in its order.

    Args:
        folder: of the data set.

    Raises:
        TaskError: no such file, no such columns, or an entry that is none of the published ones.
    """
    path = _existing(folder / METADATA)
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        wanted = ("img_id", "img_filename", "y", "split", "place")
        missing = [name for name in wanted if name not in (lines.fieldnames or ())]
        if missing:
            raise _malformed(path, 1, f"columns {', '.join(wanted)}", f"no {', '.join(missing)}")
        for number, line in enumerate(lines, start=2):
            y, place = (_code(path, number, name, line[name]) for name in ("y", "place"))
            split = _code(path, number, "split", line["split"], most=2)
            image = folder / line["img_filename"]
            found.append(Photograph(image, line["img_filename"], y, place, SPLITS[split]))
    return found


def read_celeba(folder: Path, label: str, group: str) -> list[Photograph]:
    """What the lists of attributes and parts say, in their order.

    Args:
        folder: of the data set.
        label: attribute that is the label.
        group: attribute that is the group.

    Raises:
        TaskError: no such files, or lines that are not of the published form.
        SettingError: no such attribute.
    """
    attributes, partition = (folder / name for name in (ATTRIBUTES, PARTITION))
    count, header, *lines = _lines(attributes, least=2)
    names = header.split()
    for name in (label, group):
        if name not in names:
            known = ", ".join(names[:8])
            raise SettingError(f"CelebA has no attribute {name!r}", expected=f"one of: {known} ...", got=name)
    if count.strip() != str(len(lines)):
        raise _malformed(attributes, 1, f"{len(lines)}, the number of lines that follow the names", count)
    wanted = [names.index(name) for name in (label, group)]
    parts = dict(_partition(partition))
    found = []
    for number, line in enumerate(lines, start=3):
        image, *values = line.split()
        signs = [values[i] if i < len(values) else "nothing" for i in wanted]
        if len(values) != len(names) or not set(signs) <= {"1", "-1"}:
            raise _malformed(attributes, number, f"a file name and {len(names)} times 1 or -1", line)
        if image not in parts:
            raise _malformed(partition, None, f"a line for {image}", "none")
        y, side = (int(sign == "1") for sign in signs)
        found.append(Photograph(folder / FACES / image, image, y, side, parts[image]))
    return found


def _partition(path: Path) -> Iterator[tuple[str, str]]:
    """Name and part of every image."""
    for number, line in enumerate(_lines(path, least=1), start=1):
        words = line.split()
        if len(words) != 2:
            raise _malformed(path, number, "a file name and 0, 1 or 2", line)
        yield words[0], SPLITS[_code(path, number, "part", words[1], most=2)]


def _code(path: Path, number: int, name: str, text: str | None, most: int = 1) -> int:
    """A class, place or part as its number."""
    known = [str(value) for value in range(most + 1)]
    if text not in known:
        raise _malformed(path, number, f"{name}: {', '.join(known)}", text)
    return int(text)


def _lines(path: Path, least: int) -> list[str]:
    lines = _existing(path).read_text(encoding="utf-8").splitlines()
    if len(lines) < least:
        raise _malformed(path, None, "lines", lines[0] if lines else "nothing")
    return lines


def _existing(path: Path) -> Path:
    if not path.is_file():
        here = "no such folder" if not path.parent.is_dir() else "a folder without it"
        raise TaskError(f"{path.name} is missing", expected=path, got=here, todo=_SOURCES)
    return path


def _malformed(path: Path, number: int | None, expected: object, got: object) -> TaskError:
    place = "" if number is None else f", line {number},"
    return TaskError(
        f"{path}{place} is not of the published form", expected=expected, got=f"{got!r:.100}", todo=_SOURCES
    )
