"""The original's attributions: `.pt` files of {"weight", "bias", "lam"}.

`weight` is [components, columns] (the other way round than here), `bias` and `lam` are [columns];
those published are float16. The file is written by run_regression.py of MadryLab/modelcomponents,
whose solver, fast_l1, works on masks scaled to mean 0 and deviation 1 and does not scale its weights
back: they are output units per *standard deviation* of a mask. `standardised_by` undoes that.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from coar.attributions import Attributions
from coar.errors import AxisError, OutputError, SettingError, StoreError
from coar.files import digest_array, write_once
from coar.interop.names import Names, axis_from
from coar.regression.statistics import MaskCounts

WEIGHT, BIAS, LAM = "weight", "bias", "lam"


def load_weights(
    path: str | Path,
    *,
    components: Names | None = None,
    columns: Names | None = None,
    output: str = "output",
    standardised_by: MaskCounts | float | None = None,
    nan: Literal["refuse", "zero", "drop"] = "refuse",
) -> Attributions:
    """Read attributions; no code in the file is run.

    Args:
        path: the file.
        components: names (an axis, a list, or a text file with one per line); default 0, 1, ...
        columns: the same.
        output: what the columns are outputs of.
        standardised_by: None takes weights as they are, which is right for files by `save_weights`. Files
            by fast_l1 hold weights of standardised masks: pass the `MaskCounts` of the rows that they were
            fitted to, or, where those are not at hand, the ablation fraction of independent masks.
        nan: what to do with weights or biases that are NaN or infinite: "refuse"; "zero" sets them to 0;
            "drop" leaves their columns out. Attributions cannot hold them.

    Raises:
        StoreError: not such a file, or it holds pickled code.
        OutputError: NaN; how many and where.
    """
    tensors = _read(Path(path))
    weights = np.ascontiguousarray(tensors[WEIGHT].T)
    source = {"weights": digest_array(weights)}
    component_axis = axis_from(components, "components", weights.shape[1], source)
    column_axis = axis_from(columns, "columns", len(weights), source)
    keep = _mend(weights, tensors[BIAS], nan, path)
    intercept = tensors[BIAS].astype(np.float64)
    if standardised_by is not None:
        weights, intercept = _in_mask_units(weights, intercept, standardised_by)
    if not keep.all():
        weights, intercept = weights[keep], intercept[keep]
        column_axis = column_axis.subset(np.flatnonzero(keep))
    details = {"penalty": tensors[LAM][keep].astype(np.float64)} if LAM in tensors else {}
    return Attributions(
        weights,
        intercept,
        component_axis,
        column_axis,
        output,
        details=details,
        provenance=_provenance(path, standardised_by, nan),
    )


def save_weights(
    attributions: Attributions, path: str | Path, dtype: Literal["float32", "float16"] = "float32"
) -> Path:
    """Write attributions as the original does, in output units per component kept.

    The bias is float64, so that reading the file gives the same numbers; `lam` is left out where the fit
    had no penalty.

    Args:
        attributions: any.
        path: the file; an equal one may be there.
        dtype: of the weights; float16, as published files are, rounds them.

    Raises:
        OutputError: a weight is too large for float16.
    """
    weights = attributions.weights
    if dtype not in ("float32", "float16"):
        raise SettingError("a dtype of weights", expected="float32 or float16", got=repr(dtype))
    if np.abs(weights).max(initial=0) > np.finfo(dtype).max:
        raise OutputError(
            f"weights are too large for {dtype}",
            expected=f"at most {np.finfo(dtype).max:g} in size",
            got=float(np.abs(weights).max()),
            todo='use dtype="float32"',
        )
    tensors = {WEIGHT: torch.from_numpy(np.ascontiguousarray(weights.T.astype(dtype)))}
    tensors[BIAS] = torch.from_numpy(attributions.intercept.copy())
    if "penalty" in (next(attributions.blocks()).details or {}):
        tensors[LAM] = torch.from_numpy(attributions.detail("penalty").copy())

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a path, torch would put its name into the file
            torch.save(tensors, file)

    write_once(Path(path), write)
    return Path(path)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Weight, bias and, where there is one, lam; checked but for NaN."""
    value = _load(path)
    if not isinstance(value, Mapping) or WEIGHT not in value or BIAS not in value:
        got = ", ".join(map(str, list(value)[:8])) if isinstance(value, Mapping) else type(value).__name__
        raise StoreError(
            f"{path} holds no attributions", expected=f"a dictionary with {WEIGHT} and {BIAS}", got=got
        )
    found = {key: _array(value[key], key, path) for key in (WEIGHT, BIAS, LAM) if key in value}
    if found[WEIGHT].ndim != 2 or 0 in found[WEIGHT].shape:
        raise StoreError(
            f"{path}: {WEIGHT} has the wrong shape", expected="[components, columns]", got=found[WEIGHT].shape
        )
    width = found[WEIGHT].shape[1]
    for key in set(found) - {WEIGHT}:
        if found[key].shape != (width,):
            raise StoreError(
                f"{path}: {key} has the wrong shape",
                expected=f"({width},): one per column of {WEIGHT} {found[WEIGHT].shape}",
                got=found[key].shape,
            )
    return found


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing", expected="a .pt file", todo="check the path") from None
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path} holds more than tensors (to read it would run code of the file), or is damaged",
            expected="a dictionary of tensors",
            got=str(error).strip().splitlines()[0][:200] if str(error).strip() else "pickled objects",
            todo="if you trust the file, convert it once, where its classes can be imported: "
            "found = torch.load(OLD, weights_only=False); "
            'torch.save({key: found[key] for key in ("weight", "bias", "lam")}, NEW)',
        ) from None
    except Exception as error:  # a damaged file leads the unpickler to errors of many kinds
        raise StoreError(
            f"{path} is not a readable .pt file",
            expected="a file that torch.save wrote",
            got=f"{type(error).__name__}: {error}"[:200],
        ) from None


def _array(value: Any, key: str, path: Path) -> np.ndarray:
    """float32, or float64 where the tensor is."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    if not plain or not value.is_floating_point() or value.is_meta:
        raise StoreError(
            f"{path}: {key} is no array of numbers",
            expected="a dense floating-point tensor",
            got=f"{value.dtype} {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__,
        )
    tensor = value.detach()
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy()


def _mend(weights: np.ndarray, bias: np.ndarray, nan: str, path: str | Path) -> np.ndarray:
    """Columns to keep, bool; what is not finite in weights and bias becomes 0, in place."""
    if nan not in ("refuse", "zero", "drop"):
        raise SettingError("what to do with NaN", expected="refuse, zero or drop", got=repr(nan))
    bad, bad_bias = ~np.isfinite(weights), ~np.isfinite(bias)
    columns = bad.any(axis=1) | bad_bias
    if nan == "refuse" and columns.any():
        counts = f"{np.count_nonzero(bad)} weights and {np.count_nonzero(bad_bias)} biases"
        where = f"{np.count_nonzero(columns)} of {len(columns)} columns concerned"
        raise OutputError(
            f"{path}: {counts} are NaN or infinite",
            expected="finite numbers",
            got=f"{where}, first {_first(bad, columns)}",
            todo='nan="zero" sets them to 0, nan="drop" leaves their columns out',
        )
    weights[bad] = 0
    bias[bad_bias] = 0
    if nan == "drop" and columns.all():
        raise OutputError(f"{path}: every column holds NaN", expected="a column that does not", got="none")
    return ~columns if nan == "drop" else np.ones(len(columns), dtype=bool)


def _first(bad: np.ndarray, columns: np.ndarray) -> str:
    column = int(np.argmax(columns))
    where = f", component {int(np.argmax(bad[column]))}" if bad[column].any() else ", its bias"
    return f"column {column}{where}"


def _in_mask_units(
    weights: np.ndarray, bias: np.ndarray, by: MaskCounts | float
) -> tuple[np.ndarray, np.ndarray]:
    """Undo x -> (x - mean) / deviation: the weights of a component that never changed are 0."""
    if isinstance(by, MaskCounts):
        if len(by.counts) != weights.shape[1]:
            raise AxisError(
                "counts of other masks", expected=f"{weights.shape[1]} components", got=len(by.counts)
            )
        scaled, mean = by.per_mask_unit(weights.astype(np.float64)), by.mean
    else:
        fraction = _fraction(by)
        scaled = weights.astype(np.float64) / math.sqrt(fraction * (1 - fraction))
        mean = np.full(weights.shape[1], 1 - fraction)
    return scaled.astype(np.float32), bias - scaled @ mean


def _fraction(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise SettingError(
            "standardised_by", expected="MaskCounts, or an ablation fraction above 0 and below 1", got=value
        )
    return float(value)


def _provenance(path: str | Path, by: MaskCounts | float | None, nan: str) -> dict[str, Any]:
    scaling = "as in the file"
    if by is not None:
        scaling = "divided by the masks' deviations" if isinstance(by, MaskCounts) else f"for fraction {by}"
    return {"method": "imported", "source": str(path), "scaling": scaling, "nan": nan}
