"""YAML texts as plain values: the core of YAML 1.2, whose every mistake is one line that names its origin."""

from __future__ import annotations

import re
from typing import Any

import yaml

from bootvit.errors import UserError

MOST_VALUES = 100_000  # in one file, aliases written out: nine lines of them can stand for gigabytes


# what YAML 1.1 sees in plain texts and 1.2 sees otherwise, or not at all
NOT_PLAIN = ("int", "float", "timestamp", "merge", "value")
HASH = "\uf023"  # of Unicode's private area: stands for a `#` that begins no comment


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number; dates, `12:30` and `0777` are no other type than they look."""


class _LoaderWithoutComments(_Loader):
    """The same for a value of the command line, where `#` is a character like others."""

    def construct_scalar(self, node: Any) -> str:
        """The text, with `#` where it was."""
        return str(super().construct_scalar(node)).replace(HASH, "#")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag.rsplit(":", 1)[-1] not in NOT_PLAIN]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"the key {key!r} is given twice, line {node.start_mark.line + 1}")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, origin: str, *, comments: bool = True) -> Any:
    """Parse YAML to mappings with text keys, lists, texts, numbers, booleans and None.

    A mistake in it, and any other type of YAML's, is a `UserError` that names `origin`. Without `comments` a `#` is
    a character like others.
    """
    try:
        value = (
            yaml.load(text, Loader=_Loader)
            if comments
            else yaml.load(text.replace("#", HASH), Loader=_LoaderWithoutComments)
        )
        count_values(value, origin)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as err:  # PyYAML raises more than its own
        message = " ".join(str(err).replace(HASH, "#").split())[:300]
        raise UserError(f"{origin}: not valid YAML: {message}") from err
    except RecursionError:
        raise UserError(f"{origin}: not valid YAML: nested too deeply") from None
    return value


def count_values(value: Any, origin: str, key: str = "") -> int:
    """The number of values, aliases written out; `UserError` for too many of them and for types that JSON lacks."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise UserError(f"{origin}: {key}{name}: a key is a text; write {str(name)!r} in quotes")
        parts = [(f"{key}{name}.", part) for name, part in value.items()]
    elif isinstance(value, list):
        parts = [(f"{key}{number}.", part) for number, part in enumerate(value)]
    elif value is None or isinstance(value, str | int | float | bool):
        return 1
    else:
        raise UserError(f"{origin}: {key.rstrip('.')}: YAML's type {type(value).__name__!r} is no value of a config")
    total = 1
    for name, part in parts:
        total += count_values(part, origin, name)
        if total > MOST_VALUES:
            raise UserError(f"{origin}: {key.rstrip('.')}: more than {MOST_VALUES} values, aliases written out")
    return total
