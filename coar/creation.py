"""Creation of studies: all that is written before any worker starts, and how it is read back."""

from __future__ import annotations

import datetime
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_model

from coar.designs import Design, LeaveOneOut
from coar.errors import DISTRIBUTION, SettingError, StoreError, StudyError
from coar.experiments.base import Experiment, Runner, full_fingerprint
from coar.files import (
    digest_array,
    digest_json,
    partial_path,
    read_json,
    require_format,
    require_keys,
    sha256,
    write_arrays_once,
    write_json_once,
)
from coar.plan import Plan, make_plan
from coar.precision import choose_precision
from coar.settings import whole_number
from coar.spec import ExecutionSpec, RowsEstimator, StudySpec, differences
from coar.task import resolve_device
from coar.work import require_storable

FORMAT = 1
FLOAT32_BYTES = 8 * 10**9  # above this, outputs are stored as float16 differences by default
WEIGHTS = "weights.safetensors"
UNTOUCHED = "untouched.safetensors"
_PROVENANCE = {
    "format": int,
    "fingerprint": dict,
    "components": dict,
    "columns": dict,
    "precision": str,
    "untouched": dict,
    "digest": str,
}
MAX_SHARDS = 1_000_000  # per creation or extension; far beyond what a folder of files serves well


def make_spec(
    experiment: Experiment,
    design: Design,
    num_rows: int | None,
    dtypes: Mapping[str, str] | None,
    execution: ExecutionSpec | None,
) -> StudySpec:
    """Spec of a study of this experiment; see `Study.create` for the arguments."""
    if num_rows is None and isinstance(design, LeaveOneOut):
        num_rows = len(experiment.components)
    rows = RowsEstimator(num_rows=whole_number(num_rows, "num_rows"))
    design.check(len(experiment.components), rows.num_rows)
    value = {
        "format": FORMAT,
        "experiment": experiment.to_spec(),
        "estimator": rows.model_dump(mode="json"),
        "design": design.model_dump(mode="json"),
        "outputs": {
            name: {"dtype": dtype} for name, dtype in _dtypes(experiment, rows.num_rows, dtypes).items()
        },
        "execution": (execution or ExecutionSpec()).model_dump(mode="json"),
    }
    return StudySpec.from_json(value, "the spec of this study")


def write_study(directory: Path, spec: StudySpec, experiment: Experiment, rows_per_shard: int | None) -> None:
    """Make the study's folder under another name and move it into place whole."""
    make_whole(directory, lambda draft: _write_draft(draft, spec, experiment, rows_per_shard))


def make_whole(directory: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is whole or absent: `fill` gets one of another name, which is then moved into place.

    Raises:
        StudyError: there is something in the folder already.
        StoreError: it cannot be written.
    """
    require_free(directory)
    draft = partial_path(directory)
    try:
        draft.mkdir(parents=True)
        fill(draft)
        draft.replace(directory)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        if not (directory / "spec.json").exists():  # else somebody else created it meanwhile
            raise StoreError(
                f"cannot create {directory}: {error.strerror or error}",
                todo="choose a folder that can be written",
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def require_free(directory: Path) -> None:
    """Raise unless a folder is new or empty."""
    if directory.exists() and not directory.is_dir():
        raise StoreError(
            f"{directory} is a file", expected="a folder, or a name that is free", todo="choose another"
        )
    if directory.exists() and any(directory.iterdir()):
        raise StudyError(
            f"{directory} is not empty",
            expected="a new or empty folder",
            got=", ".join(sorted(path.name for path in directory.iterdir())[:5]),
            todo="choose another folder",
        )


def plan(
    experiment: Experiment,
    design: Design,
    num_rows: int,
    dtypes: Mapping[str, str] | None = None,
    execution: ExecutionSpec | None = None,
) -> Plan:
    """What a study would cost, from a few measured rows; writes nothing."""
    runner, _, _ = prepare_runner(experiment, design, execution or ExecutionSpec())
    chosen = _dtypes(experiment, num_rows, dtypes)
    return make_plan(runner, design, num_rows, len(experiment.components), chosen)[0]


def prepare_runner(
    experiment: Experiment, design: Design, execution: ExecutionSpec
) -> tuple[Runner, str, dict[str, Any] | None]:
    """The experiment made ready as a spec's `execution` says; its precision, and the check of it."""
    device = experiment.device if execution.device == "auto" else resolve_device(execution.device)
    batch_size = None if execution.batch_size == "auto" else execution.batch_size
    precision, check = choose_precision(experiment, design, device, batch_size, execution.precision)
    options = {"compiled": True} if execution.compiled else {}
    return experiment.prepare(device, batch_size, precision, **options), precision, check


def _dtypes(experiment: Experiment, num_rows: int, asked: Mapping[str, str] | None) -> dict[str, str]:
    columns = {name: len(axis) for name, axis in experiment.columns.items()}
    total = num_rows * sum(columns.values()) * 4
    default = "float32" if total <= FLOAT32_BYTES else "float16"
    unknown = sorted(set(asked or {}) - set(columns))
    if unknown:
        raise SettingError("dtype of an unknown output", expected=sorted(columns), got=unknown)
    return {name: (asked or {}).get(name, default) for name in columns}


def _write_draft(draft: Path, spec: StudySpec, experiment: Experiment, rows_per_shard: int | None) -> None:
    runner, precision, check = prepare_runner(experiment, spec.design, spec.execution)
    dtypes = {name: output.dtype for name, output in spec.outputs.items()}
    num_rows = rows_asked(spec)
    found, untouched = make_plan(runner, spec.design, num_rows, len(experiment.components), dtypes)
    for name, values in untouched.items():
        require_storable(values, -1, name, experiment.columns[name].names)
    save_weights(experiment, draft / WEIGHTS)
    size = found.rows_per_shard
    if rows_per_shard is not None:
        size = whole_number(rows_per_shard, "rows_per_shard")
    require_few_shards(num_rows, size)
    facts = {
        "precision": precision,
        "precision_check": check,
        "record": runner.record(),
        "rows_per_shard": size,
        "seconds_per_row": found.seconds_per_row,
        "weights": weights_digest(draft / WEIGHTS),
    }
    write_head(draft, spec, experiment, untouched, facts)


def write_head(
    draft: Path,
    spec: StudySpec,
    experiment: Experiment,
    untouched: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> None:
    """Write all of a study but its rows.

    Args:
        draft: the folder.
        spec: what the study is.
        experiment: whose axes and fingerprint are written down.
        untouched: per output, [columns].
        facts: what else provenance records; `precision` at least, and `rows_per_shard` of rows.
    """
    untouched = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in untouched.items()}
    write_arrays_once(draft / UNTOUCHED, untouched)
    record = {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "fingerprint": full_fingerprint(experiment),
        **facts,
        "untouched": {name: digest_array(values) for name, values in untouched.items()},
        "components": experiment.components.to_json(),
        "columns": {name: experiment.columns[name].to_json() for name in untouched},
    }
    write_json_once(draft / "provenance.json", record | {"digest": digest_json(record)})
    write_json_once(draft / "spec.json", spec.to_json())


def weights_digest(path: Path) -> str | None:
    """Digest of the weights that a study keeps; None if it keeps none."""
    return sha256(path.read_bytes()) if path.exists() else None


def save_weights(experiment: Experiment, path: Path) -> None:
    """Write a model's weights, where its task asks for that."""
    task = getattr(experiment, "task", None)
    if task is not None and task.save_weights:
        save_model(task.model, str(path))


def rows_asked(spec: StudySpec) -> int:
    """Rows that a spec asks for."""
    assert isinstance(spec.estimator, RowsEstimator)
    return spec.estimator.num_rows


def require_few_shards(num_rows: int, rows_per_shard: int) -> None:
    """Raise `SettingError` if that many rows would make more files than a folder can serve."""
    if num_rows > MAX_SHARDS * rows_per_shard:
        raise SettingError(
            "so many rows make too many shards",
            expected=f"at most {MAX_SHARDS * rows_per_shard:,} rows in shards of {rows_per_shard:,}",
            got=f"{num_rows:,}",
            todo="ask for fewer rows, or create the study with larger rows_per_shard",
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (DISTRIBUTION, "torch", "numpy", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def require_same_spec(
    directory: Path, asked: StudySpec, found: StudySpec, num_rows: int | None, precision: str
) -> None:
    """Raise `StudyError` naming what differs between a spec and the study that is there.

    Args:
        directory: the study's folder.
        asked: the spec wanted.
        found: the study's spec.
        num_rows: the study's rows, extensions included; None for a study without rows.
        precision: the study's precision, chosen when it was created.
    """
    unlike = differences(asked.identity(), found.identity())
    if asked.execution.precision not in ("auto", precision):
        unlike.append(f"execution.precision: {asked.execution.precision}, not {precision}")
    grow = ""
    if num_rows is not None and asked.estimator.name == "rows" and rows_asked(asked) != num_rows:
        unlike.append(f"estimator.num_rows: {rows_asked(asked)}, not {num_rows}")
        grow = ", or add rows with study.extend (`coar extend`)"
    if unlike:
        raise StudyError(
            f"{directory} holds a study with another spec",
            expected="the same spec, except for execution",
            got="; ".join(unlike),
            todo=f"choose another folder{grow}",
        )


def read_provenance(directory: Path) -> dict[str, Any]:
    """What the driver wrote down when the study was created: versions, fingerprints, axes, choices."""
    path = directory / "provenance.json"
    found = require_keys(read_json(path, "provenance record"), {"format": int}, path)
    require_format(found["format"], FORMAT, path)
    require_keys(found, _PROVENANCE, path)
    if found.pop("digest") != digest_json(found):
        raise StoreError(
            f"{path} is damaged: its digest differs",
            todo="restore it from a copy; the study cannot be read without it",
        )
    return found


def kept_weights(directory: Path, provenance: Mapping[str, Any]) -> str | None:
    """Path of the weights that the study keeps, checked; None if it keeps none."""
    path, expected = directory / WEIGHTS, provenance.get("weights")
    if expected is None:
        return None
    found = sha256(path.read_bytes()) if path.is_file() else "nothing"
    if found != expected:
        raise StoreError(
            f"{path} is missing or damaged",
            expected=f"digest {expected[:12]}",
            got=found[:12],
            todo="restore it from a copy, or open the study with experiment=",
        )
    return str(path)


def read_untouched(directory: Path, provenance: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs with every component kept, {output: float32 [columns]}, checked against their digests."""
    path = directory / UNTOUCHED
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path} is missing or damaged", got=str(error)[:200]) from None
    for name, digest in provenance["untouched"].items():
        if name not in arrays or digest_array(arrays[name]) != digest:
            raise StoreError(f"{path} is damaged: {name} is not what was written")
    return arrays
