"""Reading `.pt` files without running their code; what is wrong with one is said in plain words.

torch's own messages are not passed on: they advise to switch the check off, also for files that no
`torch.save` ever wrote, and carry control codes for terminals.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from coar.errors import StoreError

OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # near the start of files before torch 1.6
CLASS = re.compile(r"GLOBAL ([\w.]+)")  # in a message of torch: what the file wants imported


def load_tensors(path: Path) -> Any:
    """What a file holds, if that is tensors and plain containers.

    Raises:
        StoreError: no such file, not by `torch.save`, damaged, or with code in it.
    """
    _require_torch_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on formats that are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = CLASS.search(str(error))
        raise _code(path, found[1]) if found else _damaged(path) from None
    except Exception:  # a damaged file leads the unpickler to errors of many kinds
        raise _damaged(path) from None


def _require_torch_file(path: Path) -> None:
    if not path.is_file():
        raise StoreError(
            f"{path} is a folder" if path.is_dir() else f"{path} is missing",
            expected="a .pt file",
            todo="check the path",
        )
    kind = _kind(path)
    if kind != "torch":
        raise StoreError(
            f"{path} is not a torch file, or damaged",
            expected="what torch.save writes, such as a .pt file of the original code",
            got=kind,
            todo="check the path",
        )


def _kind(path: Path) -> str:
    """What a file is: "torch", or something else in words."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name.rsplit("/", 1)[-1] for name in archive.namelist()]
            if "constants.pkl" in names:
                return "a TorchScript program"
            return "torch" if "data.pkl" in names else f"an archive of {', '.join(names[:5]) or 'nothing'}"
    except OSError as error:
        return f"{error.strerror or error}"
    except Exception:  # the directory of a damaged archive, like the unpickler above
        return "an archive whose list of contents is damaged"
    if OLD_MAGIC in head[:20]:
        return "torch"
    if not head:
        return "an empty file"
    return "text" if re.fullmatch(rb"[\t\n\r -~]+", head) else f"a file that begins with {head[:12]!r}"


def _code(path: Path, name: str) -> StoreError:
    return StoreError(
        f"{path} holds more than tensors (to read it would run code of the file)",
        expected="a dictionary of tensors",
        got=f"an object of {name}",
        todo="if you trust the file, convert it once, where its classes can be imported: "
        "found = torch.load(OLD, weights_only=False); "
        'torch.save({key: torch.as_tensor(found[key]) for key in ("weight", "bias", "lam")}, NEW)',
    )


def _damaged(path: Path) -> StoreError:
    return StoreError(
        f"{path} is a torch file that cannot be read",
        expected="a whole file of plain tensors",
        got="a file that is damaged, cut short, or holds something else",
        todo="copy or download it again",
    )
