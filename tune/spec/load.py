"""How a sweep file, what it extends and refers to, and overrides become one checked `Sweep`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bootvit.config import (
    Config,
    find_beside,
    find_config,
    layers,
    leaves,
    merge,
    nest,
    origin_of,
    parse_override,
    read_layers,
    suggest,
    validate,
    whole,
    with_overrides,
)
from bootvit.errors import UserError
from bootvit.load import load_config, make_config
from tune.spec.domain import DOMAINS, Domain
from tune.spec.schema import Sweep, SweepFile

FORBIDDEN = {
    "name": "every trial has its own name",
    "seed": "use `seeds: [0, 1, 2]`",
    "ray": "it says where trials run, not what they compute; use `resources`",
    "checkpoint": "it says what is kept of a run, not what it computes",
    "tracking": "it says where trials are recorded, not what they compute",
    "data.held_out": "trials that hold out different images cannot be compared",
}
HELD_OUT = 0.1  # where neither the base nor the sweep says how many images selection needs


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep file; keys of its own schema are the sweep's, all others the base config's.

    Raises `UserError` for a missing file, an unknown key, a wrong type or a value that fits no trial.
    """
    path = find_config(name)
    data = read_layers(path)
    if isinstance(data.get("base"), str):
        data["base"] = str(_base_path(path, data["base"]))
    origins: dict[str, str] = {}
    for_base = []
    for text in overrides:
        if is_own(text):
            key, value = parse_own(text)
            data = merge(data, nest(key, value))
            origins[key] = origin_of(text)
        else:
            for_base.append(text)
    if isinstance(data.get("space"), dict):
        data["space"] = flatten_space(data["space"])
        check_words(data["space"], path)
    if isinstance(data.get("set"), dict):
        data["set"] = leaves(data["set"])
    file = _validate(data, str(path), origins)
    for text in for_base:
        key, _ = parse_override(text)
        if key in file.space:
            raise UserError(f"{origin_of(text)}: the sweep searches {key}; change space.{key} instead")
    for key in file.set:
        if key in file.space:
            raise UserError(f"{path}: set.{key}: the sweep searches this key; remove it from one of the two")
    sweep = Sweep(file, _base_config(path, file, for_base), path)
    check_keys(sweep)
    return sweep


def is_own(text: str) -> bool:
    """Whether an override is the sweep's own and not its base's."""
    return text.partition("=")[0].split(".")[0] in SweepFile.model_fields


def parse_own(text: str) -> tuple[str, Any]:
    """An override of the sweep's own schema; what `set` holds are keys of the base."""
    if not text.startswith("set."):
        return parse_override(text, SweepFile)
    key, value = parse_override(text.removeprefix("set."))
    return f"set.{key}", value


def _base_config(path: Path, file: SweepFile, overrides: Sequence[str]) -> Config:
    """The base with `set` and the command line's keys; without a held-out part a sweep could select nothing."""
    data = whole(load_config(file.base))
    for key, value in file.set.items():
        data = merge(data, nest(key, value))
    data, origins = with_overrides(data, overrides)
    origins = dict.fromkeys(file.set, f"{path}: set") | origins
    if isinstance(data["data"], dict) and data["data"].get("held_out") == 0:
        data["data"]["held_out"] = HELD_OUT
    return make_config(data, file.base, origins)


def _validate(data: dict[str, Any], origin: str, origins: dict[str, str]) -> SweepFile:
    """The file as a `SweepFile`; a key with one domain is not told that it was taken as a list of one."""
    try:
        return validate(SweepFile, data, origin, origins)
    except UserError as err:
        raise UserError(re.sub(r"(\bspace\.[^\s=]*?)\.0(?=[.=])", r"\1", str(err))) from err


def _base_path(path: Path, base: str) -> Path:
    """Where `base` of a sweep file is: beside the file that says so, else a shipped config."""
    says = [layer.path for layer in layers(path) if "base" in layer.data][-1]
    return find_beside(says, "base", base)


def flatten_space(space: dict[str, Any]) -> dict[str, Any]:
    """`{data: {fraction: {grid: ...}}}` as `{data.fraction: {grid: ...}}`; a key set to null is taken out, and
    one domain becomes a list of one.
    """
    out: dict[str, Any] = {}

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if value is None:
                out.pop(prefix + key, None)
            elif isinstance(value, dict) and not set(value) & {*DOMAINS, "when"} and _all_mappings(value):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, dict):
                out[prefix + key] = merge(out.get(prefix + key, {}), value)
            else:
                out[prefix + key] = value

    walk(space, "")
    return {key: value if isinstance(value, list) else [value] for key, value in out.items()}


def check_words(space: dict[str, list[Any]], path: Path) -> None:
    """Name a misspelt word of a domain before the schema says only that it does not fit."""
    for key, domains in space.items():
        if not domains:
            raise UserError(f"{path}: space.{key} is empty: give a domain, such as grid: [0.1, 1]")
        words = [word for domain in domains if isinstance(domain, dict) for word in domain]
        unknown = [word for word in words if word not in Domain.model_fields]
        if unknown:
            raise UserError(f"{path}: space.{key}: unknown word {unknown[0]!r}; known: {', '.join(DOMAINS)}, when")


def _all_mappings(value: dict[str, Any]) -> bool:
    return bool(value) and all(isinstance(part, dict) or part is None for part in value.values())


def check_keys(sweep: Sweep) -> None:
    """Refuse keys that cannot be searched, grouped by, or asked for in `when`."""
    for key, domain in sweep.file.domains:
        for forbidden, reason in FORBIDDEN.items():
            if key == forbidden or key.startswith(f"{forbidden}."):
                raise UserError(f"{sweep.path}: space.{key} cannot be searched: {reason}")
        for other in domain.when:
            if not known(sweep.base, other):
                raise UserError(
                    f"{sweep.path}: space.{key}.when: unknown key {other!r}{suggest(Config, other.split('.'))}"
                )
    for key in sweep.group_by:
        if not known(sweep.base, key):
            raise UserError(f"{sweep.path}: group_by: unknown key {key!r}{suggest(Config, key.split('.'))}")


def known(config: Config, key: str) -> bool:
    """Whether a config has this dotted key."""
    node: Any = config.model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True
