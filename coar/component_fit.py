"""Whether components fit a model, lie apart from each other, and are gated alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from torch import Tensor, nn

from coar.component_group import ComponentGroup
from coar.errors import ComponentError


def require_fits(groups: Sequence[ComponentGroup], model: nn.Module) -> None:
    """Raise `ComponentError` unless every group lies inside a parameter of this model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for group in groups:
        _require_group_fits(group, modules.get(group.module))


def require_separate(
    groups: Sequence[ComponentGroup], model: nn.Module, with_bias: bool, overlap: bool
) -> None:
    """Raise `ComponentError` if components overlap unasked, or another module uses a gated parameter.

    Args:
        groups: of a model that they fit.
        model: that one.
        with_bias: biases are gated, too.
        overlap: it is allowed that they overlap.
    """
    owners = _owners(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    claims: dict[int, list[tuple[int, int, int, str]]] = {}
    for group in groups:
        keys = [(group.parameter, group.dimension)]
        keys += [(group.bias, 0)] if group.bias and (with_bias or group.whole) else []
        for key, dimension in keys:
            place = _place(modules[group.module]._parameters[key])
            if len(owners[place]) > 1:
                raise _shared(group, key, owners[place])
            claims.setdefault(place, []).append((dimension, group.offset, group.stop, group.name))
    if not overlap:
        for claim in claims.values():
            _require_disjoint(sorted(claim))
        _require_scopes_apart(groups)


def _place(parameter: nn.Parameter | None) -> int:
    assert parameter is not None
    return parameter.data_ptr() or id(parameter)  # tensors without storage have no address


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that share memory with the one at each address."""
    spans = []
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                start = _place(parameter)
                spans.append((start, start + _extent(parameter), f"{name}.{key}"))
    owners: dict[int, list[str]] = {}
    cluster: list[tuple[int, int, str]] = []
    for span in [*sorted(spans), (2**63, 2**63, "")]:
        if cluster and span[0] >= max(stop for _, stop, _ in cluster):
            names = [name for _, _, name in cluster]
            owners.update((start, names) for start, _, _ in cluster)
            cluster = []
        cluster.append(span)
    return owners


def _extent(parameter: Tensor) -> int:
    """Bytes from the first number of a tensor to its last."""
    if not parameter.data_ptr() or not parameter.numel():
        return 1
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    return (last + 1) * parameter.element_size()


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


_SEPARATE = (
    "choose one kind per layer (sets of different layers are joined with +), or allow it: "
    'find_components(..., overlap=True), in a spec "overlap": true'
)


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
    if group.side == "output" and group.bias is None and group.parameter == "weight":
        _require_no_hidden_bias(group, module)


def _require_no_hidden_bias(group: ComponentGroup, module: nn.Module | None) -> None:
    """A bias that is computed, or a buffer, would stay when it should go."""
    if isinstance(getattr(module, "bias", None), Tensor):
        raise ComponentError(
            f"{group.module} has a bias that is not a parameter of its own",
            expected="a parameter, or no bias",
            got="a buffer or a parametrisation",
            todo="remove parametrisations first (torch.nn.utils.parametrize.remove_parametrizations)",
        )


def _require_side(group: ComponentGroup, module: nn.Module | None) -> None:
    """In the layers whose layout is known, rows are outputs and columns inputs."""
    if group.side not in ("output", "input"):
        raise ComponentError(
            f"{group.name}: unknown side", expected="'output' or 'input'", got=repr(group.side)
        )
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
