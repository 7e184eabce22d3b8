"""Recipes: how workers on other machines, and spec files, build a task again."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from coar.errors import SpecError
from coar.task import Recipe, Task


def task_factory(function: Callable[..., Task]) -> Callable[..., Task]:
    """Let workers on other machines, and spec files, rebuild the task (decorator).

    The function's import string and its arguments, which must be JSON values, are recorded on the
    task it returns. A parameter called `weights` is not recorded: a study that keeps the weights of a
    model trained on the fly passes their path there.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Task:
        bound = signature.bind(*args, **kwargs)
        task = function(*args, **kwargs)
        # Notebooks and nested functions cannot be imported elsewhere: no recipe, as if undecorated.
        if function.__module__ != "__main__" and "<locals>" not in function.__qualname__:
            arguments = _by_name(bound)
            arguments.pop("weights", None)
            task.recipe = Recipe(f"{function.__module__}:{function.__qualname__}", _require_json(arguments))
        return task

    build.is_task_factory = True  # type: ignore[attr-defined]
    return build


def build_task(recipe: Recipe, weights: str | None = None, allow_import: Sequence[str] | None = None) -> Task:
    """Import a factory and call it.

    Args:
        recipe: what `task_factory` recorded, or a spec file says.
        weights: path of weights that a study kept; given to factories that have such a parameter.
        allow_import: prefixes of modules that may be imported; None allows every module.
    """
    factory = import_object(recipe.factory, allow_import)
    if not getattr(factory, "is_task_factory", False):
        raise SpecError(
            f"{recipe.factory} is not a task factory",
            expected="a function decorated with @coar.task_factory that returns a Task",
            got=type(factory).__name__,
            todo=FACTORY_HELP,
        )
    extra = {"weights": weights} if weights and "weights" in inspect.signature(factory).parameters else {}
    try:
        inspect.signature(factory).bind(**recipe.args, **extra)
    except TypeError as error:
        raise SpecError(f"{recipe.factory} does not take these arguments", got=str(error)) from None
    return factory(**recipe.args, **extra)


FACTORY_HELP = """put the task into a function that others can import:
               @coar.task_factory
               def make_task():            # in a module, for example my_tasks.py
                   return coar.Task(model, dataset)"""


def import_object(name: str, allow_import: Sequence[str] | None = None) -> Any:
    """Import `package.module:object`; running a spec runs the code it names, so prefixes can be set."""
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise SpecError("not an import string", expected="package.module:object", got=repr(name))
    _require_allowed(module, name, allow_import)
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"cannot import {name}",
            got=f"{type(error).__name__}: {error}",
            todo="install it or put its folder on PYTHONPATH",
        ) from error
    # Again where it is defined: an allowed module is no door to what that module imports itself.
    home = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
    _require_allowed(str(home), name, allow_import)
    return found


def _require_allowed(module: str, name: str, allow_import: Sequence[str] | None) -> None:
    if allow_import is not None and not any(_under(module, prefix) for prefix in allow_import):
        raise SpecError(
            f"the spec asks to import {module}",
            expected=f"a module under {', '.join(allow_import) or '(none allowed)'}",
            got=name,
            todo="allow it with --allow-import PREFIX if you trust the spec",
        )


def _under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix.rstrip(".") + ".")


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def _require_json(arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(arguments))
    except (TypeError, ValueError) as error:
        raise SpecError(
            "the arguments of a task factory must be JSON values, so that a spec can hold them",
            expected="numbers, strings, lists, dictionaries",
            got=str(error),
            todo="pass a path or a name, and load the object inside the factory",
        ) from None
