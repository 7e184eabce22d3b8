"""The stores of the original COAR code: a folder of plain memory maps, read a block of rows at a time.

    STORE/
      _completed.npy      bool [rows]: the row is finished; everything else about other rows means nothing
      masks.npy           bool [rows, components], True = kept
      test_margins.npy    float16 [rows, columns], in output units; any number of such arrays, any names

Format: initialize_store.py and ndm_utils.py of MadryLab/modelcomponents.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coar.errors import OutputError, SettingError, StoreError
from coar.files import safe_name
from coar.interop.original_spec import COMPLETED, MASKS, read_original_spec

FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Rows:
    """Finished rows of a store.

    Attributes:
        numbers: int64 [k], their places in the store.
        masks: bool [k, components], True = kept.
        outputs: per output, [k, columns], as stored there.
    """

    numbers: np.ndarray
    masks: np.ndarray
    outputs: dict[str, np.ndarray]


class OriginalStore:
    """A store, checked when it is opened and read without writing to it.

    Args:
        folder: where the memory maps are.
        outputs: names of the arrays to read as outputs, or the name of one; default every one but masks
            and _completed.
        spec: the JSON file that the store was made with, to hold the arrays against.

    Attributes:
        completed: bool [rows], as it was when the store was opened.
        num_components: second axis of the masks.
        dtypes: type of each output.
        num_columns: second axis of each output.

    Raises:
        StoreError: an array is missing, damaged, or has another shape or type than it must.
    """

    def __init__(
        self, folder: str | Path, outputs: Sequence[str] | str | None = None, spec: str | Path | None = None
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise StoreError(
                f"{folder} is not the folder of a store",
                expected=f"a folder with {COMPLETED}.npy, {MASKS}.npy and one array per output",
                got="a file" if self.folder.exists() else "nothing",
                todo="check the path",
            )
        self._require_own_arrays()
        names = self._names([outputs] if isinstance(outputs, str) else outputs)
        arrays = {name: self._open(name) for name in (MASKS, COMPLETED)}
        self._require_masks(arrays)
        for name in names:
            try:
                arrays[name] = self._output(name, len(arrays[MASKS]))
            except (StoreError, SettingError) as error:
                error.todo = _advice(name, names, error.todo) if outputs is None else error.todo
                raise
        if spec is not None:
            self._require_spec(arrays, Path(spec))
        self.completed = _as_bool(np.array(arrays[COMPLETED]), self._path(COMPLETED))
        self.num_components = arrays[MASKS].shape[1]
        self.dtypes = {name: arrays[name].dtype for name in names}
        self.num_columns = {name: arrays[name].shape[1] for name in names}

    def __len__(self) -> int:
        return len(self.completed)

    @property
    def bytes_per_row(self) -> int:
        """Of the masks and all outputs, as read."""
        widths = (dtype.itemsize * self.num_columns[name] for name, dtype in self.dtypes.items())
        return self.num_components + sum(widths)

    def read(self, start: int, stop: int) -> Rows:
        """The finished rows of a range, checked.

        Raises:
            StoreError: a mask holds something else than 0 and 1.
            OutputError: an output is NaN or infinite; row and column are named.
        """
        numbers = start + np.flatnonzero(self.completed[start:stop])
        masks = _as_bool(self._rows(MASKS, start, stop, numbers), self._path(MASKS), numbers)
        outputs = {name: self._rows(name, start, stop, numbers) for name in self.dtypes}
        for name, values in outputs.items():
            self._require_finite(name, values, numbers)
        return Rows(numbers, masks, outputs)

    def blocks(self, size: int) -> Iterator[Rows]:
        """All finished rows, in blocks `[k * size, (k + 1) * size)` of row numbers."""
        for start in range(0, len(self), size):
            yield self.read(start, min(start + size, len(self)))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _names(self, asked: Sequence[str] | None) -> list[str]:
        found = sorted(path.stem for path in self.folder.glob("*.npy"))
        found = [name for name in found if name not in (COMPLETED, MASKS)]
        wanted = found if asked is None else list(asked)
        unknown = [name for name in wanted if name not in found]
        if unknown or not wanted:
            raise StoreError(
                f"{self.folder} has no output {unknown[0]!r}" if unknown else f"{self.folder} has no outputs",
                expected=", ".join(found) or f"an array beside {MASKS}.npy, such as test_margins.npy",
                got=self._contents(),
            )
        return wanted

    def _require_own_arrays(self) -> None:
        if (self.folder / "shards").is_dir() and not self._path(MASKS).exists():
            raise StoreError(
                f"{self.folder} is a study of coar already",
                expected=f"a store of the original code: {COMPLETED}.npy, {MASKS}.npy, one array per output",
                got="spec.json and shards",
                todo=f"use it as it is: coar status {self.folder}",
            )
        wanted = {MASKS: "bool [rows, components], True = kept", COMPLETED: "bool [rows], True = finished"}
        for name, text in wanted.items():
            if not self._path(name).exists():
                raise StoreError(
                    f"{self._path(name)} is missing",
                    expected=text,
                    got=self._contents(),
                    todo="check the path",
                )

    def _contents(self) -> str:
        return ", ".join(sorted(path.name for path in self.folder.iterdir())[:8]) or "an empty folder"

    def _open(self, name: str) -> np.ndarray:
        """The memory map; opened anew for each block, so that no more than a block stays mapped."""
        path = self._path(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a parser, on headers that are checked here
                return np.lib.format.open_memmap(path, mode="r")
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing", expected="one .npy file per array", todo="check the path"
            ) from None
        except Exception as error:  # a damaged header leads NumPy's parser to errors of many kinds
            raise StoreError(
                f"{path} is not a readable array",
                expected="a .npy file of numbers that can be mapped into memory",
                got=f"{error!s:.200}",
            ) from None

    def _rows(self, name: str, start: int, stop: int, numbers: np.ndarray) -> np.ndarray:
        if not len(numbers):
            return self._open(name)[:0]
        return np.ascontiguousarray(self._open(name)[start:stop][numbers - start])

    def _require_masks(self, arrays: Mapping[str, np.ndarray]) -> None:
        masks, completed = arrays[MASKS], arrays[COMPLETED]
        if masks.ndim != 2 or 0 in masks.shape:
            raise _unlike(self._path(MASKS), "(any number, any number): [rows, components]", masks.shape)
        if completed.shape != masks.shape[:1]:
            raise _unlike(
                self._path(COMPLETED), f"({len(masks)},), one entry per row of {MASKS}.npy", completed.shape
            )
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise _unlike(self._path(name), "0 and 1 as bool or numbers", array.dtype)

    def _output(self, name: str, rows: int) -> np.ndarray:
        array = self._open(safe_name(name, "an output's name"))
        if array.ndim != 2 or len(array) != rows or 0 in array.shape:
            error = _unlike(self._path(name), f"({rows}, any number), rows as in {MASKS}.npy", array.shape)
            if array.shape == (rows,):
                error.todo = f"where it is an output, save it as array.reshape({rows}, 1)"
            raise error
        if array.dtype.name not in FLOATS:
            raise _unlike(self._path(name), f"outputs of type {', '.join(FLOATS)}", array.dtype)
        return array

    def _require_spec(self, arrays: Mapping[str, np.ndarray], path: Path) -> None:
        spec = read_original_spec(path)
        for name, array in arrays.items():
            if name == COMPLETED:
                continue
            if name not in spec:
                raise StoreError(
                    f"{path}: key 'schema.{name}' is missing", expected=f"what {self._path(name)} holds"
                )
            shape, dtype = spec[name]
            if shape != array.shape:
                key = "num_models" if shape[0] != len(array) else f"schema.{name}.shape"
                raise _unlike(self._path(name), f"shape {shape}: {path}, key {key!r}", array.shape)
            if dtype != array.dtype:
                raise _unlike(self._path(name), f"{dtype}: {path}, key 'schema.{name}.dtype'", array.dtype)

    def _require_finite(self, name: str, values: np.ndarray, numbers: np.ndarray) -> None:
        limit = np.finfo(np.float32).max  # what can be stored here; float64 may hold more
        fine = np.abs(values) <= limit if values.dtype == np.float64 else np.isfinite(values)
        if fine.all():
            return
        row, column = np.argwhere(~fine)[0]
        raise OutputError(
            f"{self._path(name)}: row {numbers[row]}, column {column} is finished and holds no usable number",
            expected=f"finite, at most {limit:g} in size",
            got=f"{values[row, column]}, and {np.count_nonzero(~fine) - 1} others in rows {numbers[0]} to "
            f"{numbers[-1]}",
            todo=f"run this row again, or set its entry of {COMPLETED}.npy to False: it is left out then",
        )


def _as_bool(values: np.ndarray, path: Path, numbers: np.ndarray | None = None) -> np.ndarray:
    """Values that are 0 or 1 as bool; looked at as bytes, since a damaged bool may be neither."""
    plain = values.view(np.uint8) if values.dtype == bool else values
    wrong = (plain != 0) & (plain != 1)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        row = place[0] if numbers is None else numbers[place[0]]
        where = f"row {row}" + (f", component {place[1]}" if len(place) > 1 else "")
        raise StoreError(
            f"{path}: {where} is neither 0 nor 1",
            expected="True (kept) or False (ablated)" if numbers is not None else "True (finished) or False",
            got=plain[tuple(place)],
        )
    return plain != 0


def _advice(name: str, names: Sequence[str], todo: str | None) -> str:
    """What to do about an array that was taken for an output because it lies there."""
    others = [other for other in names if other != name]
    if not others:
        return todo or "check the file"
    options = " ".join(f"--output {other}" for other in others)
    text = f"where {name}.npy is no output, move it away, or name those that are: "
    return "; ".join(filter(None, [todo, f"{text}import_store(outputs={others}), coar import {options}"]))


def _unlike(path: Path, expected: str, got: object) -> StoreError:
    return StoreError(f"{path} does not belong to this store", expected=expected, got=got)
