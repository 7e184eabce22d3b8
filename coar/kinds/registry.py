"""component_rule: how a kind of component is declared, and how its rule is found for a module."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from coar.component_group import ComponentGroup
from coar.errors import ComponentError

Rule = Callable[[str, nn.Module], list[ComponentGroup]]
RULES: dict[str, dict[str, Rule]] = {}  # kind -> pattern of qualified class names -> rule


def component_rule(kind: str, *classes: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Declare how modules of some classes are cut into components of a kind (decorator).

    Args:
        kind: a singular name, for example "conv_filter".
        classes: the classes themselves, or their qualified names such as
            "torch.nn.modules.linear.Linear" (so that a library need not be imported), or patterns of
            names such as "transformers.*Attention". They are looked up along a module's method
            resolution order, so subclasses are found too; the nearest class wins, and there the
            longest pattern.

    The function gets a module's name and the module, and returns a list of its groups, all of this
    kind: an empty one, where this module has no such component.

    Raises:
        ComponentError: no class, or a name that is not qualified.

    >>> @component_rule("scale", "my_package.layers.Scale")
    ... def scales(name, module):
    ...     return [ComponentGroup(name, "scale", name, "factors", dimension=0, count=len(module.factors))]
    >>> RULES.pop("scale")["my_package.layers.Scale"] is scales
    True
    """
    names = [_qualified(kind, name) for name in classes]
    if not names:
        raise ComponentError(f"a rule for {kind!r} needs a class", expected="component_rule(kind, Class)")

    def register(rule: Rule) -> Rule:
        RULES.setdefault(kind, {}).update(dict.fromkeys(names, rule))
        return rule

    return register


def _qualified(kind: str, name: str | type[nn.Module]) -> str:
    if isinstance(name, type):
        return f"{name.__module__}.{name.__qualname__}"
    if not isinstance(name, str) or not ("." in name or "*" in name):
        raise ComponentError(
            f"a rule for {kind!r} is for classes",
            expected="a class, its qualified name such as 'my_layers.Scale', or a pattern of names",
            got=repr(name),
        )
    return name


def apply_rule(kind: str, name: str, module: nn.Module) -> list[ComponentGroup]:
    """Groups of a kind in a module; none where no rule knows it.

    Raises:
        ComponentError: the rule returns something else than groups of its kind.
    """
    rule = rule_for(kind, module)
    found = rule(name, module) if rule else []
    groups = isinstance(found, list) and all(isinstance(group, ComponentGroup) for group in found)
    if not groups or any(group.kind != kind for group in found):
        raise ComponentError(
            f"the rule for {kind!r} in {type(module).__name__} returns something else",
            expected=f"a list of ComponentGroup of kind {kind!r}",
            got=", ".join(group.kind for group in found) if groups else type(found).__name__,
            todo=f"look at {getattr(rule, '__qualname__', rule)}",
        )
    return found


def rule_for(kind: str, module: nn.Module) -> Rule | None:
    """The rule of a kind for a module, by the nearest class that has one."""
    for base in type(module).__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        fitting = [pattern for pattern in RULES[kind] if fnmatchcase(name, pattern)]
        if fitting:
            return RULES[kind][max(fitting, key=len)]
    return None


def class_names(kind: str) -> list[str]:
    """Class names that a kind knows, without their packages, for messages."""
    return sorted({name if "*" in name else name.rsplit(".", 1)[1] for name in RULES[kind]})
