"""Ridge regression by one eigendecomposition for all penalties and columns; algebra in `spectrum`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from coar.attribution_blocks import Block
from coar.regression.problem import Problem
from coar.regression.ridge_settings import RidgeSettings
from coar.regression.spectrum import Spectrum, explained, require_determined, standard_errors
from coar.regression.statistics import OutputStatistics


class EigenFitter:
    """The eigendecomposition of one design, ready to fit any block of columns.

    Args:
        settings: penalties, and how a column chooses its own.
        problem: the rows.

    Raises:
        FitError: a penalty of 0 where the masks do not determine every weight.
    """

    algorithm = "eigen"

    def __init__(self, settings: RidgeSettings, problem: Problem) -> None:
        self.settings, self.problem = settings, problem
        values, self.vectors, constants = self._decomposed()
        self.counts = problem.counts()
        self.penalties = np.array(settings.grid)
        self.spectrum = Spectrum(values, self.penalties, self.counts, constants)
        self.rank = self.spectrum.rank
        self.notes: dict[str, Any] = {"algorithm": self.algorithm}
        if min(settings.grid) == 0:
            require_determined(self.counts, self.rank)

    def _decomposed(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Eigenvalues, eigenvectors [components, directions], and how many stand for constant components."""
        masks = self.problem.masks()
        values, vectors = decompose(masks.correlation(), self.problem.device)
        return values, vectors, int(masks.constant.sum())

    def fit(self, columns: slice) -> Block:
        """Fit some columns."""
        outputs = self.problem.outputs(columns)
        rotated = self.vectors.T @ outputs.covariance(self.counts)  # [directions, columns]
        residual = self.spectrum.residual_variance(rotated, outputs)
        if self.settings.choose == "gcv":
            scores = self.spectrum.gcv(residual)
        else:
            scores = self._leave_one_out(rotated, outputs, columns)
        choice = np.argmin(scores, axis=0)
        weights = self.counts.per_mask_unit(self._weights(rotated, choice))
        chosen = residual[choice, np.arange(len(choice))]
        details = {
            "penalty": self.penalties[choice],
            "score": scores[choice, np.arange(len(choice))],
            "r2": explained(chosen, outputs.variance),
        }
        intercept = outputs.mean - weights @ self.counts.mean
        return Block(columns.start, weights, intercept, self._errors(choice, chosen), details)

    def _weights(self, rotated: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """Standardised weights [columns, components], each column with its own penalty."""
        shrunk = rotated * self.spectrum.shrinkage[choice].T
        return np.ascontiguousarray((self.vectors @ shrunk).T)

    def _leave_one_out(self, rotated: np.ndarray, outputs: OutputStatistics, columns: slice) -> np.ndarray:
        """Mean squared error of each row predicted by a fit to all others, [penalties, columns]."""
        rows = self.counts.rows
        scores = np.zeros((len(self.penalties), rotated.shape[1]))
        for block in self.problem.blocks(columns):
            standard = self.counts.per_mask_unit(block.masks - self.counts.mean) @ self.vectors
            centred = block.outputs.astype(np.float64) - outputs.mean
            for number, shrinkage in enumerate(self.spectrum.shrinkage):
                leverage = 1.0 / rows + (standard**2 @ shrinkage) / rows
                error = (centred - standard @ (rotated * shrinkage[:, None])) / (1.0 - leverage)[:, None]
                scores[number] += np.einsum("ij,ij->j", error, error)
        return scores / rows

    def _errors(self, choice: np.ndarray, residual: np.ndarray) -> np.ndarray | None:
        if not self.settings.errors:
            return None
        # Per penalty, the spread of each standardised weight for noise of size 1, [penalties, components]
        spread = self.spectrum.spread @ (self.vectors**2).T
        return standard_errors(residual, self.spectrum.freedom[choice], spread[choice], self.counts)


def decompose(matrix: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of a symmetric matrix, float64; NumPy's LAPACK is faster on the CPU."""
    if device.type == "cpu":
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors
    found = torch.linalg.eigh(torch.from_numpy(matrix).to(device))
    return found.eigenvalues.cpu().numpy(), found.eigenvectors.cpu().numpy()
