"""Layout: which work items a set of passes is cut into: blocks of examples x rounds x replicates.

What is asked for grows in steps: at first some examples and rounds, later more rounds for all, or more
examples that catch up. Blocks never mix examples of two steps, and rounds are cut where their number is
a power of two, so that there are figures to look at (and to stop by) while passes go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from coar.errors import SettingError

REPLICATES = 4
FEWEST_REPLICATES = 2  # where there are not passes for four: errors need two
MOST_ITEMS = 1_000_000  # far beyond what a folder of files serves well


@dataclass(frozen=True)
class GateItem:
    """A work item: rounds of one replicate for a block of examples.

    Attributes:
        index: number of the item.
        block: number of the block.
        examples: their positions.
        replicate: which of the four.
        start, stop: rounds.
    """

    index: int
    block: int
    examples: tuple[int, ...]
    replicate: int
    start: int
    stop: int

    def __len__(self) -> int:
        return len(self.examples) * (self.stop - self.start)

    def __str__(self) -> str:
        return f"examples {self.examples[0]} to {self.examples[-1]}, rounds {self.start} to {self.stop}"


@dataclass(frozen=True)
class Step:
    """What was asked for at one time: examples that are new, and rounds per replicate for all.

    Attributes:
        new: positions of new examples, [n]; may be empty.
        rounds: of all examples from now on.
    """

    new: tuple[int, ...]
    rounds: int


class Layout:
    """All items of some steps.

    Args:
        steps: in the order in which they were asked for; an item's index depends on those before alone.
        block_examples: examples per block.
        item_rounds: rounds per item at most.
        replicates: how many.

    >>> layout = Layout([Step((0, 1, 2), 3)], block_examples=2, item_rounds=8)
    >>> len(layout.items()), [(item.start, item.stop) for item in layout.items()[::8]]
    (24, [(0, 1), (1, 2), (2, 3)])
    """

    def __init__(
        self,
        steps: Sequence[Step],
        block_examples: int,
        item_rounds: int,
        replicates: int = REPLICATES,
    ) -> None:
        self.replicates = replicates
        self.steps: list[Step] = []
        self.block_examples, self.item_rounds = block_examples, item_rounds
        self.blocks: list[tuple[int, ...]] = []
        self._blocks_after: list[int] = []  # how many blocks there are after each step
        for step in steps:
            self.add(step)

    def add(self, step: Step) -> None:
        """Ask for more."""
        starts = range(0, len(step.new), self.block_examples)
        self.blocks += [step.new[start : start + self.block_examples] for start in starts]
        self._blocks_after.append(len(self.blocks))
        self.steps.append(step)

    @property
    def rounds(self) -> int:
        """Rounds per replicate asked for."""
        return self.steps[-1].rounds

    @property
    def examples(self) -> np.ndarray:
        """Positions of all examples, in the order of the blocks."""
        return np.array([example for block in self.blocks for example in block], np.int64)

    def items(self) -> list[GateItem]:
        """All work items."""
        found: list[GateItem] = []
        old_blocks, old_rounds = 0, 0
        for step, blocks in zip(self.steps, self._blocks_after, strict=True):
            areas = [(range(old_blocks), old_rounds), (range(old_blocks, blocks), 0)]
            for numbers, start in areas:
                for first, last in self._cuts(start, step.rounds):
                    found += self._area(len(found), numbers, first, last)
            old_blocks, old_rounds = blocks, step.rounds
        return found

    def _area(self, index: int, numbers: range, first: int, last: int) -> list[GateItem]:
        places = [(block, replicate) for block in numbers for replicate in range(self.replicates)]
        return [
            GateItem(index + k, block, self.blocks[block], replicate, first, last)
            for k, (block, replicate) in enumerate(places)
        ]

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        while start < stop:
            power = 1 << start.bit_length() if start else 1
            end = min(stop, power, start + self.item_rounds)
            yield start, end
            start = end

    def by_block(self, rounds: int) -> list[list[GateItem]]:
        """Items of each block, as far as they lie within the first rounds."""
        found: list[list[GateItem]] = [[] for _ in self.blocks]
        for item in self.items():
            if item.stop <= rounds:
                found[item.block].append(item)
        return found

    def complete_rounds(self, done: set[int]) -> int:
        """How many rounds all examples and replicates have, given the indices of finished items.

        Where blocks are cut at different rounds, as many as all of them have a cut at: no item is split.
        """
        items = self.items()
        rounds = min((item.start for item in items if item.index not in done), default=self.rounds)
        while split := [item.start for item in items if item.start < rounds < item.stop]:
            rounds = min(split)
        return rounds


def count_items(
    examples: int, rounds: int, block_examples: int, item_rounds: int, replicates: int = REPLICATES
) -> int:
    """About how many items there will be: as many, or slightly more than a layout has."""
    cuts = -(-rounds // item_rounds) + rounds.bit_length()
    return replicates * min(cuts, rounds) * -(-examples // block_examples)


def require_few_items(examples: int, rounds: int, block_examples: int, item_rounds: int) -> None:
    """Raise `SettingError` if so much would make more files than a folder can serve."""
    items = count_items(examples, rounds, block_examples, item_rounds)
    if items > MOST_ITEMS:
        raise SettingError(
            "so many passes make too many files",
            expected=f"at most {MOST_ITEMS:,} files",
            got=f"about {items:,}: {rounds:,} rounds of {REPLICATES} replicates, {examples:,} examples",
            todo="ask for fewer passes, or for fewer examples",
        )
