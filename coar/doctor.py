"""doctor: is this installation fit for use? Checks the machine, the optional parts and the promises."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from coar.errors import CoarError, StoreError, install_hint
from coar.files import write_json_once
from coar.gradients import GateGradientStudy, gate_gradients
from coar.randomness import words
from coar.regression import coordinate_descent
from coar.regression.fast_l1_backend import REPOSITORY
from coar.studies import open_study
from coar.testing import check_experiment, linear_experiment, residual_experiment

GOLDEN_WORDS = (0xE35A29832104D74F, 0xB7C1535B13AB2B25)
EXTRAS = {  # those that something in the package uses
    "vision": ("torchvision", "timm"),
    "language": ("transformers", "datasets"),
    "lasso": ("numba",),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "problem"]
    what: str

    def __str__(self) -> str:
        return f"{self.state:<8} {self.what}"


def examine(directory: str | Path | None = None) -> list[Finding]:
    """Run all checks.

    Args:
        directory: where studies will be kept; its file system is tried. Default: a temporary folder. Of a
            study of gate gradients it says where gates act.
    """
    findings = [_versions(), _devices()]
    findings += [_tried("random masks are those of every other machine", _check_randomness)]
    findings += [_tried("files are written whole, the first writer wins", lambda: _check_files(directory))]
    findings += [_tried("ablation of a linear model gives its known attributions", _check_ablation)]
    findings += [_gates(directory)]
    findings += [_fast_l1()]
    return findings + [_extra(name, modules) for name, modules in EXTRAS.items()]


def _versions() -> Finding:
    found = [f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "pydantic", "safetensors")]
    return Finding("ok", f"python {platform.python_version()}, {', '.join(found)}")


def _devices() -> Finding:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = ", ".join(gpus) if gpus else "no GPU: everything runs on the CPU"
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("ok", f"{where}; {os.cpu_count()} cores ({capability}), {torch.get_num_threads()} threads")


def _tried(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except (CoarError, AssertionError, OSError) as error:
        return Finding("problem", f"not so: {what}\n{error}")
    return Finding("ok", what)


def _check_randomness() -> None:
    found = tuple(int(word) for word in words(0, "fit", 0, 2))
    if found != GOLDEN_WORDS:
        raise StoreError("Philox gives other words here", expected=GOLDEN_WORDS, got=found)


def _check_files(directory: str | Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=directory, prefix="coar-doctor-") as folder:
        path = Path(folder) / "probe.json"
        write_json_once(path, {"first": True})
        try:
            write_json_once(path, {"first": False})
        except StoreError:
            return
        raise StoreError("a second writer replaced the first one's file", got=str(path))


def _check_ablation() -> None:
    experiment, weights = linear_experiment()
    check_experiment(experiment)
    outputs = experiment.prepare(torch.device("cpu"))(np.eye(len(experiment.components), dtype=bool))["score"]
    if not np.allclose(outputs.T, weights, atol=1e-5):
        raise CoarError("single components of a linear model give other outputs than its weights")


def _gates(directory: str | Path | None) -> Finding:
    """Where gates of gradients act: those of a study, if the folder is one; else of a small ResNet block."""
    if directory is not None and (Path(directory) / "spec.json").exists():
        try:
            study = open_study(directory)
        except CoarError as error:
            return Finding("problem", f"{directory} is a study that cannot be opened\n{error}")
        if isinstance(study, GateGradientStudy):
            return _gates_of(study)
    try:
        found = gate_gradients(residual_experiment(), 0.1, passes=1, progress=False)
    except CoarError as error:
        return Finding("problem", f"not so: gates have derivatives\n{error}")
    places = sorted(set(found.provenance["placements"].values()))
    state: Literal["ok", "problem"] = "ok" if places == ["after relu"] else "problem"
    return Finding(state, f"gates of convolution + BatchNorm + residual + ReLU act {', '.join(places)}")


def _gates_of(study: GateGradientStudy) -> Finding:
    placed = study.provenance["placed"]
    lines = [f"{name}: {place}" for name, place in placed["placements"].items()]
    lines += [f"{name} fell back to its layer: {why}" for name, why in placed["fallen"].items()]
    return Finding("note" if placed["fallen"] else "ok", "gates of this study act\n  " + "\n  ".join(lines))


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    found = {module: _version(module) for module in modules}
    missing = [module for module, version in found.items() if version is None]
    if missing:
        return Finding(
            "note", f"optional part {name}: {', '.join(missing)} not installed; {install_hint(name)}"
        )
    broken = coordinate_descent.why_not() if name == "lasso" else ""
    if broken:
        return Finding(
            "note", f"optional part lasso: {broken}; the LASSO works, slower; {install_hint(name)}"
        )
    return Finding("ok", f"optional part {name}: " + ", ".join(f"{m} {v}" for m, v in found.items()))


def _fast_l1() -> Finding:
    """The original solver: more than packages, and no extra of ours installs it."""
    missing = [] if torch.cuda.is_available() else ["no CUDA device"]
    found = {name: find_spec(name) for name in ("cupy", "fast_l1")}  # cupy has a name for each CUDA
    missing += [f"{name} not installed" for name, spec in found.items() if not (spec and spec.origin)]
    if not missing:
        return Finding("ok", "optional part fast_l1: CUDA, cupy, fast_l1")
    how = f'pip install cupy-cuda12x "git+{REPOSITORY}"'
    return Finding("note", f"optional part fast_l1: {', '.join(missing)}; {how}, on a machine with CUDA")


def _version(module: str) -> str | None:
    try:  # not find_spec: any folder of that name would be found
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None
