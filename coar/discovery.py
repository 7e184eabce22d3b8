"""find_components: which parts of a model are components of which kind.

The rules are in `coar.kinds`; here they are applied to the modules of a model, and what nobody means
by "all neurons" (the final classifier) is left out unless it is named.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

import coar.kinds  # noqa: F401  registers the rules
from coar.components import ComponentGroup, ComponentSet
from coar.errors import ComponentError, SettingError
from coar.kinds.heads import output_heads
from coar.kinds.registry import RULES, apply_rule, class_names, component_rule

__all__ = ["PUBLISHED", "component_rule", "find_components", "kinds"]


@dataclass(frozen=True)
class Preset:
    """Arguments of `find_components` that give a published set of components."""

    kinds: tuple[str, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


# The sets of the COAR paper's released code. Its rule for filters is "conv" in the module's name, which
# leaves torchvision's shortcut convolutions (downsample.0) out; its GPT-2 set is rows of (in, out) weights.
PUBLISHED = {
    "cifar_resnet": Preset(("conv_filter",), include=("*conv*",)),
    "resnet50": Preset(("conv_filter",), include=("*conv*",)),
    "vit_b_16": Preset(("neuron",), exclude=("heads*",)),
    "gpt2": Preset(("conv1d_input_row",)),
}


def kinds() -> list[str]:
    """All component kinds that have rules.

    >>> "conv_filter" in kinds()
    True
    """
    return sorted(RULES)


def find_components(
    model: nn.Module,
    kinds: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    published: str | None = None,
    overlap: bool = False,
) -> ComponentSet:
    """List the components of a model.

    Args:
        model: any torch model; it is only read.
        kinds: which kinds of components, for example `["attention_head", "mlp_neuron"]`; default
            `["conv_filter"]`. See `coar.discovery.kinds()` and docs/components.md.
        include: patterns (`*`, `?`, `[...]`) for module names; a module counts if any matches.
        exclude: patterns of modules to leave out.
        published: "cifar_resnet", "resnet50", "vit_b_16" or "gpt2": the set of components that the
            COAR paper's code uses for that network, in place of the three arguments above.
        overlap: allow components that lie in each other, such as heads and the neurons of their
            values; where several gates act on one number, all of them count.

    Returns:
        The components, in the order of the modules that the rules are for. The final classifier and
        tied output heads are no neurons unless an `include` pattern other than "*" names them.

    Raises:
        ComponentError: an unknown kind, nothing found, an included module without a rule, components
            that overlap, or two modules that share one parameter.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> len(find_components(model))
    6
    """
    if not isinstance(model, nn.Module):
        raise ComponentError("the model is not a torch model", expected="nn.Module", got=repr(model)[:80])
    chosen = _chosen(kinds, include, exclude, published)
    _require_known(chosen.kinds)
    modules = dict(model.named_modules())
    heads = output_heads(model) if "neuron" in chosen.kinds else set()
    groups, left_out, covered = [], [], set()
    for name, module in modules.items():
        for kind in () if _matches(name, chosen.exclude) else chosen.kinds:  # an excluded one cannot fail
            for group in _selected(apply_rule(kind, name, module), name, chosen):
                covered |= {name, *_places(group)}
                if kind == "neuron" and name in heads and not _named(group, name, chosen.include):
                    left_out.append(name)
                else:
                    groups.append(group)
    groups = _told_apart(groups)
    selection = {
        "kinds": list(chosen.kinds),
        "include": list(chosen.include),
        "exclude": list(chosen.exclude),
    }
    components = ComponentSet(groups, left_out, selection | ({"overlap": True} if overlap else {}), overlap)
    _require_found(components, modules, chosen, covered)
    components.require_fits(model)
    components.require_separate(model)
    return components


def _chosen(
    kinds: Sequence[str] | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    published: str | None,
) -> Preset:
    if published is None:
        for name, patterns in (("kinds", kinds), ("include", include), ("exclude", exclude)):
            if isinstance(patterns, str):
                raise ComponentError(f"{name} is a list", expected=f"[{patterns!r}]", got=repr(patterns))
        found = Preset(tuple(kinds or ()) if kinds is not None else ("conv_filter",))
        include = ("*",) if include is None else include
        return Preset(found.kinds, tuple(include), tuple(exclude or ()))
    if not (kinds is include is exclude is None):
        raise SettingError(
            "published names a whole set of components",
            expected=f"published={published!r} alone",
            got="kinds, include or exclude beside it",
            todo=f"write the set out: {PUBLISHED.get(published)}",
        )
    if published not in PUBLISHED:
        raise SettingError(
            "unknown published set", expected=f"one of: {', '.join(PUBLISHED)}", got=repr(published)
        )
    return PUBLISHED[published]


def _selected(found: list[ComponentGroup], name: str, chosen: Preset) -> list[ComponentGroup]:
    """Groups whose patterns fit: by their own name, or that of the layer that is cut, or of its module."""

    def fits(group: ComponentGroup, patterns: Iterable[str]) -> bool:
        return any(_matches(place, patterns) for place in (name, group.name, group.module))

    return [group for group in found if fits(group, chosen.include) and not fits(group, chosen.exclude)]


def _places(group: ComponentGroup) -> set[str]:
    return {group.name, group.module, *group.scope}


def _told_apart(groups: list[ComponentGroup]) -> list[ComponentGroup]:
    """Groups of several kinds in one module take their kind into their names."""
    uses = Counter(group.name for group in groups)
    return [
        replace(group, name=f"{group.name}.{group.kind}".lstrip(".")) if uses[group.name] > 1 else group
        for group in groups
    ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _named(group: ComponentGroup, name: str, include: Iterable[str]) -> bool:
    patterns = [pattern for pattern in include if pattern != "*"]
    return _matches(name, patterns) or _matches(group.module, patterns)


def _require_known(kinds: Sequence[str]) -> None:
    for kind in kinds:
        if kind not in RULES:
            raise ComponentError(
                "unknown component kind",
                expected=f"one of: {', '.join(sorted(RULES))}",
                got=repr(kind),
                todo="or declare your own with coar.component_rule",
            )


def _require_found(
    components: ComponentSet, modules: dict[str, nn.Module], chosen: Preset, covered: set[str]
) -> None:
    for pattern in (p for p in chosen.include if p != "*"):
        if not any(fnmatchcase(name, pattern) for name in covered):
            matching = {name: m for name, m in modules.items() if fnmatchcase(name, pattern)}
            inside = {name: m for name, m in modules.items() if fnmatchcase(name, f"{pattern}.*")}
            found = any(_count(kind, inside) for kind in chosen.kinds)
            hint = f"what lies inside has other names: include=[{pattern + '.*'!r}]" if found else None
            what = f"include pattern {pattern!r} finds no component"
            _refuse_nothing(what, _described(matching), chosen.kinds, hint or _hint(matching, chosen))
    if not chosen.kinds:
        _refuse_nothing("no component found: no kinds are asked for", [], kinds(), _hint({}, chosen))
    present = {group.kind for group in components}
    for kind in chosen.kinds:
        if kind not in present:
            owners = sorted({type(m).__name__ for m in modules.values() if m._parameters})
            what = "no component found" if not len(components) else f"no component of kind {kind!r} found"
            asked = chosen.kinds if not len(components) else (kind,)
            left_out = components.left_out
            hint = f"the last Linear is left out unless it is named: include={list(left_out)}"
            _refuse_nothing(what, owners, asked, hint if left_out else _hint(modules, chosen))


def _described(modules: dict[str, nn.Module]) -> list[str]:
    return sorted(f"{name} ({type(module).__name__})" for name, module in modules.items())


def _hint(modules: dict[str, nn.Module], chosen: Preset) -> str:
    others = ", ".join(_kinds_found(modules, chosen.kinds))
    if others:
        return f"other kinds find components here: {others}; or look at include and exclude"
    every = ", ".join(sorted(RULES))
    return f"choose other patterns or kinds ({every}), or add a layer type with coar.component_rule"


def _kinds_found(modules: dict[str, nn.Module], kinds: Sequence[str]) -> list[str]:
    """Other kinds that find something, each with how many components."""
    counts = {kind: _count(kind, modules) for kind in sorted(set(RULES) - set(kinds))}
    return [f"{kind!r} ({count:,})" for kind, count in counts.items() if count]


def _count(kind: str, modules: dict[str, nn.Module]) -> int:
    count = 0
    for name, module in modules.items():
        with contextlib.suppress(ComponentError):  # one that is refused is not found
            count += sum(group.count for group in apply_rule(kind, name, module))
    return count


def _refuse_nothing(what: str, seen: list[str], kinds: Sequence[str], todo: str) -> None:
    classes = sorted({name for kind in kinds for name in class_names(kind)})
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    raise ComponentError(
        what,
        expected=f"layers with {', '.join(kinds)}: {', '.join(classes[:8])}{more}",
        got=", ".join(seen[:8]) or "no module of that name",
        todo=todo,
    )
