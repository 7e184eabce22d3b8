"""From sums over passes to attributions, block by block: two looks at the sums, one block in memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coar.attribution_blocks import Block
from coar.axes import Axis
from coar.errors import SettingError
from coar.gradients.mixing import Mixed, Mixing, mixing_of
from coar.gradients.sums import BlockMeans

MeansReader = Callable[[int], BlockMeans]  # of a block


@dataclass(frozen=True)
class PassMeans:
    """What passes have found so far.

    Attributes:
        columns: per block, positions of its columns on the axis.
        means: reads the means of a block.
        groups: components that belong together.
        num_components: length of a column.
        kept: expected share of components that a gate vector keeps.
        classes: of all columns of the axis, to pool over; None does not pool.
    """

    columns: Sequence[np.ndarray]
    means: MeansReader
    groups: Sequence[slice]
    num_components: int
    kept: float
    classes: np.ndarray | None = None

    def mixing(self) -> Mixing:
        """How probe and kept means are mixed, from the sums over all columns."""
        blocks = (self._block(block) for block in range(len(self.columns)))
        return mixing_of(
            blocks, self.groups, self.num_components, 0 if self.classes is None else self.classes.max() + 1
        )

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        means = self.means(block)
        return means.probe, means.kept, self._classes(block)

    def mixed(self, mixing: Mixing) -> Iterator[tuple[np.ndarray, Mixed, BlockMeans]]:
        """Per block: columns, weights, and the means that they are from."""
        for block, columns in enumerate(self.columns):
            means = self.means(block)
            yield columns, mixing.mix(means.probe, means.kept, self._classes(block)), means

    def blocks(self, mixing: Mixing) -> Iterator[Block]:
        """Attributions, one block after the other."""
        start = 0
        for columns, mixed, means in self.mixed(mixing):
            # Gates are on average what masks are: the mean output over passes is that at the mean mask.
            intercept = means.values.mean(axis=0) - self.kept * mixed.weights.sum(axis=1)
            details = {"signal": mixed.signal, "noise": mixed.noise, "agreement": mixed.agreement}
            yield Block(start, mixed.weights, intercept, mixed.errors, details)
            start += len(columns)

    def whole(self, mixing: Mixing) -> Block:
        """Attributions of all columns, in memory; each block is put in its place, not kept beside."""
        arrays: dict[str, np.ndarray] = {}
        count = sum(map(len, self.columns))
        for block in self.blocks(mixing):
            for key, part in block.arrays().items():
                whole = arrays.setdefault(key, np.empty((count, *part.shape[1:]), part.dtype))
                whole[block.start : block.start + len(part)] = part
        return Block.from_arrays(0, arrays)

    def progress(self, mixing: Mixing | None = None) -> Progress:
        """How good the weights are by now."""
        angles, errors = [], []
        for _, mixed, _ in self.mixed(mixing or self.mixing()):
            squares = (mixed.weights**2).sum(axis=1)
            moving = squares > 0  # others say nothing
            angles.append(np.stack([mixed.agreement, mixed.signal])[:, moving] / squares[moving])
            errors.append(np.median(mixed.errors, axis=1))
        return Progress(_cosine(np.concatenate(angles, axis=1)), float(np.median(np.concatenate(errors))))

    def _classes(self, block: int) -> np.ndarray | None:
        return None if self.classes is None else self.classes[self.columns[block]]


@dataclass(frozen=True)
class Progress:
    """How good weights are, from the replicates.

    Attributes:
        correlation: of predictions by these weights with those by exact ones, over columns: cosine of v
            and w, with v.w and |w|^2 from products of different replicates, each in units of |v|^2 and
            averaged over columns. With few columns slightly too small: v.w is that of three replicates.
        error: standard error in output units, median over columns of medians over components.
    """

    correlation: float
    error: float

    def __str__(self) -> str:
        return f"correlation {self.correlation:.3f}, error {self.error:.2g}"


def _cosine(products: np.ndarray) -> float:
    """Of weights and exact weights; products [2, columns]: v.w and |w|^2, in units of |v|^2."""
    if not products.shape[1]:
        return 1.0  # nothing moves
    agreement, signal = products.mean(axis=1)
    return float(np.clip(agreement / np.sqrt(signal), 0.0, 1.0)) if signal > 0 else 0.0


def subset_axis(axis: Axis, columns: np.ndarray) -> Axis:
    """The axis itself where columns are all of it, in order."""
    everything = np.array_equal(columns, np.arange(len(axis)))
    return axis if everything else axis.subset(columns)


def example_columns(axis: Axis, blocks: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Positions of the columns of each block's examples, in the examples' order."""
    owner = axis.fields["example"]
    order = np.argsort(owner, kind="stable")
    ranked = owner[order]
    found = []
    for block in blocks:
        first, last = (np.searchsorted(ranked, np.array(block), side) for side in ("left", "right"))
        found.append(np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)]))
    return found


def classes_of(metadata: Any, axis: Axis) -> np.ndarray:
    """Class of each column, counted from 0: the task's `label`, or one for all.

    Raises:
        SettingError: some examples have no label (None or NaN), or labels are of several types.
    """
    if metadata is None or "label" not in metadata:
        return np.zeros(len(axis), np.int64)
    import pandas  # a task's metadata are a table of it

    labels = np.asarray(metadata["label"])
    missing = np.flatnonzero(pandas.isna(labels)).tolist()
    if missing:
        raise SettingError(
            "pooling needs the class of every example",
            expected="a label for each",
            got=f"{len(missing):,} of {len(labels):,} without one (None or NaN): {str(missing)[1:-1]:.60}",
            todo='give them a label of their own, "unlabelled" say, or pool=False',
        )
    try:
        found = np.unique(labels, return_inverse=True)[1]
    except (TypeError, ValueError):  # 1 and "a" have no order, arrays neither
        raise SettingError(
            "pooling needs one class per example",
            expected="labels of one type, all numbers or all texts",
            got=f"{labels.tolist()!r:.60}",
            todo="mend metadata['label'], or pool=False",
        ) from None
    return np.asarray(found)[axis.fields["example"]]


def chosen_examples(examples: Sequence[int] | None, count: int, taken: Sequence[int] = ()) -> tuple[int, ...]:
    """Positions of examples, checked, in increasing order; None is all."""
    if examples is None:
        return tuple(range(count))
    try:
        asked = list(examples)
        found = [operator.index(example) for example in asked]
    except TypeError:  # 5, or a list of 1.5, "a", [1]
        asked, found = [], []
    if any(isinstance(example, bool | np.bool_) for example in asked):  # a mask, not positions
        found = []
    if not found or len({*found, *taken}) < len(found) + len(taken) or min(found) < 0 or max(found) >= count:
        raise SettingError(
            "examples to attribute",
            expected=f"positions from 0 to {count - 1}, each once"
            + (", none of them there" if taken else ""),
            got=f"{examples!r:.80}",
            todo="examples=[0, 1, 2], say, or range(100)",
        )
    return tuple(sorted(found))
