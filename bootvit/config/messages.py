"""A mapping as a checked schema, and the one line that a mistake in it gets."""

from __future__ import annotations

import json
import math
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from bootvit.addresses import public, public_address
from bootvit.errors import UserError

SHOWN = 80  # characters of a value in a message
LARGEST = 2**53  # of a whole number: more than any count, and exact as a float
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
        section = section_of(section, part) if section else None
    siblings = list(section.model_fields) if section else []
    every = all_keys(schema)
    elsewhere = [key for key in every if key.split(".")[-1] == path[-1]]
    near = get_close_matches(path[-1], siblings, n=1)
    best = elsewhere or [".".join([*path[:-1], key]) for key in near] or get_close_matches(".".join(path), every, n=1)
    return f", did you mean {best[0]!r}?" if best else f"; known here: {', '.join(siblings)}"


def section_of(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = schema.model_fields.get(name)
    options = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((t for t in options if isinstance(t, type) and issubclass(t, BaseModel)), None)


def all_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a schema, leaves only."""
    keys: list[str] = []
    for name in schema.model_fields:
        section = section_of(schema, name)
        keys += all_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys


def shown(value: Any) -> str:
    """A value for a message, without passwords, and cut where it is long."""
    text = json.dumps(public_address(value) if isinstance(value, str) else value, default=str)
    text = public(text)  # before it is cut: a half address is not known as one
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
