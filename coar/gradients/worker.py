"""GateWorker: does work items: some rounds of passes over a block of examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coar.errors import OutputError
from coar.experiments.memory import halving
from coar.gradients.draws import GateDraws
from coar.gradients.layout import GateItem
from coar.gradients.passes import GatePasses
from coar.gradients.sums import Sums, SumsStore


class GateWorker:
    """Passes of one study, and where their sums go.

    Args:
        passes: the experiment's model with gates, on a device.
        draws: of the gates.
        columns: per output, the example of each column, int [columns], increasing.
        names: of the components.
        store: where sums go.
    """

    def __init__(
        self,
        passes: GatePasses,
        draws: GateDraws,
        columns: Mapping[str, np.ndarray],
        names: tuple[str, ...] | list[str],
        store: SumsStore,
    ) -> None:
        self.passes, self.draws, self.columns = passes, draws, columns
        self.names, self.store = names, store

    def do(self, item: GateItem) -> int:
        """Compute an item and store it; a derivative that is not finite is an error."""
        sums = halving(lambda size: self._sums(item, size), self.passes.batch_size, self.passes.device)
        self.store.write(item, sums, self.passes.record())
        return 0

    def _sums(self, item: GateItem, batch_size: int) -> dict[str, Sums]:
        self.passes.batch_size = batch_size
        examples = np.array(item.examples, np.int64)
        parts: dict[str, list[Sums]] = {output: [] for output in self.columns}
        for here, batch in self.passes.batches(examples):
            for output, sums in self._batch(item, examples[here], batch).items():
                parts[output].append(sums)
        return {output: _joined(found) for output, found in parts.items()}

    def _batch(self, item: GateItem, examples: np.ndarray, batch: Any) -> dict[str, Sums]:
        """All passes of an item over a batch; sums stay on the device until the end."""
        owners = {
            output: torch.from_numpy(position_of(examples, owner)).to(self.passes.device)
            for output, owner in self.columns.items()
        }
        totals: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        each = self.draws.passes_per_round
        for index in range(item.start, item.stop):
            for gates in self.draws.round(item.replicate, index, examples):
                probes = torch.from_numpy(gates.probes).to(self.passes.device)
                for output, (by_gate, values) in self.passes.tensors(batch, gates).items():
                    probed = by_gate * probes[owners[output]]
                    parts = (probed, (by_gate - probed) / (each - 1), values / each)
                    for total, part in zip(totals.setdefault(output, _zeros(parts)), parts, strict=True):
                        total += part
        return {output: self._checked(output, total, examples) for output, total in totals.items()}

    def _checked(self, output: str, total: tuple[Tensor, ...], examples: np.ndarray) -> Sums:
        sums = Sums(*(part.cpu().numpy() for part in total))
        both = sums.probe + sums.kept
        if not np.isfinite(both).all():
            self._refuse(output, both, examples)
        return sums

    def _refuse(self, output: str, found: np.ndarray, examples: np.ndarray) -> None:
        """Name the last layer with a derivative that is not finite: it is where the trouble begins."""
        bad = ~np.isfinite(found)
        component = int(np.flatnonzero(bad.any(axis=0))[-1])
        column = int(np.argmax(bad[:, component]))
        owner = self.columns[output]
        example = owner[np.isin(owner, examples)][column]
        raise OutputError(
            f"a derivative of output {output!r} is not finite: example {example}, component "
            f"{self.names[component]!r}",
            expected="finite derivatives",
            got=float(found[column, component]),
            todo="raise the precision, or exclude this layer; usual: sqrt, norms, division at 0",
        )


def position_of(examples: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """For each column of these examples, in their order, the position of its example among them.

    >>> position_of(np.array([3, 1]), np.array([0, 1, 1, 2, 3])).tolist()
    [0, 1, 1]
    """
    order = np.argsort(examples, kind="stable")
    counts = np.zeros(len(examples), np.int64)
    ranked = examples[order]
    here = owner[np.isin(owner, examples)]
    np.add.at(counts, order[np.searchsorted(ranked, here)], 1)
    return np.repeat(np.arange(len(examples)), counts)


def _zeros(like: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    probe, kept, values = (torch.zeros_like(part) for part in like)
    return probe, kept, values


def _joined(parts: list[Sums]) -> Sums:
    return Sums(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))
