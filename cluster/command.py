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
from typing import Any, NamedTuple

from bootvit.addresses import has_secret, is_address
from bootvit.config import find_config, layers, merge, nest, origin_of, read_layers, with_overrides
from bootvit.errors import UserError
from bootvit.extensions import beside
from bootvit.load import load_config
from cluster.capacity import Workers, train_workers, trial_workers

VERBS = ("train", "sweep")
USAGE = "bootvit submit -- train CONFIG [KEY=VALUE ...], or bootvit submit -- sweep SWEEP [KEY=VALUE ...]"


@dataclass(frozen=True)
class Command:
    """A checked command: its words, which of them is the config, and the files that the config reads."""

    words: tuple[str, ...]
    config_at: int
    config: Path
    files: frozenset[Path]
    name: str
    workers: Workers | None  # None: nothing is asked of the cluster
    modules: frozenset[Path] = frozenset()  # files that its config imports
    trains: bool = False  # the job's first process itself, in place of workers (`--local`)


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
    checked = _check_train(path, overrides, env) if words[0] == "train" else _check_sweep(path, overrides, env)
    return Command(
        words=tuple(words),
        config_at=places[0],
        config=path.resolve(),
        files=frozenset(_files(path) | _files(checked.base)),
        modules=checked.modules,
        name=checked.name,
        workers=None if "--dry-run" in words else checked.workers,
        trains="--local" in words,
    )


class Checked(NamedTuple):
    """What a command's own file says: its name, the config that is trained, and the workers it needs."""

    name: str
    base: Path
    workers: Workers
    modules: frozenset[Path]


def _check_train(path: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Checked:
    config = load_config(str(path), overrides)
    _check_places(with_overrides(read_layers(path), overrides)[0], str(path), env)
    return Checked(config.name, path, train_workers(config), _modules(config.imports))


def _check_sweep(path: Path, overrides: Sequence[str], env: Mapping[str, str]) -> Checked:
    from tune.spec.load import is_own, load_sweep
    from tune.spec.space import check_space

    own = [text for text in overrides if is_own(text)]
    for text in own:
        if text.startswith("base=") and Path(text.removeprefix("base=")).is_file():
            raise UserError(f"{origin_of(text)}: the job does not have this file: name it in the sweep file")
    sweep = load_sweep(str(path), overrides)
    check_space(sweep)
    base = find_config(sweep.file.base)
    raw = read_layers(base)
    for key, value in sweep.file.set.items():
        raw = merge(raw, nest(key, value))
    for_base = [text for text in overrides if text not in own]
    merged = with_overrides(raw, for_base)[0]
    _check_places(merged, str(base), env)
    return Checked(sweep.file.name, base, trial_workers(sweep), _modules(merged.get("imports", ())))


def _modules(imports: Sequence[str]) -> frozenset[Path]:
    """Those that are files here; others must be installed where the job runs."""
    return frozenset(Path(one) for one in (beside(given, Path()) for given in imports) if one.endswith(".py"))


# ------------------------------------------------------------------------------------------------- places


def _check_places(raw: dict[str, Any], origin: str, env: Mapping[str, str]) -> None:
    """Every place must mean the same on the cluster, and outlive the job."""
    storage = _get(raw, "ray.storage_path")
    if not (_is_absolute(storage) or _is_address(storage)):  # an address is checked with the config
        raise UserError(
            f"{origin}: ray.storage_path={storage or './runs'} would vanish with the job's folder: "
            "add ray.storage_path=/FOLDER, one that every node of the cluster sees, or s3://BUCKET/FOLDER"
        )
    for key in ("data.root", "model.vit.weights", "model.agent.weights"):
        value = _get(raw, key)
        if key == "data.root" and _is_address(value):
            continue
        if value not in (None, "timm") and not _is_absolute(value):
            raise UserError(f"{origin}: {key}={value} is relative, but the job runs elsewhere: make it absolute")
    if _get(raw, "tracking.enabled") is not False:
        given = _get(raw, "tracking.uri")
        key = "MLFLOW_TRACKING_URI" if given is None else "tracking.uri"
        _check_tracking(given or env.get("MLFLOW_TRACKING_URI"), origin, key)


def _check_tracking(uri: str | None, origin: str, key: str) -> None:
    wanted = "http://SERVER:5000 or sqlite:////SHARED/mlflow.db (or tracking.enabled=false)"
    if uri is None:
        raise UserError(f"{origin}: tracking.uri is not set, and the job's folder vanishes: set {wanted}")
    if has_secret(uri):
        raise UserError(
            f"{key} holds a password or a token, which the job's record would show: leave it out, "
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


def _is_address(place: Any) -> bool:
    return isinstance(place, str) and is_address(place)


def _is_absolute(place: Any) -> bool:
    return isinstance(place, str) and Path(place).is_absolute()


def _get(tree: dict[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


# ------------------------------------------------------------------------------------------------- files


def _files(path: Path) -> set[Path]:
    """The file and all that it extends by path, resolved; places that only this machine knows are refused.

    What is extended as a shipped config goes along with the package.
    """
    found = list(layers(path))
    for layer in found:
        base = layer.data.get("base")
        named = {"extends": layer.extends, "base": [base] if isinstance(base, str) else []}
        for key, places in named.items():
            for place in places:
                if re.match(r"[/~]", place):
                    raise UserError(f"{layer.path}: {key}={place}: a job needs it relative to the file")
    return {layer.path for layer in found if not layer.shipped}
