"""Text of fit files: JSON, or the part of YAML that says the same things, each in one way.

YAML is read as version 1.2 reads plain words: `1e-3` is a number and `no` is text. What could surprise is
refused: keys given twice, aliases (a small file can stand for a huge one), tags, files that are too large.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from coar.errors import SpecError

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 2**20
ENDINGS = {".yaml": "yaml", ".yml": "yaml", ".json": "json"}
_PLAIN = [  # plain words of YAML that are not text, each with the letters that it may start with
    ("tag:yaml.org,2002:null", r"~|null|", ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", r"true|false", list("tf")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
]


def read_text(path: Path) -> Any:
    """The value in a YAML or JSON file.

    Raises:
        SpecError: the file is missing, too large, of another kind, or says one thing twice; it is named.
    """
    kind = _kind(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            got = f"{path.stat().st_size} bytes"
            raise SpecError(
                f"{path} is too large for settings", expected=f"at most {MAX_BYTES} bytes", got=got
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(
            f"{path} is missing", expected="a file with settings", todo="check the path"
        ) from None
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror or error}", todo="check the path") from error
    except UnicodeDecodeError as error:
        raise _unreadable(path, "text in UTF-8", error) from None
    return _parse_yaml(text, path) if kind == "yaml" else _parse_json(text, path)


def write_text(value: Any, path: Path) -> None:
    """Write a plain value; the ending chooses between YAML and JSON."""
    dump = _dump_yaml if _kind(path) == "yaml" else _dump_json
    path.write_text(dump(value), encoding="utf-8")


def _kind(path: Path) -> str:
    if path.suffix.lower() not in ENDINGS:
        raise SpecError(
            f"{path}: what kind of file is it?",
            expected=f"a name ending in {', '.join(ENDINGS)}",
            got=path.name,
        )
    return ENDINGS[path.suffix.lower()]


def _unreadable(path: Path, expected: str, error: object) -> SpecError:
    return SpecError(f"{path} cannot be read", expected=expected, got=" ".join(str(error).split())[:200])


def _twice(path: Path, key: object, line: int | None = None) -> SpecError:
    where = f" (line {line})" if line else ""
    return SpecError(f"{path}: key {key!r} is given twice{where}", expected="each key once", got="two values")


def _parse_json(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _twice(path, key)
            found[key] = value
        return found

    def refuse(word: str) -> NoReturn:
        raise _unreadable(path, "finite numbers", word)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except SpecError:
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "JSON", error) from None


def _dump_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=_loader(path))  # a SafeLoader that accepts less
    except SpecError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _unreadable(path, "YAML", error) from None


def _loader(path: Path) -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as its base has it

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or event.tag:
                what = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else event.tag
                raise _unreadable(path, "no aliases, no tags", f"{what}, line {event.start_mark.line + 1}")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                    raise _unreadable(path, "keys that are words", f"{key!r}, line {line}")
                if key in seen:
                    raise _twice(path, key, line)
                seen.add(key)
            return super().construct_mapping(node, deep)

    _add_plain(Loader)
    # Numbers of YAML 1.1 may be octal or sexagesimal; these are what they look like.
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value))
    return Loader


def _dump_yaml(value: Any) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text that either version of YAML would take for something else."""

        yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

        def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - written out again
            return True

    _add_plain(Dumper)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _add_plain(kind: Any) -> None:
    for tag, pattern, starts in _PLAIN:
        kind.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), starts)
