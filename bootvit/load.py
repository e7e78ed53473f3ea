"""A config that can be trained: read, checked, its places resolved, and its models known to be possible."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from bootvit.addresses import public_address, wrong_address, wrong_with
from bootvit.config import Config, flatten, override, place_of, read_config, validate, whole, with_overrides
from bootvit.errors import UserError
from bootvit.extensions import beside, import_all, named
from bootvit.models.checks import check_models

# a folder may be named with a colon, but what begins so is meant as an address
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "wasb", "hdfs", "viewfs", "hf", "file", "http", "https")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check; relative places are resolved against the current folder.

    Raises `UserError` for a missing file, an unknown key, a wrong type or an impossible value.
    """
    return make_config(*read_config(name, overrides))


def make_config(data: dict[str, Any], origin: str, origins: dict[str, str] | None = None) -> Config:
    """Check a merged mapping, resolve its places and check that the models it describes can be built."""
    config = validate(Config, data, origin, origins or {})
    check_places(config, origin, origins or {})
    try:
        config = absolute(config)
    except (OSError, RuntimeError, ValueError) as err:  # a home that nobody has, a loop of links, a NUL byte
        raise UserError(f"{origin}: a path in it cannot be resolved: {err}") from err
    try:
        import_all(config.imports)
        for function in config.on_epoch:
            named("on_epoch", function)
        check_models(config)
    except UserError as err:
        raise UserError(f"{origin}: {err}") from err
    return config


def absolute(config: Config) -> Config:
    """Resolve the places that are relative to where the command was started: Ray changes a worker's folder."""
    places: dict[str, Any] = {"ray": {"storage_path": _place(config.ray.storage_path)}}
    if config.data.root is not None:
        places["data"] = {"root": _place(config.data.root)}
    if config.imports:
        places["imports"] = [beside(given, Path()) for given in config.imports]
    weights = {
        net: {"weights": _place(given)}
        for net, given in (("vit", config.model.vit.weights), ("agent", config.model.agent.weights))
        if given not in (None, "timm")
    }
    return override(config, places | ({"model": weights} if weights else {}))


def _place(path: str | None) -> str:
    if path is not None and path.startswith("file:///"):
        path = unquote(path.removeprefix("file://"))
    if path is not None and "://" in path:
        return path
    return str(Path(path or ".").expanduser().resolve())


def check_places(config: Config, origin: str, origins: dict[str, str]) -> None:
    """Refuse places that would silently become others, such as a link to a folder that is not there."""
    for key, value in (("ray.storage_path", config.ray.storage_path), ("data.root", config.data.root)):
        scheme, colon, rest = (value or "").partition(":")
        if colon and (scheme.lower() in STORES or (rest.startswith("/") and re.fullmatch(r"[A-Za-z][\w+.-]*", scheme))):
            local = (value or "").startswith("file:///")
            given = value or ""
            wrong = wrong_with(given, config.data.source) if key == "data.root" else wrong_address(given)
            if wrong and not local:
                raise UserError(f"{place_of(key, origin, origins)}: {key}={public_address(value or '')}: {wrong}")
    storage = Path(os.path.expanduser(config.ray.storage_path))  # or an address, of which no part is a link
    broken = next((p for p in (storage, *storage.parents) if os.path.islink(p) and not os.path.exists(p)), None)
    if broken is not None:
        place = place_of("ray.storage_path", origin, origins)
        raise UserError(f"{place}: ray.storage_path={config.ray.storage_path}: {broken} is a link that leads nowhere")


def change_config(config: Config, overrides: Sequence[str], free: tuple[str, ...]) -> Config:
    """A run's config with `KEY=VALUE` overrides of keys that begin as one of `free` says, checked again."""
    data, origins = with_overrides(whole(config), overrides)
    changed = make_config(data, config.name, origins)
    was = flatten(config)
    for key, value in flatten(changed).items():
        if was.get(key) != value and not key.startswith(free):
            raise UserError(
                f"{key}={value}: the run was trained with {was.get(key)}; only {', '.join(free)} may differ"
            )
    return changed
