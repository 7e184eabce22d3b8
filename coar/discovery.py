"""find_components: which parts of a model are components of which kind.

Rules are keyed by the qualified names of module classes and found along a module's method
resolution order, so that subclasses are recognised and no library needs to be imported for a rule
to exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError

Rule = Callable[[str, nn.Module], list[ComponentGroup]]
_RULES: dict[str, dict[str, Rule]] = {}  # kind -> qualified class name -> rule


def component_rule(kind: str, *class_names: str) -> Callable[[Rule], Rule]:
    """Declare how modules of some classes are cut into components of a kind (decorator).

    Args:
        kind: a singular name, for example "conv_filter".
        class_names: qualified class names, for example "torch.nn.modules.linear.Linear".

    The function gets a module's name and the module, and returns its groups.
    """

    def register(rule: Rule) -> Rule:
        _RULES.setdefault(kind, {}).update(dict.fromkeys(class_names, rule))
        return rule

    return register


def kinds() -> list[str]:
    """All component kinds that have rules.

    >>> "conv_filter" in kinds()
    True
    """
    return sorted(_RULES)


def find_components(
    model: nn.Module,
    kinds: Sequence[str] = ("conv_filter",),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> ComponentSet:
    """List the components of a model.

    Args:
        model: any torch model; it is only read.
        kinds: which kinds of components: "conv_filter", "neuron" (units of Linear layers), or your own.
        include: patterns (`*`, `?`, `[...]`) for module names; a module counts if any matches.
        exclude: patterns of modules to leave out.

    Returns:
        The components in the order of the model's modules.

    Raises:
        ComponentError: an unknown kind, nothing found, an included module without a rule, or two
            modules that share one parameter.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> len(find_components(model))
    6
    """
    _require_known(kinds)
    modules = {name: m for name, m in model.named_modules() if _matches(name, include, exclude)}
    last_linear = _classifier(model)
    groups, left_out = [], []
    for name, module in modules.items():
        for kind in kinds:
            found = _apply_rules(kind, name, module)
            if found and kind == "neuron" and name == last_linear and not _named(name, include):
                left_out.append(name)
            else:
                groups.extend(found)
    selection = {"kinds": list(kinds), "include": list(include), "exclude": list(exclude)}
    components = ComponentSet(groups, left_out, selection)
    _require_found(components, modules, kinds, include)
    components.require_fits(model)
    components.require_separate(model)
    return components


@component_rule(
    "conv_filter",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
)
def _conv_filters(name: str, module: nn.Module) -> list[ComponentGroup]:
    bias = "bias" if module.bias is not None else None
    return [ComponentGroup(name, "conv_filter", name, "weight", 0, int(module.out_channels), bias=bias)]  # type: ignore[arg-type]


@component_rule("neuron", "torch.nn.modules.linear.Linear")
def _linear_neurons(name: str, module: nn.Module) -> list[ComponentGroup]:
    bias = "bias" if module.bias is not None else None
    return [ComponentGroup(name, "neuron", name, "weight", 0, int(module.out_features), bias=bias)]  # type: ignore[arg-type]


def _apply_rules(kind: str, name: str, module: nn.Module) -> list[ComponentGroup]:
    for base in type(module).__mro__:
        rule = _RULES[kind].get(f"{base.__module__}.{base.__qualname__}")
        if rule:
            return rule(name, module)
    return []


def _classifier(model: nn.Module) -> str | None:
    """Name of the last Linear: ablating its units removes classes, not parts of the computation."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _matches(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


def _named(name: str, include: Iterable[str]) -> bool:
    return any(pattern != "*" and fnmatchcase(name, pattern) for pattern in include)


def _require_known(kinds: Sequence[str]) -> None:
    if isinstance(kinds, str):
        raise ComponentError("kinds is a list", expected=f"[{kinds!r}]", got=repr(kinds))
    for kind in kinds:
        if kind not in _RULES:
            raise ComponentError(
                "unknown component kind",
                expected=f"one of: {', '.join(sorted(_RULES))}",
                got=repr(kind),
                todo="or declare your own with coar.discovery.component_rule",
            )


def _require_found(
    components: ComponentSet, modules: dict[str, nn.Module], kinds: Sequence[str], include: Sequence[str]
) -> None:
    covered = {group.module for group in components} | set(components.left_out)
    for pattern in (p for p in include if p != "*"):
        matching = [name for name in modules if fnmatchcase(name, pattern)]
        if not covered & set(matching):
            seen = {f"{name} ({type(modules[name]).__name__})" for name in matching}
            _refuse_nothing(f"include pattern {pattern!r} finds no component", sorted(seen), kinds)
    if not len(components):
        owners = {type(m).__name__ for m in modules.values() if m._parameters}
        _refuse_nothing("no component found", sorted(owners), kinds, components.left_out)


def _kinds_of(seen: list[str], kinds: Sequence[str]) -> list[str]:
    """Other kinds that know one of the classes seen."""
    found = [kind for kind in sorted(_RULES) if kind not in kinds]
    return [kind for kind in found if {name.rsplit(".", 1)[1] for name in _RULES[kind]} & set(seen)]


def _refuse_nothing(what: str, seen: list[str], kinds: Sequence[str], left_out: Sequence[str] = ()) -> None:
    classes = sorted({name.rsplit(".", 1)[1] for kind in kinds for name in _RULES[kind]})
    raise ComponentError(
        what,
        expected=f"layers with {', '.join(kinds)}: {', '.join(classes)}",
        got=", ".join(seen[:8]) or "no module of that name",
        todo=f"the last Linear is left out unless it is named: include={list(left_out)}"
        if left_out
        else f"try kinds={others}"
        if (others := _kinds_of(seen, kinds))
        else "choose other kinds or patterns, or add a layer type with coar.discovery.component_rule",
    )
