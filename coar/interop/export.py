"""Rows of a study in the forms that the original code reads: a folder of memory maps, or a .beton file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from coar.creation import make_whole
from coar.errors import OutputError, SettingError, StudyError
from coar.interop.beton_format import BetonField
from coar.interop.beton_writer import write_beton_blocks
from coar.interop.original_spec import COMPLETED, MASKS
from coar.rows import decode, require_output
from coar.store import Item
from coar.study import Study

FILES = (".beton", ".npy", ".npz")  # no folder is called so on purpose


def export_store(study: Study, target: str | Path, outputs: Sequence[str] | str | None = None) -> Path:
    """Write the rows of a study as the original's store; see `coar.interop.original_store`.

    Outputs are in output units, float32 or float16 as the study stores them. Rows that are missing or
    have failed are zeros whose entry of _completed.npy is False. The folder is whole or absent.

    Args:
        study: any; imported ones are written as they were.
        target: new or empty folder.
        outputs: which ones, or the name of one; default all.

    Raises:
        OutputError: a float16 output overflows, row and column are named.
        SettingError: `study` is not a study, or `target` is named like a file.
    """
    _require_study(study)
    if Path(target).suffix in FILES:
        raise SettingError(
            "the original's store is a folder",
            expected="a name without the suffix of a file",
            got=str(target),
            todo="choose another name; a .beton file is written by export_beton (--layout beton)",
        )
    outputs = [outputs] if isinstance(outputs, str) else outputs
    names = [require_output(name, list(study.columns)) for name in outputs or study.columns]
    taken = [name for name in names if name in (MASKS, COMPLETED)]
    if taken:
        raise StudyError(
            f"an output called {taken[0]!r} cannot be exported: the layout needs that name for itself",
            todo=f"export the others: outputs={[name for name in names if name not in taken]}",
        )
    make_whole(Path(target), lambda draft: _write_store(study, draft, names))
    return Path(target)


def export_beton(study: Study, path: str | Path, output: str | None = None) -> Path:
    """Write the rows of a study as the original's regression data set, for FFCV.

    One sample per row that is there: `mask` bool [components], `targets` float32 [columns] in output
    units, `idx` the row's number.

    Args:
        study: any.
        path: the .beton file, which must not exist.
        output: which output; needed where there are several.

    Raises:
        SettingError: `study` is not a study, or the name does not end in .beton.
    """
    _require_study(study)
    if Path(path).suffix != ".beton":
        raise SettingError(
            "FFCV's file is called .beton",
            expected="a name that ends in .beton",
            got=str(path),
            todo="choose another name; a folder of arrays is written by export_store (--layout original)",
        )
    name = require_output(output, list(study.columns))
    fields = {
        "mask": BetonField(np.dtype(bool), (len(study.components),)),
        "targets": BetonField(np.dtype("<f4"), (len(study.columns[name]),)),
        "idx": BetonField(np.dtype("<i8")),
    }
    return write_beton_blocks(path, fields, len(study.masks), _samples(study, name))


def _require_study(study: Study) -> None:
    if not isinstance(study, Study):
        raise SettingError(
            "a study is exported, not a path or name",
            expected="a coar.Study",
            got=repr(study),
            todo=f"open it first: coar.Study.open({str(study)!r})"
            if isinstance(study, str | Path)
            else "open it first: coar.Study.open(path)",
        )


def _samples(study: Study, output: str) -> Iterator[Mapping[str, np.ndarray]]:
    for item in study.finished():
        shard = study.store.read(item)
        targets = decode(shard.outputs[output], study.untouched[output])
        yield {"mask": shard.masks, "targets": targets, "idx": shard.rows}


def _write_store(study: Study, draft: Path, names: Sequence[str]) -> None:
    rows = study.num_rows
    dtypes = {name: np.dtype(study.spec.outputs[name].dtype) for name in names}
    with contextlib.ExitStack() as stack:
        completed = stack.enter_context(_created(draft, COMPLETED, np.dtype(bool), (rows,)))
        masks = stack.enter_context(_created(draft, MASKS, np.dtype(bool), (rows, len(study.components))))
        files = {
            name: stack.enter_context(_created(draft, name, dtype, (rows, len(study.columns[name]))))
            for name, dtype in dtypes.items()
        }
        present = study.store.present()
        for item in study.items():
            block = _block(study, item, dtypes, item.index in present)
            completed.write(block[COMPLETED].data)
            masks.write(block[MASKS].data)
            for name, file in files.items():
                file.write(block[name].data)


def _block(study: Study, item: Item, dtypes: Mapping[str, np.dtype], there: bool) -> dict[str, np.ndarray]:
    """The rows of an item, zeros where there are none."""
    shapes = {COMPLETED: (), MASKS: (len(study.components),)}
    shapes |= {name: (len(study.columns[name]),) for name in dtypes}
    kinds = {COMPLETED: np.dtype(bool), MASKS: np.dtype(bool)} | dict(dtypes)
    found = {name: np.zeros((len(item), *shape), kinds[name]) for name, shape in shapes.items()}
    if there:
        shard = study.store.read(item)
        here = shard.rows - item.start
        found[COMPLETED][here], found[MASKS][here] = True, shard.masks
        for name, dtype in dtypes.items():
            found[name][here] = _in_output_units(study, name, shard.rows, shard.outputs[name], dtype)
    return found


def _in_output_units(
    study: Study, output: str, rows: np.ndarray, stored: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    values = decode(stored, study.untouched[output])
    if dtype == np.float16:
        _require_half(study, output, rows, values)
    return values.astype(dtype)


def _require_half(study: Study, output: str, rows: np.ndarray, values: np.ndarray) -> None:
    bad = np.abs(values) > np.finfo(np.float16).max
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise OutputError(
            f"row {rows[row]}: output {output!r} of column {study.columns[output].names[column]!r} is too "
            "large for float16",
            expected=f"at most {np.finfo(np.float16).max:g} in size",
            got=float(values[row, column]),
            todo="the study keeps float16 differences to the untouched output, which are small; the layout "
            "has no room for those: export the study as .beton (float32) instead",
        )


@contextlib.contextmanager
def _created(folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A .npy file whose contents are written in order."""
    # Not through a memory map: a disk that is full would end the process instead of raising an error.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with (folder / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file
        file.flush()
        os.fsync(file.fileno())
