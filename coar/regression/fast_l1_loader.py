"""Rows as the original fast_l1 reads them, and what is watched meanwhile.

It iterates over a data loader until it is content: the loader is where a run can be looked at, and ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from coar.errors import FitError

COUNTING = 3  # passes over the loader before the first epoch: count rows, look at shapes, mean and deviation

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Stopped(Exception):  # noqa: N818 - a signal, caught by the original as if it were Ctrl-C
    """The loader ends the run."""


@dataclass(frozen=True)
class Rows:
    """Rows in memory, those that are held out last.

    Attributes:
        bits: masks, eight to a byte, least significant bit first, uint8 [rows, ceil(components / 8)].
        varied: components that are neither kept nor ablated in every row, bool [components].
        outputs: float32 [rows, columns].
        num_train: rows before the first one held out.
    """

    bits: np.ndarray
    varied: np.ndarray
    outputs: np.ndarray
    num_train: int

    def __len__(self) -> int:
        return len(self.bits)

    def batch(self, positions: np.ndarray, device: torch.device) -> Batch:
        """Masks and outputs, both float32, on the device, and their positions, on the CPU."""
        masks = np.unpackbits(self.bits[positions], axis=1, count=len(self.varied), bitorder="little")
        kept = torch.from_numpy(masks[:, self.varied]).to(device).float()
        outputs = torch.from_numpy(np.ascontiguousarray(self.outputs[positions])).to(device)
        return kept, outputs, torch.from_numpy(positions)


class Batches:
    """Rows `start` to `stop` as the original expects them: batches of one size, until it is content.

    The passes in which it counts see every row. In an epoch, shuffled batches are all full, and the few
    rows that fill none are others each time: every row takes part, and none more than others.

    Args:
        rows: all rows.
        start: first row.
        stop: end of the rows.
        size: of a batch, at most `stop - start`.
        device: where batches go.
        seed: of the order of rows.
        watch: looks after each epoch; None for rows that are only evaluated, always in the same order.
    """

    def __init__(
        self,
        rows: Rows,
        start: int,
        stop: int,
        size: int,
        device: torch.device,
        seed: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self.rows, self.start, self.stop, self.size = rows, start, stop, size
        self.device, self.seed, self.watch = device, seed, watch
        self.passes = 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        if self.watch is None:
            yield from self.batches(np.arange(self.start, self.stop), full=True)
        elif self.passes <= COUNTING:
            yield from self.batches(np.arange(self.start, self.stop))
        else:
            self.watch.begin()
            order = np.random.default_rng((self.seed, self.passes)).permutation(self.stop - self.start)
            yield from self.batches(self.start + order, full=True)
            self.watch.end()

    def batches(self, positions: np.ndarray, full: bool = False) -> Iterator[Batch]:
        """Batches of these rows in this order; `full`: none that is smaller."""
        stop = len(positions) // self.size * self.size if full else len(positions)
        for first in range(0, stop, self.size):
            yield self.rows.batch(positions[first : first + self.size], self.device)


class Watch:
    """Looks at the weights before and after each epoch.

    The original takes a column for converged where its largest change in an epoch is below a threshold. With
    `together`, that threshold is a tensor which says "no" for all columns until all have converged, then
    "yes" for all: so columns change their penalty and finish together, and are never reordered.

    Args:
        weight: the original's weights, float32 [components, columns].
        scale: float32 [components], deviation of each mask.
        threshold: largest squared change of a converged weight times its deviation.
        max_epochs: how many it may take.
        together: columns advance together.

    Attributes:
        threshold: to be given to the original.
        epochs: how many there were.
        change: largest squared change in the last epoch, [columns].
        stopped: the limit was reached.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, threshold: float, max_epochs: int, together: bool
    ) -> None:
        self._weight, self._scale, self._limit, self._together = weight, scale[:, None], threshold, together
        self._max_epochs = max_epochs
        self.threshold: torch.Tensor | float = threshold
        if together:
            self.threshold = torch.full(weight.shape[1:], -1.0, device=weight.device)
        self.epochs, self.stopped = 0, False
        self.change = torch.full(weight.shape[1:], torch.inf)

    def begin(self) -> None:
        """Before an epoch.

        Raises:
            Stopped: one more would be too many.
        """
        if self.epochs >= self._max_epochs:
            self.stopped = True
            raise Stopped
        self._before = self._weight.clone()

    def end(self) -> None:
        """After an epoch.

        Raises:
            FitError: a weight is NaN or infinite.
        """
        self.epochs += 1
        self.change = ((self._weight - self._before) * self._scale).square_().amax(dim=0)
        diverged = int((~torch.isfinite(self.change)).sum())
        if diverged:
            raise FitError(
                f"fast_l1 diverged in {diverged} of {len(self.change)} columns in epoch {self.epochs}",
                expected="finite weights",
                got="NaN or infinite ones",
                todo='use a smaller learning rate, or learning_rate="auto"',
            )
        if isinstance(self.threshold, torch.Tensor):
            self.threshold.fill_(torch.inf if bool((self.change < self._limit).all()) else -1.0)
