"""ComponentSet: the parts of a model that can be ablated, and where each of them lies.

A component is a slice of one parameter along one dimension, on one side of the layer that uses it:
a convolution filter is one row of a weight (output side), an attention head a run of columns of an
output projection (input side). Components of one module make a group; flat indices run through the
groups in order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from coar.axes import Axis
from coar.component_fit import require_fits, require_separate
from coar.component_group import ComponentGroup
from coar.errors import ComponentError, SpecError
from coar.files import digest_json

__all__ = ["ComponentGroup", "ComponentSet"]


class ComponentSet:
    """Ordered groups of components; flat index <-> name <-> slice of a parameter.

    `len` counts components, iteration gives groups, `names` is one name per component, and `+` joins
    two sets (all heads and some blocks, say).

    >>> group = ComponentGroup("conv", "conv_filter", "conv", "weight", dimension=0, count=3)
    >>> components = ComponentSet([group])
    >>> components.names[1], components.index("conv[2]")
    ('conv[1]', 2)
    """

    def __init__(
        self,
        groups: Iterable[ComponentGroup],
        left_out: Sequence[str] = (),
        selection: dict[str, Any] | None = None,
        overlap: bool = False,
    ) -> None:
        self.groups = tuple(groups)
        self.left_out = tuple(left_out)  # modules that a rule skips by default, for the summary
        self.selection = selection  # the arguments of find_components, for specs; None for groups by hand
        self.overlap = overlap  # several gates may act on one number; each factor counts
        self.starts = np.concatenate([[0], np.cumsum([group.count for group in self.groups])]).astype(
            np.int64
        )
        if len({group.name for group in self.groups}) != len(self.groups):
            raise ComponentError(
                "two groups of components have the same name", got=sorted(g.name for g in self.groups)
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[ComponentGroup]:
        return iter(self.groups)

    def __add__(self, other: ComponentSet) -> ComponentSet:
        return ComponentSet((*self.groups, *other.groups), overlap=self.overlap or other.overlap)

    def __repr__(self) -> str:
        return f"ComponentSet({len(self)} components in {len(self.groups)} groups)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComponentSet) and self.groups == other.groups

    def __hash__(self) -> int:
        return hash(self.groups)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all components in flat order, such as `layer1.0.conv1[17]`."""
        return tuple(group.component_name(i) for group in self.groups for i in range(group.count))

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """Flat index of a component name."""
        if name not in self._positions:
            raise ComponentError(
                "no such component", expected=f"a name such as {self.names[0]!r}", got=repr(name)
            )
        return self._positions[name]

    def locate(self, index: int) -> tuple[ComponentGroup, int]:
        """Group of a flat index, and the component's number in it."""
        if not 0 <= index < len(self):
            raise ComponentError("component index out of range", expected=f"0 <= i < {len(self)}", got=index)
        position = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.groups[position], int(index - self.starts[position])

    def slices(self) -> Iterator[tuple[ComponentGroup, slice]]:
        """Every group with its range of flat indices."""
        for group, start in zip(self.groups, self.starts, strict=False):
            yield group, slice(int(start), int(start) + group.count)

    def keep_mask(self, ablate: Iterable[int | str]) -> np.ndarray:
        """bool [components]: True = kept, False for the components given by index or name."""
        mask = np.ones(len(self), dtype=bool)
        for component in ablate:
            if isinstance(component, bool | np.bool_):
                raise ComponentError(
                    "components to ablate are given by index or name",
                    expected="[3, 'conv[7]']",
                    got="a bool mask",
                )
            index = self.index(component) if isinstance(component, str) else operator.index(component)
            self.locate(index)
            mask[index] = False
        return mask

    def pick(self, indices: Iterable[int | str]) -> ComponentSet:
        """Some components, by index or name, as a set of their own, one group each: what an edit keeps."""
        numbers = [self.index(index) if isinstance(index, str) else int(index) for index in indices]
        chosen = [_single(*self.locate(number)) for number in numbers]
        return ComponentSet(chosen, overlap=self.overlap)

    def axis(self, model_fingerprint: str, ablation: str) -> Axis:
        """The components axis of arrays made with one model and one way of ablating it."""
        groups = np.repeat([group.name for group in self.groups], [group.count for group in self.groups])
        source = {"model": model_fingerprint, "ablation": ablation, "slices": digest_json(self.to_json())}
        return Axis("components", self.names, source, {"group": groups})

    def summary(self) -> str:
        """A table with one line per group: name, kind, count."""
        rows = [(group.name or "(model)", group.kind, f"{group.count:,}") for group in self.groups]
        rows.append((f"{len(self.groups)} groups", "", f"{len(self):,}"))
        widths = [max(len(row[i]) for row in [*rows, ("group", "kind", "components")]) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines.insert(0, f"{'group':<{widths[0]}}  {'kind':<{widths[1]}}  {'components':>{widths[2]}}")
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        if self.left_out:
            lines.append(f"left out unless included by name: {', '.join(self.left_out)}")
        return "\n".join(lines)

    def require_fits(self, model: nn.Module) -> None:
        """Raise `ComponentError` unless every group lies inside a parameter of this model."""
        require_fits(self.groups, model)

    def require_separate(self, model: nn.Module, with_bias: bool = False) -> None:
        """Raise `ComponentError` if components overlap unasked, or another module uses a gated parameter.

        Args:
            model: one that the components fit.
            with_bias: biases are gated, too.
        """
        require_separate(self.groups, model, with_bias, self.overlap)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON form of the groups."""
        return [group.to_json() for group in self.groups]

    @classmethod
    def from_json(cls, value: Any, where: str, overlap: bool = False) -> ComponentSet:
        """Rebuild a set written by `to_json`; `where` names the file in errors."""
        try:
            return cls((ComponentGroup(**group) for group in value), overlap=overlap)
        except TypeError as error:
            raise SpecError(f"{where}: component groups are damaged", got=str(error)) from None


def _single(group: ComponentGroup, number: int) -> ComponentGroup:
    offset = group.offset + number * group.width
    return replace(group, name=group.component_name(number), count=1, offset=offset)
