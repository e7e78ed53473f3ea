"""How files, what they extend, and overrides become one checked `Config`; and the line that a mistake gets."""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bootvit.addresses import SECRETS, public, public_address
from bootvit.config.schema import Config
from bootvit.config.text import parse_yaml
from bootvit.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent.parent / "configs"
SHOWN = 80  # characters of a value in a message
LARGEST = 2**53  # of a whole number: more than any count, and exact as a float
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "wasb", "hdfs", "viewfs", "hf", "file", "http", "https")


def find_config(name: str, shipped: Path = SHIPPED) -> Path:
    """A path to a YAML file, or the name of a shipped config without its ending."""
    for path in (Path(name), shipped / f"{name}.yaml", shipped / name):
        if is_file(path):
            return path
    known = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
    near = get_close_matches(name.removesuffix(".yaml").removeprefix("configs/"), known, n=1)
    if os.path.lexists(name):
        raise UserError(f"{name}: not a regular file: a config is one, or the name of a shipped one")
    raise UserError(
        f"{public(name)[:200]}: no such config file" + (f"; the nearest shipped one is {near[0]!r}" if near else "")
    )


def read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file on top of the files that it `extends` (relative to itself, later ones win)."""
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
    merged: dict[str, Any] = {}
    for parent in parents_of(data, path):
        target = path.parent / parent
        if not is_file(target):
            raise UserError(f"{path}: extends {public(parent)[:200]!r}, but {public(str(target))[:300]} does not exist")
        merged = merge(merged, read_layers(target, (*seen, path)))
    return merge(merged, {key: value for key, value in data.items() if key != "extends"})


def parents_of(data: dict[str, Any], path: Path) -> list[str]:
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


def shown(value: Any) -> str:
    """A value for a message, without passwords, and cut where it is long."""
    text = json.dumps(public_address(value) if isinstance(value, str) else value, default=str)
    text = public(text)  # before it is cut: a half address is not known as one
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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
        section = _section(section, part) if section else None
    field = section.model_fields.get(last) if section else None
    return set(_members(field.annotation)) if field else set()


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _members(part)]
    return [type(value) for value in get_args(annotation)] if origin is Literal else [origin or annotation]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check; relative places are resolved against the current folder.

    Raises `UserError` for a missing file, an unknown key, a wrong type or an impossible value.
    """
    path = find_config(name)
    data = read_layers(path)
    origins: dict[str, str] = {}
    for text in overrides:
        key, value = parse_override(text)
        data = merge(data, nest(key, value))
        origins[key] = origin_of(text)
    return make_config(data, str(path), origins)


def make_config(data: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> Config:
    """Check a merged mapping, resolve its places and check that the models it describes can be built."""
    from bootvit.models.zoo import check_models

    config = validate(Config, data, origin, origins or {})
    check_places(config, origin, origins or {})
    try:
        config = absolute(config)
    except (OSError, RuntimeError, ValueError) as err:  # a home that nobody has, a loop of links, a NUL byte
        raise UserError(f"{origin}: a path in it cannot be resolved: {err}") from err
    try:
        check_models(config)
    except UserError as err:
        raise UserError(f"{origin}: {err}") from err
    return config


def absolute(config: Config) -> Config:
    """Resolve the places that are relative to where the command was started: Ray changes a worker's folder."""
    places: dict[str, Any] = {"ray": {"storage_path": _place(config.ray.storage_path)}}
    if config.data.root is not None:
        places["data"] = {"root": _place(config.data.root)}
    weights = {
        net: {"weights": _place(given)}
        for net, given in (("vit", config.model.vit.weights), ("agent", config.model.agent.weights))
        if given not in (None, "timm")
    }
    return override(config, places | ({"model": weights} if weights else {}))


def _place(path: str | None) -> str:
    if path is not None and "://" in path:  # refused where it is used
        return path
    return str(Path(path or ".").expanduser().resolve())


def check_places(config: Config, origin: str, origins: dict[str, str]) -> None:
    """Refuse places that would silently become others: addresses, and a link to a folder that is not there."""
    for key, value in (("ray.storage_path", config.ray.storage_path), ("data.root", config.data.root)):
        scheme, colon, rest = (value or "").partition(":")
        if colon and (scheme.lower() in STORES or (rest.startswith("/") and re.fullmatch(r"[A-Za-z][\w+.-]*", scheme))):
            raise UserError(
                f"{place_of(key, origin, origins)}: {key}={value}: addresses of object stores are not supported yet; "
                "give the path of a folder" + (" that every node sees" if key == "ray.storage_path" else "")
            )
    storage = Path(os.path.expanduser(config.ray.storage_path))
    broken = next((p for p in (storage, *storage.parents) if os.path.islink(p) and not os.path.exists(p)), None)
    if broken is not None:
        place = place_of("ray.storage_path", origin, origins)
        raise UserError(f"{place}: ray.storage_path={config.ray.storage_path}: {broken} is a link that leads nowhere")


def override(config: Config, changes: dict[str, Any]) -> Config:
    """The same run with some (nested) values changed, checked again."""
    return Config.model_validate_json(json.dumps(merge(whole(config), changes)))


def whole(config: BaseModel) -> dict[str, Any]:
    """A config or a section with the secrets in its addresses: for use in this process, never for writing."""
    return config.model_dump(mode="json", context=SECRETS)


T = TypeVar("T", bound=BaseModel)


def validate(schema: type[T], data: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> T:
    """`data` as `schema`; the first mistake becomes one line that names its place, key and value."""
    check_values(data, origin, origins or {})
    try:
        return schema.model_validate_json(json.dumps(data))
    except ValidationError as err:
        raise UserError(explain(err, schema, origin, origins or {})) from err


def explain(err: ValidationError, schema: type[BaseModel], origin: str, origins: dict[str, str]) -> str:
    """One line for a validation error: an unknown key first, since it often explains the others."""
    errors = sorted(err.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = errors[0]
    path = [str(part) for part in first["loc"] if not _is_union_arm(str(part))]
    key = ".".join(path)
    place = place_of(key, origin, origins)
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key {key!r}{suggest(schema, path)}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        reason = "expected a text: write it in quotes"
    return f"{place}: {key}={shown(first['input'])}: {reason}" if key else f"{place}: {reason}"


def place_of(key: str, origin: str, origins: dict[str, str]) -> str:
    """The override that gave a key, or a key above or below it; else the file."""
    related = (o for k, o in origins.items() if key == k or key.startswith(f"{k}.") or k.startswith(f"{key}."))
    return next(related, origin)


def check_values(value: Any, origin: str, origins: dict[str, str], key: str = "") -> None:
    """Refuse values that no key can have, and that would fail far from here, if at all."""
    if isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(part, origin, origins, f"{key}.{name}" if key else str(name))
        return
    reason = _no_value(value)
    if reason:
        raise UserError(f"{place_of(key, origin, origins)}: {key}={shown(value)}: {reason}")


def _no_value(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "a number must be finite"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a whole number is at most {LARGEST}"
    if not isinstance(value, str):
        return None
    if not value.strip():
        return "is empty"
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        return "a text must be Unicode (UTF-8), and hold no NUL"
    return None


def _is_union_arm(part: str) -> bool:
    return "[" in part or part.startswith("constrained-") or part in ("int", "float", "str", "bool")


def suggest(schema: type[BaseModel], path: list[str]) -> str:
    """The nearest key: of the same name elsewhere, else among its siblings, else anywhere in the schema."""
    section: type[BaseModel] | None = schema
    for part in path[:-1]:
        section = _section(section, part) if section else None
    siblings = list(section.model_fields) if section else []
    every = all_keys(schema)
    elsewhere = [key for key in every if key.split(".")[-1] == path[-1]]
    near = get_close_matches(path[-1], siblings, n=1)
    best = elsewhere or [".".join([*path[:-1], key]) for key in near] or get_close_matches(".".join(path), every, n=1)
    return f", did you mean {best[0]!r}?" if best else f"; known here: {', '.join(siblings)}"


def _section(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = schema.model_fields.get(name)
    options = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((t for t in options if isinstance(t, type) and issubclass(t, BaseModel)), None)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, leaves only."""
    keys: list[str] = []
    for name in schema.model_fields:
        section = _section(schema, name)
        keys += all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def flatten(config: BaseModel) -> dict[str, Any]:
    """{dotted key: value}, leaves only, without the secrets in addresses."""
    out: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                out[f"{prefix}{key}"] = value

    walk(config.model_dump(mode="json"), "")
    return out


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, without the secrets in addresses; `load_config` of it is the same run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)
