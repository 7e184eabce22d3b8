"""The original's attributions: `.pt` files of {"weight", "bias", "lam"}.

`weight` is [components, columns] (the other way round than here), `bias` and `lam` are [columns];
those published are float16. The file is written by run_regression.py of MadryLab/modelcomponents,
whose solver, fast_l1, works on masks scaled to mean 0 and deviation 1 and does not scale its weights
back: they are output units per *standard deviation* of a mask. `standardised_by` undoes that. Files by
`save_weights` say that theirs are per component kept, under one more key, "units".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from coar.attributions import Attributions
from coar.errors import AxisError, CoarWarning, OutputError, SettingError, StoreError
from coar.files import digest_array, write_once
from coar.interop.names import Names, axis_from
from coar.interop.torch_file import load_tensors
from coar.regression.statistics import MaskCounts

WEIGHT, BIAS, LAM = "weight", "bias", "lam"
UNITS, PER_KEPT = "units", "per component kept"  # what save_weights adds, so that its files say what they are
UNSAID = "as in the file, which does not say its units"
Scaling = MaskCounts | float | Literal["none"] | None


def load_weights(
    path: str | Path,
    *,
    components: Names | None = None,
    columns: Names | None = None,
    output: str | None = None,
    standardised_by: Scaling = None,
    nan: Literal["refuse", "zero", "drop"] = "refuse",
) -> Attributions:
    """Read attributions; no code in the file is run.

    Args:
        path: the file.
        components: names (an axis, a list, or a text file with one per line); default 0, 1, ... Only with
            the axes of an experiment or study can attributions be evaluated there.
        columns: the same.
        output: what the columns are outputs of; default what their axis says, else "output".
        standardised_by: None takes weights as they are, which is right for files by `save_weights`; other
            files do not say their units, and None warns. Files by fast_l1 hold weights of standardised
            masks: pass the `MaskCounts` of the rows that they were fitted to, or, where those are not at
            hand, the ablation fraction of independent masks. "none": they are per component kept already.
        nan: what to do with weights or biases that are NaN or infinite: "refuse"; "zero" sets them to 0;
            "drop" leaves their columns out. Attributions cannot hold them.

    Raises:
        StoreError: not such a file, or it holds pickled code.
        OutputError: NaN; how many and where.
        SettingError: `standardised_by` is none of the above, or contradicts the file.
    """
    _require_scaling(standardised_by)
    tensors, units = _read(Path(path))
    weights = np.ascontiguousarray(tensors[WEIGHT].T)
    source = {"weights": digest_array(weights)}
    component_axis = axis_from(components, "components", weights.shape[1], source)
    column_axis = axis_from(columns, "columns", len(weights), source)
    keep = _mend(weights, tensors[BIAS], nan, path)
    _require_units(path, units, standardised_by)
    intercept = tensors[BIAS].astype(np.float64)
    if not (standardised_by is None or isinstance(standardised_by, str)):
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
        output or column_axis.source.get("output", "output"),
        details=details,
        provenance=_provenance(path, _said(units, standardised_by), nan),
    )


def save_weights(
    attributions: Attributions, path: str | Path, dtype: Literal["float32", "float16"] = "float32"
) -> Path:
    """Write attributions as the original does, in output units per component kept.

    One key more, "units", says that they are; readers of the original's files do not look at it. It is
    left out where the attributions were themselves read from a file whose units nobody knew. The bias
    is float64, so that reading the file gives the same numbers; `lam` is left out where the fit had no
    penalty.

    Args:
        attributions: any.
        path: a .pt file; an equal one may be there.
        dtype: of the weights; float16, as published files are, rounds them.

    Raises:
        OutputError: a weight is too large for float16.
        SettingError: a name that does not end in .pt or .pth.
    """
    if Path(path).suffix not in (".pt", ".pth"):
        raise SettingError(
            "attributions of the original are torch files",
            expected="a name that ends in .pt",
            got=str(path),
            todo="choose another name; attributions.save writes this package's own files",
        )
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
    tensors: dict[str, Any] = {WEIGHT: torch.from_numpy(np.ascontiguousarray(weights.T.astype(dtype)))}
    tensors[BIAS] = torch.from_numpy(attributions.intercept.copy())
    if "penalty" in (next(attributions.blocks()).details or {}):
        tensors[LAM] = torch.from_numpy(attributions.detail("penalty").copy())

    if attributions.provenance.get("scaling") != UNSAID:
        tensors[UNITS] = PER_KEPT

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a path, torch would put its name into the file
            torch.save(tensors, file)

    write_once(Path(path), write)
    return Path(path)


def _read(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """Weight, bias and, where there is one, lam; checked but for NaN. And the file's word on units."""
    value = load_tensors(path)
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
    for key in [key for key in found if key != WEIGHT]:
        if found[key].shape != (width,):
            raise StoreError(
                f"{path}: {key} has the wrong shape",
                expected=f"({width},): one per column of {WEIGHT} {found[WEIGHT].shape}",
                got=found[key].shape,
                todo=_transposed(found[key].shape, found[WEIGHT].shape),
            )
    return found, value.get(UNITS)


def _transposed(shape: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    if shape != weight[:1]:
        return None
    return f"is {WEIGHT} transposed? It is [components, columns] here: write it again as {WEIGHT}.T"


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
        fraction = float(by)
        scaled = weights.astype(np.float64) / math.sqrt(fraction * (1 - fraction))
        mean = np.full(weights.shape[1], 1 - fraction)
    return scaled.astype(np.float32), bias - scaled @ mean


def _require_scaling(by: Scaling) -> None:
    if by is None or by == "none" or isinstance(by, MaskCounts):
        return
    if isinstance(by, str | bool) or not isinstance(by, int | float) or not 0 < by < 1:
        raise SettingError(
            "standardised_by",
            expected='MaskCounts, or an ablation fraction above 0 and below 1, or "none"',
            got=repr(by),
        )
    if by > 0.5:
        warnings.warn(
            f"standardised_by={by} says that {by:.0%} of the components were ablated in each row; the "
            f"ablation fraction is meant, 1 - p where p is the probability of keeping one",
            CoarWarning,
            stacklevel=3,
        )


def _require_units(path: str | Path, units: Any, by: Scaling) -> None:
    if units is not None and not (isinstance(units, str) and units == PER_KEPT):
        raise StoreError(f"{path}: {UNITS} are not known", expected=PER_KEPT, got=f"{units!r:.80}")
    if units and not (by is None or by == "none"):
        raise SettingError(
            f"{path} holds weights per component kept, says the file itself",
            expected="no standardised_by",
            got=repr(by),
            todo="leave standardised_by out: the weights would be scaled twice",
        )
    if not units and by is None:
        warnings.warn(
            f"{path} does not say its units; files of the original solver need "
            "standardised_by=ABLATION_FRACTION (without it weights are several times too small); pass "
            "standardised_by='none' if weights are per component kept already",
            CoarWarning,
            stacklevel=3,
        )


def _said(units: Any, by: Scaling) -> str:
    """In words, for the provenance."""
    if by is None or isinstance(by, str):
        return f"as in the file: {PER_KEPT}" if units or by else UNSAID
    return "divided by the masks' deviations" if isinstance(by, MaskCounts) else f"for fraction {by}"


def _provenance(path: str | Path, scaling: str, nan: str) -> dict[str, Any]:
    return {"method": "imported", "source": str(path), "scaling": scaling, "nan": nan}
