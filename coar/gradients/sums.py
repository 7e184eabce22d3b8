"""Sums over passes: what a work item becomes, in memory or as a file that is written once.

    runs/gradients/
      sums/000017.safetensors       per output: probe, kept, values; header: item, study, digests, record

Arrays of an output: `probe` float32 [columns, components], the derivatives where a component was a probe,
summed over rounds; `kept`, the mean over a round's passes where it was not, summed over rounds; `values`
float64 [columns], the mean output of a round's passes, summed over rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from coar.errors import StoreError
from coar.gradients.layout import GateItem
from coar.signed_arrays import (
    damaged,
    read_signed,
    require_digests,
    require_study,
    write_signed,
)

FORMAT = 1
PARTS = ("probe", "kept", "values")


@dataclass
class Sums:
    """Of one output over some passes of a block of examples.

    Attributes:
        probe: derivatives of probes, float32 [columns, components].
        kept: derivatives of the others, likewise.
        values: outputs, float64 [columns].
    """

    probe: np.ndarray
    kept: np.ndarray
    values: np.ndarray


ItemSums = Mapping[str, Sums]  # by output


@dataclass
class BlockMeans:
    """Of one output, means over all rounds so far, per replicate.

    Attributes:
        probe: float32 [replicates, columns, components].
        kept: likewise.
        values: float64 [replicates, columns].
    """

    probe: np.ndarray
    kept: np.ndarray
    values: np.ndarray


class SumsStore(Protocol):
    """Where sums go."""

    def write(self, item: GateItem, sums: ItemSums, record: Mapping[str, Any]) -> None:
        """Store an item."""


class MemorySums:
    """Sums in memory: one running total per block, replicate and output."""

    def __init__(self, replicates: int) -> None:
        self.replicates = replicates
        self._totals: dict[tuple[int, str], BlockMeans] = {}

    def write(self, item: GateItem, sums: ItemSums, record: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Add an item to its block."""
        for output, found in sums.items():
            key = (item.block, output)
            if key not in self._totals:
                self._totals[key] = empty_means(found, self.replicates)
            add(self._totals[key], item.replicate, found)

    def means(self, block: int, output: str, rounds: int) -> BlockMeans:
        """Means of a block, all of whose replicates have had so many rounds."""
        return divided(self._totals[block, output], rounds)


class FileSums:
    """Sums in a folder, a file per item.

    Args:
        folder: the study's folder.
        study_digest: of the study; files of others are refused.
        outputs: which outputs there are.
        num_components: second axis of the arrays.
        replicates: how many.
    """

    def __init__(
        self, folder: Path, study_digest: str, outputs: Iterable[str], num_components: int, replicates: int
    ) -> None:
        self.replicates = replicates
        self.folder, self.study_digest = folder / "sums", study_digest
        self.outputs, self.num_components = tuple(outputs), num_components

    def path(self, index: int) -> Path:
        """File of an item."""
        return self.folder / f"{index:06d}.safetensors"

    def present(self) -> set[int]:
        """Indices of finished items."""
        return {int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdigit()}

    def write(self, item: GateItem, sums: ItemSums, record: Mapping[str, Any]) -> None:
        """Store an item; the first of two writers stays."""
        arrays = {
            f"{part}.{output}": np.ascontiguousarray(getattr(found, part))
            for output, found in sums.items()
            for part in PARTS
        }
        header = {"format": FORMAT, "study": self.study_digest, "item": _named(item), "record": dict(record)}
        try:
            write_signed(self.path(item.index), arrays, header)
        except StoreError as error:
            # Another worker did the same with another execution record (batch size, say): both are right.
            if "holds something else" not in error.what or self._read(item)[0]["record"] == header["record"]:
                raise

    def read(self, item: GateItem, output: str) -> Sums:
        """Read and check one output of an item.

        Raises:
            StoreError: missing, altered, of another study or item, or of a newer format.
        """
        _, arrays = self._read(item)
        return Sums(*(arrays[f"{part}.{output}"] for part in PARTS))

    def _read(self, item: GateItem) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        path = self.path(item.index)
        header, arrays = read_signed(path, FORMAT)
        require_study(path, header, self.study_digest)
        expected = {f"{part}.{output}" for part in PARTS for output in self.outputs}
        if header["item"] != _named(item) or set(arrays) != expected:
            raise damaged(path, f"{item}, outputs {', '.join(self.outputs)}", f"{header['item']}")
        require_digests(path, header, arrays)
        return header, arrays

    def means(self, items: Iterable[GateItem], output: str) -> BlockMeans:
        """Means over items of one block, in the order given."""
        total, rounds = None, 0
        for item in items:
            found = self.read(item, output)
            total = total or empty_means(found, self.replicates)
            add(total, item.replicate, found)
            rounds = max(rounds, item.stop)
        assert total is not None
        return divided(total, rounds)

    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def empty_means(like: Sums, replicates: int) -> BlockMeans:
    """Totals of nothing, for sums of this shape."""
    shape = (replicates, *like.probe.shape)
    return BlockMeans(np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape[:2]))


def add(total: BlockMeans, replicate: int, found: Sums) -> None:
    """Add the sums of an item to the totals of its replicate."""
    for part in PARTS:
        getattr(total, part)[replicate] += getattr(found, part)


def divided(total: BlockMeans, rounds: int) -> BlockMeans:
    """Means from totals over so many rounds."""
    return BlockMeans(
        total.probe / np.float32(rounds), total.kept / np.float32(rounds), total.values / rounds
    )


def _named(item: GateItem) -> dict[str, Any]:
    return {
        "examples": [int(example) for example in item.examples],
        "replicate": item.replicate,
        "rounds": [item.start, item.stop],
    }
