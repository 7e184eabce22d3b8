"""import_store: a store of the original code -> a study like any other, that can be fitted but not run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np

from coar.axes import Axis
from coar.creation import FORMAT, make_whole, require_free, write_head
from coar.designs import ImportedMasks
from coar.errors import AxisError, CoarWarning, StoreError
from coar.experiments.imported import ImportedRows
from coar.files import canonical_json
from coar.interop.names import Names, axis_from
from coar.interop.original_store import OriginalStore, Rows
from coar.settings import whole_number
from coar.spec import StudySpec
from coar.store import Item, Shard
from coar.study import Study

SHARD_BYTES = 64 * 2**20  # of one shard as read; a few times that is the memory an import takes
SHIFT_ROWS = 256  # whose mean stands for outputs with every component kept


def import_store(
    source: str | Path,
    directory: str | Path,
    *,
    outputs: Sequence[str] | str | None = None,
    components: Names | None = None,
    columns: Names | Mapping[str, Names] | None = None,
    spec: str | Path | None = None,
    rows_per_shard: int | None = None,
) -> Study:
    """Make a study of the finished rows of an original store; others are left out, never taken for zeros.

    Rows keep their numbers. The store is read twice, block by block: once to check and digest it, once
    to copy it.

    Args:
        source: folder with _completed.npy, masks.npy and one array per output; see
            `coar.interop.original_store`.
        directory: folder of the study; new or empty.
        outputs: names of the arrays to take, or the name of one; default all.
        components: names (an axis, a list, or a text file with one per line); default 0, 1, ... The axis
            of an experiment on the same model lets what is fitted here be evaluated and edited there.
        columns: the same, for every output or by output.
        spec: the original's spec file ("num_models", "schema"), to hold the arrays against.
        rows_per_shard: default by size.

    Raises:
        StoreError: an array is missing, damaged, or does not fit the others.
        OutputError: NaN or infinity in a finished row; row and column are named.
        StudyError: the directory is not empty.

    Warns:
        CoarWarning: masks keep less than half, as they do where True means ablated.
    """
    require_free(Path(directory))
    store = OriginalStore(source, outputs, spec)
    _require_some(store)
    size = _rows_per_shard(store, rows_per_shard)
    survey = _Survey(store, size)
    _warn_few_kept(store, survey.kept)
    own = {"store": survey.digest}
    components_axis = axis_from(components, "components", store.num_components, own)
    axes = _columns(store, columns, own)
    experiment = ImportedRows.of_axes(survey.digest, components_axis, axes)
    found = _spec(store, experiment)
    facts = _facts(store, survey, size)

    def fill(draft: Path) -> None:
        write_head(draft, found, experiment, survey.untouched, facts)
        _copy(store, Study(draft), survey.digest)

    make_whole(Path(directory), fill)
    return Study.open(directory)


def imported_summary(study: Study) -> str:
    """One line for people: what was read."""
    facts = study.provenance["imported"]
    outputs = [
        f"{name} ({facts['dtypes'][name]}, {_count(axis, 'column')})" for name, axis in study.columns.items()
    ]
    return (
        f"{_count(outputs, 'output')} {', '.join(outputs)}, {_count(study.components, 'component')}, "
        f"masks keep {facts['kept_fraction']:.1%}"
    )


def _count(things: Sized, word: str) -> str:
    return f"{len(things):,} {word}{'s' if len(things) != 1 else ''}"


def _warn_few_kept(store: OriginalStore, kept: float) -> None:
    if kept < 0.5:
        warnings.warn(
            f"the masks of {store.folder} keep {kept:.1%} of the components; True means kept: where it meant "
            "ablated, save ~masks and import again",
            CoarWarning,
            stacklevel=3,
        )


class _Survey:
    """What must be known of a store before anything is written.

    Attributes:
        digest: of all that is imported.
        kept: share of the masks' entries that are True.
        untouched: per output, [columns]: what stands for outputs with every component kept.
        origin: per output, where that comes from, for people.
    """

    def __init__(self, store: OriginalStore, size: int) -> None:
        digest = _Digest(store)
        self.whole: tuple[int, dict[str, np.ndarray]] | None = None
        self.first: list[Rows] = []
        self._kept = self._rows = 0
        for rows in digest.watch(store.blocks(size)):
            self._look(rows)
        self.digest = digest.hexdigest()
        self.kept = self._kept / (self._rows * store.num_components)
        chosen = {name: self._untouched(name, dtype) for name, dtype in store.dtypes.items()}
        self.untouched = {name: values for name, (values, _) in chosen.items()}
        self.origin = {name: text for name, (_, text) in chosen.items()}

    def _look(self, rows: Rows) -> None:
        wanted = SHIFT_ROWS - sum(len(part.numbers) for part in self.first)
        if wanted > 0:
            outputs = {name: array[:wanted].copy() for name, array in rows.outputs.items()}
            self.first.append(Rows(rows.numbers[:wanted], rows.masks[:0], outputs))
        self._kept += int(np.count_nonzero(rows.masks))
        self._rows += len(rows.masks)
        kept = rows.masks.all(axis=1)
        if self.whole is None and kept.any():
            place = int(np.argmax(kept))
            values = {name: array[place].copy() for name, array in rows.outputs.items()}
            self.whole = int(rows.numbers[place]), values

    def _untouched(self, name: str, dtype: np.dtype) -> tuple[np.ndarray, str]:
        if dtype == np.float16:
            # Stored as differences to this. -0.0 is the one number that changes no other when it is
            # added (0.0 would make 0.0 of -0.0), so the numbers of the store are kept bit by bit.
            width = self.first[0].outputs[name].shape[1]
            return np.full(width, -0.0, np.float32), "zeros, so that float16 is stored as it was"
        if self.whole is not None:
            row, values = self.whole
            return values[name].astype(np.float32), f"row {row}, which keeps every component"
        first = np.concatenate([part.outputs[name] for part in self.first])
        mean = first.mean(axis=0, dtype=np.float64).astype(np.float32)
        return (
            mean,
            f"not known; the mean of the first {len(first)} finished rows, a shift that sums are near",
        )


class _Digest:
    """Digest of the finished rows of a store, of its layout, and of which rows are finished."""

    def __init__(self, store: OriginalStore) -> None:
        layout = {name: [str(dtype), store.num_columns[name]] for name, dtype in store.dtypes.items()}
        head = [len(store), store.num_components, layout]
        self._sha = {name: hashlib.sha256() for name in ("numbers", "masks", *map(_key, store.dtypes))}
        self._head = hashlib.sha256(canonical_json(head))

    def watch(self, blocks: Iterator[Rows]) -> Iterator[Rows]:
        """Pass blocks on, and add them."""
        for rows in blocks:
            arrays = {"numbers": rows.numbers, "masks": rows.masks}
            for name, array in (arrays | {_key(k): v for k, v in rows.outputs.items()}).items():
                self._sha[name].update(np.ascontiguousarray(array).view(np.uint8).data)
            yield rows

    def hexdigest(self) -> str:
        """Whatever the size of the blocks was."""
        whole = self._head.copy()
        for name, sha in self._sha.items():
            whole.update(name.encode() + sha.digest())
        return whole.hexdigest()


def _key(output: str) -> str:
    return f"output.{output}"


def _copy(store: OriginalStore, study: Study, digest: str) -> None:
    found = _Digest(store)
    items = study.items()
    blocks = (store.read(item.start, item.stop) for item in items)
    for item, rows in zip(items, found.watch(blocks), strict=True):
        study.store.write(item, _shard(item, rows, digest))
    if found.hexdigest() != digest:
        raise StoreError(
            f"{store.folder} has changed while it was read",
            expected="rows that stay as they are once they are finished",
            got="other contents when they were read again",
            todo="import when nothing writes to these rows",
        )


def _shard(item: Item, rows: Rows, digest: str) -> Shard:
    record = {"imported": digest, "finished": len(rows.numbers), "of": len(item)}
    return Shard(rows.numbers, rows.masks, rows.outputs, record)


def _require_some(store: OriginalStore) -> None:
    if not store.completed.any():
        raise StoreError(
            f"no row of {store.folder} is finished",
            expected="at least one True in _completed.npy",
            got=f"{len(store)} rows, all False",
            todo="run the original code first",
        )


def _rows_per_shard(store: OriginalStore, asked: int | None) -> int:
    if asked is not None:
        return whole_number(asked, "rows_per_shard")
    return max(1, min(len(store), SHARD_BYTES // store.bytes_per_row))


def _columns(
    store: OriginalStore, names: Names | Mapping[str, Names] | None, source: dict[str, str]
) -> dict[str, Axis]:
    by_output = names if isinstance(names, Mapping) else dict.fromkeys(store.num_columns, names)
    unknown = sorted(set(by_output) - set(store.num_columns))
    if unknown:
        raise AxisError("names for an unknown output", expected=sorted(store.num_columns), got=unknown)
    return {
        name: axis_from(by_output.get(name), "columns", count, source)
        for name, count in store.num_columns.items()
    }


def _spec(store: OriginalStore, experiment: ImportedRows) -> StudySpec:
    kinds = {name: "float16" if dtype == np.float16 else "float32" for name, dtype in store.dtypes.items()}
    value = {
        "format": FORMAT,
        "experiment": experiment.to_spec(),
        "estimator": {"name": "rows", "num_rows": len(store)},
        "design": ImportedMasks(num_rows=len(store)).model_dump(mode="json"),
        "outputs": {name: {"dtype": kind} for name, kind in kinds.items()},
    }
    return StudySpec.from_json(value, "the spec of an imported study")


def _facts(store: OriginalStore, survey: _Survey, size: int) -> dict[str, Any]:
    finished = int(np.count_nonzero(store.completed))
    return {
        "rows_per_shard": size,
        "precision": "unknown",
        "precision_check": None,
        "seconds_per_row": 0.0,
        "weights": None,
        "absent_rows": len(store) - finished,
        "imported": {
            "layout": "original",
            "source": str(store.folder),
            "store": survey.digest,
            "finished_rows": finished,
            "kept_fraction": survey.kept,
            "dtypes": {name: str(dtype) for name, dtype in store.dtypes.items()},
            "untouched": survey.origin,
        },
    }
