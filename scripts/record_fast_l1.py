"""Record what the original fast_l1 answers to small problems, for the tests, on a machine without CUDA.

    git clone https://github.com/MadryLab/fast_l1
    python scripts/record_fast_l1.py fast_l1 tests/data

The solver is the original's; cupy is replaced by torch, and moves to a GPU by nothing. Each recording
holds the rows, the settings, and for each call of the solver what it was given and what it returned.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from coar.errors import FitError
from coar.regression.fast_l1 import FastL1, FastL1Fitter
from coar.regression.fast_l1_backend import OriginalBackend
from coar.regression.problem import Problem

ROWS, COMPONENTS, COLUMNS, KEPT = 600, 40, 24, 0.8
RUNS = {
    "least_squares": FastL1(num_penalties=0, batch_size=100),
    "path": FastL1(num_penalties=20, smallest=1e-2, batch_size=100),
    "as_published": FastL1(
        num_penalties=20, smallest=1e-2, batch_size=100, together=False, uncertified="keep"
    ),
}


class ElementwiseKernel:
    """What the original uses of cupy: one assignment, element by element."""

    def __init__(self, inputs: str, outputs: str, operation: str, name: str = "") -> None:
        del outputs, name
        self._names = [argument.split()[-1] for argument in inputs.split(",")]
        self._expression = re.sub(r"^\s*out\s*=", "", operation)

    def __call__(self, *arguments: Any) -> None:
        """Write into the last argument."""
        *inputs, out = arguments
        out.copy_(eval(self._expression, {}, dict(zip(self._names, inputs, strict=True))))


class Recorder(OriginalBackend):
    """The original, each call kept."""

    def train(self, weight: Any, bias: Any, rows: Any, held_out: Any, **settings: Any) -> torch.Tensor:
        """Run and keep."""
        given = {
            "weight_before": weight.clone(),
            "bias_before": bias.clone(),
            "start": settings["start_lams"].clone(),
        }
        plain = {key: value for key, value in settings.items() if not isinstance(value, torch.Tensor)}
        plain |= {"stop": rows.stop, "size": rows.size, "held_out": held_out is not None}
        found = super().train(weight, bias, rows, held_out, **settings)
        CALLS.append(
            given | {"weight": weight.clone(), "bias": bias.clone(), "chosen": found.clone(), "plain": plain}
        )
        return found


CALLS: list[dict[str, Any]] = []


def make_rows() -> tuple[np.ndarray, np.ndarray]:
    """Masks and outputs: few large weights, many small ones, noise; a mean far from 0; one dead component."""
    random = np.random.default_rng(0)
    masks = random.random((ROWS, COMPONENTS)) < KEPT
    masks[:, 7] = True
    weights = random.normal(size=(COMPONENTS, COLUMNS)) * (random.random((COMPONENTS, COLUMNS)) < 0.25)
    weights += 0.05 * random.normal(size=weights.shape)
    outputs = 6 + masks @ weights + random.normal(size=(ROWS, COLUMNS)) * np.linspace(0.3, 2, COLUMNS)
    return masks, outputs.astype(np.float32)


def record(name: str, settings: FastL1, backend: OriginalBackend, folder: Path) -> None:
    """Run one setting and write its recording."""
    CALLS.clear()
    masks, outputs = make_rows()
    fitter = FastL1Fitter(settings, Problem.from_arrays(masks, outputs), backend)
    try:
        violation = fitter.fit(slice(0, outputs.shape[1])).details["kkt"]
        print(f"{name}: {len(CALLS)} calls, largest violation {violation.max():.2g}")
    except FitError as error:
        print(f"{name}: {error}")
    arrays = {
        f"{i}.{key}": v.numpy() for i, call in enumerate(CALLS) for key, v in call.items() if key != "plain"
    }
    plain = {"settings": settings.model_dump(mode="json"), "calls": [call["plain"] for call in CALLS]}
    path = folder / f"fast_l1_{name}.npz"
    rows = {"masks": np.packbits(masks, axis=1, bitorder="little"), "outputs": outputs}
    np.savez_compressed(path, **rows, **arrays, plain=np.array(json.dumps(plain)))
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Record all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of the original's repository")
    parser.add_argument("folder", type=Path, help="where recordings go")
    arguments = parser.parse_args()
    cupy = ModuleType("cupy")
    cupy.ElementwiseKernel = ElementwiseKernel
    sys.modules["cupy"] = cupy
    sys.path.insert(0, str(arguments.checkout))
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    torch.set_num_threads(1)
    from fast_l1 import regressor

    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, settings in RUNS.items():
        record(name, settings, Recorder(regressor, torch.device("cpu")), arguments.folder)


if __name__ == "__main__":
    main()
