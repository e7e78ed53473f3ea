"""What is to be submitted, checked here: a mistake should cost a second, not a place in a cluster's queue.

A job runs in a copy of the working folder that vanishes with it, on a machine that sees only what is
shared. So every place that a config names must be absolute, and the run recorded where it outlives the job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bootvit.config import (
    Config,
    find_config,
    load_config,
    merge,
    nest,
    parse_override,
    parse_yaml,
    read_layers,
)
from bootvit.errors import UserError

VERBS = ("train", "sweep")
USAGE = "bootvit submit -- train CONFIG [KEY=VALUE ...], or bootvit submit -- sweep SWEEP [KEY=VALUE ...]"


@dataclass(frozen=True)
class Workers:
    """What a command needs at one time, at least: `count` bundles, each on one node."""

    count: int
    cpus: float
    gpus: float
    asked: str  # the keys that ask for it, for the error


@dataclass(frozen=True)
class Command:
    """A checked command: its words, which of them is the config, and the files that the config reads."""

    words: tuple[str, ...]
    config_at: int
    config: Path
    files: frozenset[Path]
    name: str
    workers: Workers | None  # None: nothing is asked of the cluster


def check_command(words: Sequence[str], env: Mapping[str, str] = os.environ) -> Command:
    """Read and check `train CONFIG ...` or `sweep SWEEP ...` as the job would; raises `UserError`."""
    if not words or words[0] not in VERBS:
        given = words[0] if words else ""
        near = get_close_matches(given, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected {USAGE}"
        raise UserError(f"cannot submit {given!r}: {hint}")
    places = [i for i, word in enumerate(words) if i > 0 and not word.startswith("-")]
    if not places:
        raise UserError(f"{words[0]}: no config is named: expected {USAGE}")
    overrides = [words[i] for i in places[1:]]
    path = find_config(words[places[0]])
    sweep = _read_sweep(path, overrides) if words[0] == "sweep" else None
    base = _base_file(path, sweep) if sweep is not None else path
    config = _check_config(base, overrides if sweep is None else _base_overrides(overrides), env)
    local = "--local" in words or "--dry-run" in words
    return Command(
        words=tuple(words),
        config_at=places[0],
        config=path.resolve(),
        files=frozenset(_files(path) | _files(base)),
        name=config.name if sweep is None else str(sweep.get("name", path.stem)),
        workers=None if local else _train_workers(config) if sweep is None else _sweep_workers(config, sweep),
    )


# ------------------------------------------------------------------------------------------------- configs


def _check_config(path: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Config:
    config = load_config(str(path), overrides)
    raw = read_layers(path)  # before places are resolved against this folder
    for text in overrides:
        raw = merge(raw, nest(*parse_override(text)))
    _check_places(raw, config, str(path), env)
    return config


def _check_places(raw: dict[str, Any], config: Config, origin: str, env: Mapping[str, str]) -> None:
    """Every place must mean the same on the cluster, and outlive the job."""
    storage = _get(raw, "ray.storage_path")
    if not _is_absolute(storage):
        raise UserError(
            f"{origin}: ray.storage_path={storage or './runs'} would vanish with the job's folder: "
            "add ray.storage_path=/FOLDER, one that every node of the cluster sees"
        )
    for key in ("data.root", "model.vit.weights", "model.agent.weights"):
        value = _get(raw, key)
        if value not in (None, "timm") and not _is_absolute(value):
            raise UserError(f"{origin}: {key}={value} is relative, but the job runs elsewhere: make it absolute")
    if config.tracking.enabled:
        given = _get(raw, "tracking.uri")
        key = "MLFLOW_TRACKING_URI" if given is None else "tracking.uri"
        _check_tracking(given or env.get("MLFLOW_TRACKING_URI"), origin, key)


def _check_tracking(uri: str | None, origin: str, key: str) -> None:
    wanted = "http://SERVER:5000 or sqlite:////SHARED/mlflow.db (or tracking.enabled=false)"
    if uri is None:
        raise UserError(f"{origin}: tracking.uri is not set, and the job's folder vanishes: set {wanted}")
    if urlsplit(uri).password:
        raise UserError(
            f"{key} holds a password, which the job's record would show: leave it out, "
            "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
        )
    if not outlives_job(uri):
        raise UserError(f"{origin}: {key}={uri} would vanish with the job's folder: set {wanted}")


def outlives_job(uri: str) -> bool:
    """Whether an MLflow tracking URI means the same place outside the job's folder."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.startswith("databricks") or Path(uri).is_absolute()
    return not scheme.startswith("sqlite") or rest.startswith("//")  # four slashes: absolute


def _is_absolute(place: Any) -> bool:
    return isinstance(place, str) and ("://" in place or Path(place).is_absolute())


def _get(tree: dict[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _train_workers(config: Config) -> Workers:
    ray = config.ray
    asked = f"ray.num_workers={ray.num_workers} with ray.cpus_per_worker={ray.cpus_per_worker:g}"
    if ray.use_gpu:
        asked += " and ray.use_gpu=true"
    return Workers(ray.num_workers, ray.cpus_per_worker, float(bool(ray.use_gpu)), asked)


# ------------------------------------------------------------------------------------------------- sweeps


def _read_sweep(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The sweep file with the overrides that are its own."""
    sweep = read_layers(path)
    own = [text for text in overrides if text not in _base_overrides(overrides)]
    for text in own:
        sweep = merge(sweep, nest(*parse_override(text)))
    return sweep


def _base_overrides(overrides: Sequence[str]) -> list[str]:
    """Keys that a sweep does not know go to its base config; `name` is the sweep's."""
    keys = set(Config.model_fields) - {"name"}
    return [text for text in overrides if parse_override(text)[0].split(".")[0] in keys]


def _base_file(path: Path, sweep: dict[str, Any]) -> Path:
    base = sweep.get("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base={base}: expected the base config, such as ../digits/joint.yaml")
    beside = path.resolve().parent / base
    return beside if beside.is_file() else find_config(base)


def _sweep_workers(config: Config, sweep: dict[str, Any]) -> Workers:
    if config.ray.num_workers > 1:
        return _train_workers(config)
    cpus, gpus = (_number(_get(sweep, f"resources.{key}"), default) for key, default in (("cpu", 1), ("gpu", 0)))
    return Workers(1, cpus, gpus, f"a trial with resources.cpu={cpus:g} and resources.gpu={gpus:g}")


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


# ------------------------------------------------------------------------------------------------- files


def _files(path: Path) -> set[Path]:
    """The file and all that it extends, resolved; names that only this machine knows are refused."""
    path = path.resolve()
    data = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    parents = data.get("extends", [])
    found = {path}
    for parent in [parents] if isinstance(parents, str) else parents:
        if re.match(r"[/~]", parent):
            raise UserError(f"{path}: extends {parent!r}: a job needs it relative to the file")
        found |= _files(path.parent / parent)
    if isinstance(base := data.get("base"), str) and re.match(r"[/~]", base):
        raise UserError(f"{path}: base={base}: a job needs it relative to the file")
    return found
