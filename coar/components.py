"""ComponentSet: the parts of a model that can be ablated, and where each of them lies.

A component is a slice of one parameter along one dimension, on one side of the layer that uses it:
a convolution filter is one row of a weight (output side), an attention head a run of columns of an
output projection (input side). Components of one module make a group; flat indices run through the
groups in order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from coar.axes import Axis
from coar.errors import ComponentError, SpecError
from coar.files import digest_json

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


class ComponentSet:
    """Ordered groups of components; flat index <-> name <-> slice of a parameter.

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

    def pick(self, indices: Iterable[int]) -> ComponentSet:
        """Some components as a set of their own, one group each: what an edit keeps."""
        chosen = [_single(*self.locate(int(index))) for index in indices]
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
        modules = dict(model.named_modules(remove_duplicate=False))
        for group in self.groups:
            _require_group_fits(group, modules.get(group.module))

    def require_separate(self, model: nn.Module, with_bias: bool = False) -> None:
        """Raise `ComponentError` if components overlap unasked, or another module uses a gated parameter.

        Args:
            model: one that the components fit.
            with_bias: biases are gated, too.
        """
        owners = _owners(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        claims: dict[int, list[tuple[int, int, int, str]]] = {}
        for group in self.groups:
            keys = [(group.parameter, group.dimension)]
            keys += [(group.bias, 0)] if with_bias and group.bias else []
            for key, dimension in keys:
                place = _place(modules[group.module]._parameters[key])
                if len(owners[place]) > 1:
                    raise _shared(group, key, owners[place])
                claims.setdefault(place, []).append((dimension, group.offset, group.stop, group.name))
        if not self.overlap:
            for claim in claims.values():
                _require_disjoint(sorted(claim))
            _require_scopes_apart(self.groups)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON form of the groups."""
        return [group.to_json() for group in self.groups]

    @classmethod
    def from_json(cls, value: Any, where: str) -> ComponentSet:
        """Rebuild a set written by `to_json`; `where` names the file in errors."""
        try:
            return cls(ComponentGroup(**group) for group in value)
        except TypeError as error:
            raise SpecError(f"{where}: component groups are damaged", got=str(error)) from None


def _place(parameter: nn.Parameter | None) -> int:
    assert parameter is not None
    return parameter.data_ptr() or id(parameter)  # tensors without storage have no address


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters at each address: several where modules share storage."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_place(parameter), []).append(f"{name}.{key}")
    return owners


def _shared(group: ComponentGroup, key: str | None, owners: list[str]) -> ComponentError:
    return ComponentError(
        f"{group.module} shares its {key} with another module",
        expected="a parameter used by one module: ablating a tied one ablates both",
        got=", ".join(owners),
        todo=f"exclude=[{group.module!r}]",
    )


def _require_disjoint(claims: list[tuple[int, int, int, str]]) -> None:
    for (dimension, _, stop, name), (other_dimension, start, _, other) in pairwise(claims):
        if dimension != other_dimension or start < stop:
            raise ComponentError(
                "components overlap: some numbers belong to two of them",
                expected="every number of a parameter in at most one component",
                got=f"{name} and {other}",
                todo=_SEPARATE,
            )


def _require_scopes_apart(groups: Sequence[ComponentGroup]) -> None:
    """A head and the rows of its own values, a block and its filters: one switches the other off."""
    scopes: dict[str, dict[str, str]] = {}
    for group in groups:
        for scope in group.scope or (group.module,):
            scopes.setdefault(group.kind, {}).setdefault(scope, group.name)
    for (kind, ours), (other_kind, theirs) in combinations(scopes.items(), 2):
        for scope, name in ours.items():
            for other, other_name in theirs.items():
                if f"{scope}.".startswith(f"{other}.") or f"{other}.".startswith(f"{scope}."):
                    raise ComponentError(
                        f"components overlap: {name} ({kind}) and {other_name} ({other_kind})",
                        expected="components that can be ablated independently of each other",
                        got="one lies inside the other",
                        todo=_SEPARATE,
                    )


_SEPARATE = "choose one kind of component per layer, or allow it: find_components(..., overlap=True)"


def _single(group: ComponentGroup, number: int) -> ComponentGroup:
    offset = group.offset + number * group.width
    return replace(group, name=group.component_name(number), count=1, offset=offset)


def _require_group_fits(group: ComponentGroup, module: nn.Module | None) -> None:
    parameter = module._parameters.get(group.parameter) if module is not None else None
    if parameter is not None:
        _require_floats(parameter, group)
    if parameter is None:
        raise ComponentError(
            f"components of another model: no parameter {group.parameter!r} in module {group.module!r}",
            expected=f"{group.count} components of kind {group.kind}",
            got="no such module" if module is None else f"{type(module).__name__} without it",
            todo="call find_components on this very model; remove weight norm and the like first",
        )
    size = parameter.shape[group.dimension] * group.blocks if 0 <= group.dimension < parameter.ndim else 0
    if group.blocks > 1 and parameter.shape[0] % group.blocks:
        size = 0
    if group.stop > size or group.offset < 0 or min(group.count, group.width) < 1:
        raise ComponentError(
            f"components of another model: {group.module}.{group.parameter} has another shape",
            expected=f"at least {group.stop} entries along dimension {group.dimension}",
            got=tuple(parameter.shape),
            todo="call find_components on this very model",
        )
    _require_side(group, module)


def _require_side(group: ComponentGroup, module: nn.Module | None) -> None:
    """In the layers whose layout is known, rows are outputs and columns inputs."""
    rows = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and group.parameter == "weight"
    if rows and (group.dimension == 0) != (group.side == "output"):
        raise ComponentError(
            f"{group.name}: dimension {group.dimension} of a {type(module).__name__}'s weight is not its "
            f"{group.side} side",
            expected="dimension 0 with side='output', or another with side='input'",
            got=f"dimension {group.dimension} with side={group.side!r}",
        )


def _require_floats(parameter: nn.Parameter, group: ComponentGroup) -> None:
    plain = type(parameter) in (nn.Parameter, Tensor, nn.parameter.UninitializedParameter)
    if plain and parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
        return
    lazy = nn.parameter.is_lazy(parameter)
    raise ComponentError(
        f"{group.module}.{group.parameter} cannot be gated",
        expected="a plain floating-point parameter",
        got="one without a shape yet" if lazy else f"{type(parameter).__name__} of {parameter.dtype}",
        todo="run one batch through the lazy model first"
        if lazy
        else "load the model unquantised (float32, bfloat16 or float16) and not sharded",
    )
