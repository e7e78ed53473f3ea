"""Config files: where they are, what they extend, and overrides on top; still plain mappings, checked by nobody."""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from bootvit.addresses import SECRETS, public, public_address
from bootvit.config.messages import section_of, shown
from bootvit.config.schema import Config
from bootvit.config.text import parse_yaml
from bootvit.errors import UserError
from bootvit.extensions import beside

SHIPPED = Path(__file__).resolve().parent.parent.parent / "configs"


class Layer(NamedTuple):
    """One file of those that a config extends, itself included."""

    path: Path  # resolved
    data: dict[str, Any]  # without `extends`
    extends: list[str]  # as written
    shipped: bool = False  # named as a shipped config, by a file or by one that was


def find_config(name: str, shipped: Path = SHIPPED) -> Path:
    """A path to a YAML file, or the name of a shipped config without its ending."""
    found = Path(name) if is_file(Path(name)) else find_shipped(name, shipped)
    if found is not None:
        return found
    if os.path.lexists(name):
        raise UserError(f"{name}: not a regular file: a config is one, or the name of a shipped one")
    raise UserError(f"{public(name)[:200]}: no such config file{nearest_shipped(name, shipped)}")


def find_shipped(name: str, shipped: Path = SHIPPED) -> Path | None:
    """A shipped config by its name, with or without its ending."""
    return next((path for path in (shipped / f"{name}.yaml", shipped / name) if is_file(path)), None)


def shipped_names(shipped: Path = SHIPPED) -> list[str]:
    """The names of all shipped configs: `digits/joint`, ..."""
    return sorted(path.relative_to(shipped).with_suffix("").as_posix() for path in shipped.rglob("*.yaml"))


def nearest_shipped(name: str, shipped: Path = SHIPPED) -> str:
    """The end of a message on a config that is not there."""
    near = get_close_matches(name.removesuffix(".yaml").removeprefix("configs/"), shipped_names(shipped), n=1)
    return f"; the nearest shipped one is {near[0]!r}" if near else "; `bootvit configs` lists what is shipped"


def layers(path: Path, seen: tuple[Path, ...] = (), *, shipped: bool = False) -> Iterator[Layer]:
    """The files that one extends, and it, in the order in which later ones win.

    Raises `UserError` for a file that cannot be read, is not there, or extends itself.
    """
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path}: cannot be read: {err}") from err
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not {type(data).__name__}")
    parents = _parents_of(data, path)
    for parent in parents:
        target = find_beside(path, "extends", parent)
        yield from layers(target, (*seen, path), shipped=shipped or not is_file(path.parent / parent))
    own = {key: value for key, value in data.items() if key != "extends"}
    if isinstance(own.get("imports"), list):
        own["imports"] = [beside(one, path.parent) if isinstance(one, str) else one for one in own["imports"]]
    yield Layer(path, own, parents, shipped)


def find_beside(path: Path, key: str, name: str) -> Path:
    """What `key` of the file `path` names: a file relative to `path`, else a shipped config; `UserError` if neither."""
    beside = path.parent / name
    found = beside if is_file(beside) else find_shipped(name)
    if found is None:
        raise UserError(
            f"{path}: {key} {public(name)[:200]!r}: neither the file {public(str(beside))[:300]} nor a shipped config "
            f"of that name exists{nearest_shipped(name)}"
        )
    return found


def read_layers(path: Path) -> dict[str, Any]:
    """A YAML file on top of all that it extends."""
    merged: dict[str, Any] = {}
    for layer in layers(path):
        merged = merge(merged, layer.data)
    return merged


def _parents_of(data: dict[str, Any], path: Path) -> list[str]:
    """The files that `extends` names, in order."""
    given = data.get("extends", [])
    parents = [given] if isinstance(given, str) else given
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends={shown(given)}: expected a file's name, or a list of them")
    return list(parents)


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else replaces."""
    out = dict(base)
    for key, value in top.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return out


def nest(key: str, value: Any) -> dict[str, Any]:
    """`a.b.c`, v -> {a: {b: {c: v}}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= leaves(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def flatten(config: BaseModel) -> dict[str, Any]:
    """The same of a checked config or sweep file, without the secrets in addresses."""
    return leaves(config.model_dump(mode="json"))


def read_config(name: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str, dict[str, str]]:
    """A config file with all that it extends and `KEY=VALUE` on top: (values, file, {key: override that gave it})."""
    path = find_config(name)
    data, origins = with_overrides(read_layers(path), overrides)
    return data, str(path), origins


def with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(`data` with `KEY=VALUE` on top, {key: override that gave it}) for configs of one run."""
    origins: dict[str, str] = {}
    for text in overrides:
        key, value = parse_override(text)
        data, origins[key] = merge(data, nest(key, value)), origin_of(text)
    return data, origins


def parse_override(text: str, schema: type[BaseModel] = Config) -> tuple[str, Any]:
    """`KEY=VALUE` -> (key, value).

    The value of a text key is taken as typed (`null` is None where the key may be), any other is read as YAML; a `#`
    begins no comment, and nothing at all is no value.
    """
    key, eq, value = text.partition("=")
    origin = origin_of(text)
    if not eq or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise UserError(f"{origin}: expected KEY=VALUE, such as data.fraction=0.1")
    kinds = leaf_types(schema, key)
    if not value.strip():
        raise UserError(f"{origin}: {key} is empty" + ("; null is none" if types.NoneType in kinds else ""))
    if str in kinds and kinds <= {str, types.NoneType}:
        return key, None if value == "null" and types.NoneType in kinds else value
    return key, parse_yaml(value, origin, comments=False)


def origin_of(text: str) -> str:
    """An override as a place for messages."""
    key, eq, value = text.partition("=")
    return f"override {key + eq + public_address(value)!r}"


def leaf_types(schema: type[BaseModel], key: str) -> set[Any]:
    """The types that a key's value may have, texts of a fixed choice as `str`; empty for an unknown key."""
    section: type[BaseModel] | None = schema
    *path, last = key.split(".")
    for part in path:
        section = section_of(section, part) if section else None
    field = section.model_fields.get(last) if section else None
    return set(_members(field.annotation)) if field else set()


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _members(part)]
    return [type(value) for value in get_args(annotation)] if origin is Literal else [origin or annotation]


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, without the secrets in addresses; `load_config` of it is the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def override(config: Config, changes: dict[str, Any]) -> Config:
    """The same run with some (nested) values changed, checked again."""
    return Config.model_validate_json(json.dumps(merge(whole(config), changes)))


def whole(config: BaseModel) -> dict[str, Any]:
    """A config or a section with the secrets in its addresses: for use in this process, never for writing."""
    return config.model_dump(mode="json", context=SECRETS)
