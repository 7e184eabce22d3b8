"""ComponentGroup: the components of one module, as slices of one parameter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

Side = Literal["output", "input"]


@dataclass(frozen=True)
class ComponentGroup:
    """The components of one module.

    Attributes:
        name: unique in its set; usually the module's name.
        kind: what the components are, for example "conv_filter".
        module: qualified name of the module in the model ("" is the model itself).
        parameter: name of the parameter in that module.
        dimension: along which the parameter is cut.
        count: how many components.
        width: how many entries along the dimension belong to one component.
        offset: first entry along the dimension.
        bias: name of the parameter that holds the same units' biases, or None.
        side: "output" where a component is some units that the layer emits, "input" where it is some
            entries that the layer reads (the parameter is cut along its input dimension).
        whole: the bias belongs to the component, whatever the convention: a residual branch.
        blocks: into how many parts the parameter's first dimension is split before it is cut: the
            groups of a transposed convolution, whose filters are columns of their group's rows.
        scope: modules whose insides a component stands for (a head for its attention module): no other
            kind of component lies there unless overlaps are asked for. Known to `find_components` only.
    """

    name: str
    kind: str
    module: str
    parameter: str
    dimension: int
    count: int
    width: int = 1
    offset: int = 0
    bias: str | None = None
    side: Side = "output"
    whole: bool = False
    blocks: int = 1
    scope: tuple[str, ...] = field(default=(), compare=False)

    @property
    def stop(self) -> int:
        """First entry along the dimension after the group."""
        return self.offset + self.count * self.width

    def component_name(self, index: int) -> str:
        """Name of a component by its number in the group."""
        return f"{self.name}[{index}]"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form: what later formats added is left out where it says nothing new."""
        value = asdict(self) | {"scope": ()}
        added = {entry.name: entry.default for entry in fields(self) if entry.name in _ADDED}
        return {key: entry for key, entry in value.items() if key not in added or entry != added[key]}


_ADDED = ("side", "whole", "blocks", "scope")  # after the first release: digests of older sets stay
