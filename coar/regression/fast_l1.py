"""fast_l1: the published GPU solver (SAGA) on the rows of a study, for comparison with ours.

Objective, per column, on standardised masks x (mean 0, deviation 1), as `Lasso`:

    (1 / 2 rows) |y - x w - b|^2 + penalty |w|_1

It needs CUDA, cupy and fast_l1 from its own repository. Its known faults are made harmless
(`coar.regression.fast_l1_backend`), its weights are converted to output units per component kept, and
each column is checked: a solution of this problem at the penalty that it is said to have, or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from coar.attribution_blocks import Block
from coar.errors import FitError
from coar.regression.doubts import say
from coar.regression.fast_l1_backend import Backend, OriginalBackend
from coar.regression.fast_l1_loader import Batches, Rows, Watch
from coar.regression.problem import Problem
from coar.regression.spectrum import explained
from coar.regression.statistics import MaskCounts
from coar.settings import Setting

_BYTES = 12  # per row and column: outputs, their table of gradients, and a copy on the way
_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FastL1(Setting):
    """The original fast_l1 on the same rows; `Ridge(penalties=0.0)` and `Lasso()` solve the same problems.

    Args:
        num_penalties: how many to try, from the largest that leaves any weight down to `smallest` times that,
            and none; the held-out rows choose, per column. 0: least squares, the published configuration.
        smallest: smallest penalty, relative to the largest.
        learning_rate: step; "auto" is the largest that is safe for random masks.
        threshold: largest squared change in an epoch (of a standardised weight times the deviation of its
            mask) of a converged column.
        check_every: after how many epochs it looks who has converged.
        batch_size: rows per step; less where fewer are held out.
        max_epochs: of one run; two runs where penalties are chosen.
        held_out: every how manyth row chooses the penalty.
        together: columns change their penalty together, and all go down the whole path: so start penalties
            cannot get mixed up. False runs it as published; the check finds columns that were.
        tolerance: largest violation of the optimality conditions, relative to the largest penalty.
        uncertified: what to do about columns beyond it: "refuse", or "keep" with a warning.
        seed: of the order of rows.

    No standard errors are claimed. Figures per column: penalty, r2, kkt (largest violation of the optimality
    conditions, relative to the largest penalty).

    >>> FastL1(num_penalties=0, learning_rate=1e-3, threshold=1e-10, check_every=3).smallest
    0.001
    """

    name: Literal["fast_l1"] = "fast_l1"
    num_penalties: Annotated[int, Field(ge=0, le=10_000)] = 50
    smallest: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    learning_rate: _Positive | Literal["auto"] = "auto"
    threshold: _Positive = 1e-10
    check_every: _Count = 2
    batch_size: _Count = 1_000
    max_epochs: _Count = 5_000
    held_out: Annotated[int, Field(ge=2)] = 10
    together: bool = True
    tolerance: _Positive = 1e-2
    uncertified: Literal["refuse", "keep"] = "refuse"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _a_path_has_two_ends(self) -> FastL1:
        if self.num_penalties == 1:
            raise ValueError(
                "num_penalties is 0 (least squares) or at least 2 (from the largest to the smallest)"
            )
        return self

    def prepare(self, problem: Problem) -> FastL1Fitter:
        """Import the original, and read the masks.

        Raises:
            MissingDependencyError: it cannot run here; the text says how to install it.
        """
        return FastL1Fitter(self, problem, OriginalBackend.load(problem.device))


class FastL1Fitter:
    """Runs the original, or a recording of it.

    Attributes:
        notes: for the provenance.
    """

    def __init__(self, settings: FastL1, problem: Problem, backend: Backend) -> None:
        self.settings, self.problem, self.backend = settings, problem, backend
        self._parts: tuple[str, ...] = ("all",)
        if settings.num_penalties:
            problem.hold_out(settings.held_out)
            self._parts = ("train", "held_out")
        self.notes: dict[str, Any] = {
            "algorithm": "SAGA by the original fast_l1",
            "why": "as asked",
            "guards": "gradients are written in turn; weights checked for NaN after each epoch; at most "
            f"{settings.max_epochs} epochs; columns "
            + ("advance together" if settings.together else "advance one by one, as published"),
            "epochs": 0,
        }

    @cached_property
    def _counts(self) -> MaskCounts:
        return self.problem.counts()

    @cached_property
    def _masks(self) -> list[np.ndarray]:
        return [self.problem.packed(part).bits for part in self._parts]

    def fit(self, columns: slice) -> Block:
        """Fit some columns, as many at a time as fit into the memory.

        Raises:
            FitError: it diverged, did not converge, or some columns are not solved.
        """
        size = max(1, self.problem.budget // (_BYTES * max(1, self._counts.rows)))
        starts = range(columns.start, columns.stop, size)
        parts = [self._fit(slice(start, min(start + size, columns.stop))) for start in starts]
        arrays = [part.arrays() for part in parts]
        whole = {key: np.concatenate([part[key] for part in arrays]) for key in arrays[0]}
        return Block.from_arrays(columns.start, whole)

    def _fit(self, columns: slice) -> Block:
        rows, mean = self._rows(columns)
        run = _Run(self.settings, self.backend, rows)
        weight, penalties = run.solve()
        self.notes["epochs"] += run.epochs
        violation, r2 = run.check(weight, penalties)
        self._judge(columns, violation, run)
        standardised = np.zeros((rows.outputs.shape[1], len(rows.varied)))
        standardised[:, rows.varied] = weight.T.double().cpu().numpy()
        weights = self._counts.per_mask_unit(standardised)
        details = {"penalty": penalties.double().cpu().numpy(), "r2": r2, "kkt": violation}
        return Block(columns.start, weights, mean - weights @ self._counts.mean, None, details)

    def _rows(self, columns: slice) -> tuple[Rows, np.ndarray]:
        """Rows with centred outputs, and the means [columns], which the original learns slowly."""
        blocks = [self.problem.blocks(columns, part) for part in self._parts]
        outputs = [np.concatenate([block.outputs for block in part]) for part in blocks]
        whole = np.concatenate(outputs)
        mean = whole.mean(axis=0, dtype=np.float64)
        centred = (whole - mean).astype(np.float32)
        return Rows(np.concatenate(self._masks), ~self._counts.constant, centred, len(outputs[0])), mean

    def _judge(self, columns: slice, violation: np.ndarray, run: _Run) -> None:
        wrong = np.flatnonzero(~(violation <= self.settings.tolerance))
        if not len(wrong):
            return
        worst = wrong[np.argmax(violation[wrong])]
        what = (
            f"fast_l1 did not solve {len(wrong)} of {len(violation)} columns, such as column "
            f"{columns.start + worst}"
        )
        got = f"{violation[worst]:.2g} of the largest penalty, after {run.epochs} epochs"
        if self.settings.uncertified == "keep":
            say(f"{what}: its optimality conditions are violated by {got}")
            return
        limit = f"; it was stopped after max_epochs={self.settings.max_epochs}" if run.stopped else ""
        raise FitError(
            what,
            expected=f"optimality violated by at most {self.settings.tolerance:g} of the largest penalty",
            got=got + limit,
            todo="lower the threshold, allow more epochs, or use coar.Lasso() or coar.Ridge(penalties=0.0)",
        )


class _Run:
    """One call for some columns: path and refit, or least squares."""

    def __init__(self, settings: FastL1, backend: Backend, rows: Rows) -> None:
        self._settings, self._backend, self._rows = settings, backend, rows
        self.epochs, self.stopped = 0, False

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised weights [components that vary, columns], and penalties [columns]."""
        settings, device = self._settings, self._backend.device
        shape = int(self._rows.varied.sum()), self._rows.outputs.shape[1]
        weight, none = torch.zeros(shape, device=device), torch.zeros(shape[1], device=device)
        if not settings.num_penalties:
            self._train(
                weight, len(self._rows), held_out=False, start_lams=none, num_lambdas=0, lam_decay=1.0
            )
            return weight, none
        count = settings.num_penalties
        path = {
            "start_lams": self._largest(self._rows.num_train),
            "num_lambdas": count,
            "lam_decay": settings.smallest ** (1 / (count - 1)),
        }
        if settings.together:
            path["min_lams_to_try"] = count + 2  # never: all see the whole path
        chosen = self._train(weight, self._rows.num_train, held_out=True, **path)
        if self.stopped:
            raise self._unfinished()
        start = chosen.clone()  # the original keeps, and may change, what it is given
        self._train(weight, len(self._rows), held_out=False, start_lams=start, num_lambdas=1, lam_decay=1.0)
        return weight, chosen

    def _train(self, weight: torch.Tensor, stop: int, held_out: bool, **settings: Any) -> torch.Tensor:
        asked, rows, backend = self._settings, self._rows, self._backend
        mean, deviation = self._moments(stop)
        watch = Watch(weight, deviation, asked.threshold, asked.max_epochs, asked.together)
        size = min(asked.batch_size, stop)
        if held_out:
            size = min(size, len(rows) - stop)
            size = (len(rows) - stop) // -(-(len(rows) - stop) // size)  # so that next to none is left over
        fit = Batches(rows, 0, stop, size, backend.device, asked.seed, watch)
        judge = Batches(rows, stop, len(rows), size, backend.device) if held_out else None
        bias = torch.from_numpy(rows.outputs[:stop].mean(axis=0)).to(weight)
        chosen = backend.train(
            weight,
            bias,
            fit,
            judge,
            lr=self._learning_rate(len(mean), size),
            early_stop_eps=watch.threshold,
            early_stop_freq=asked.check_every,
            **settings,
        )
        self.epochs += watch.epochs
        self.stopped = watch.stopped
        return chosen

    def _learning_rate(self, components: int, size: int) -> float:
        if self._settings.learning_rate != "auto":
            return self._settings.learning_rate
        # A third of the inverse of the largest eigenvalue that the masks of a batch have, for random masks.
        return float(1 / (3 * (1 + np.sqrt(components / size)) ** 2))

    def _blocks(self, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = Batches(self._rows, 0, stop, min(stop, 2048), self._backend.device)
        for kept, outputs, _ in batches.batches(np.arange(stop)):
            yield kept, outputs

    def _moments(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the masks of the first rows, [components that vary]; 1 if constant there."""
        mean = sum(kept.sum(dim=0, dtype=torch.float64) for kept, _ in self._blocks(stop)) / stop
        assert isinstance(mean, torch.Tensor)
        deviation = (mean - mean**2).clamp(min=0).sqrt()
        deviation[deviation == 0] = 1.0
        return mean.float(), deviation.float()

    def _gradient(self, stop: int, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x'(y - x w) / rows, [components that vary, columns], and |y - x w|^2 / rows, [columns]."""
        mean, deviation = self._moments(stop)
        centre = torch.from_numpy(self._rows.outputs[:stop].mean(axis=0)).to(mean)
        found = torch.zeros(len(mean), len(centre), dtype=torch.float64, device=mean.device)
        squares = torch.zeros_like(found[0])
        for kept, outputs in self._blocks(stop):
            masks = (kept - mean) / deviation
            rest = outputs - centre
            if weight is not None:
                rest -= masks @ weight
            found += masks.T @ rest
            squares += rest.square().sum(dim=0)
        return found / stop, squares / stop

    def _largest(self, stop: int) -> torch.Tensor:
        """The smallest penalty that leaves no weight, float32 [columns]; the original's own is too small."""
        return self._gradient(stop, None)[0].abs().amax(dim=0).float()

    def check(self, weight: torch.Tensor, penalties: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How far each column is from optimal at its penalty, relative to its largest, and its R2; [columns].

        The gradient of an optimum is the penalty, with the sign of the weight, where there is a weight, and
        at most as large where there is none.
        """
        slope, variance = self._gradient(len(self._rows), None)
        largest = slope.abs().amax(dim=0)
        slope, rest = self._gradient(len(self._rows), weight)
        at_zero = (slope.abs() - penalties).clamp(min=0)
        off = torch.where(weight == 0, at_zero, (slope - penalties * weight.sign()).abs()).amax(dim=0)
        violation: np.ndarray = torch.where(largest > 0, off / largest, off).cpu().numpy()
        return violation, explained(rest.cpu().numpy(), variance.cpu().numpy())

    def _unfinished(self) -> FitError:
        return FitError(
            f"fast_l1 did not get to the end of the path in max_epochs={self._settings.max_epochs} epochs",
            expected=f"{self._settings.num_penalties} penalties",
            got="fewer",
            todo="use more epochs, a larger threshold, fewer penalties; or coar.Lasso()",
        )
