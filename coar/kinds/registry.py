"""component_rule: how a kind of component is declared, and how its rule is found for a module."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from coar.components import ComponentGroup

Rule = Callable[[str, nn.Module], list[ComponentGroup]]
RULES: dict[str, dict[str, Rule]] = {}  # kind -> pattern of qualified class names -> rule


def component_rule(kind: str, *class_names: str) -> Callable[[Rule], Rule]:
    """Declare how modules of some classes are cut into components of a kind (decorator).

    Args:
        kind: a singular name, for example "conv_filter".
        class_names: qualified class names such as "torch.nn.modules.linear.Linear", or patterns of them
            such as "transformers.*Attention". They are looked up along a module's method resolution
            order, so subclasses are found too; the nearest class wins, and there the longest pattern.

    The function gets a module's name and the module, and returns its groups: none, where this module
    has no such component.

    >>> @component_rule("scale", "my_package.layers.Scale")
    ... def scales(name, module):
    ...     return [ComponentGroup(name, "scale", name, "factors", dimension=0, count=len(module.factors))]
    >>> RULES.pop("scale")["my_package.layers.Scale"] is scales
    True
    """

    def register(rule: Rule) -> Rule:
        RULES.setdefault(kind, {}).update(dict.fromkeys(class_names, rule))
        return rule

    return register


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
