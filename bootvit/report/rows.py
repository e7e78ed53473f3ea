"""Runs as rows of a report, read from their folders."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bootvit.config import leaves, parse_yaml
from bootvit.errors import UserError
from bootvit.files import read_json
from bootvit.remote import reading_copy
from bootvit.storage import Place, Store
from bootvit.tracking.journal import parse_record
from bootvit.tracking.tags import data_name, param_text

Split = Literal["test", "held_out"]
RUN_FILES = ("result.json", "metrics.jsonl", "lease.json")  # one of these beside config.yaml makes a run


class Curve(NamedTuple):
    """Accuracy over training."""

    split: Split
    points: tuple[tuple[float, float], ...]  # (epochs done, top-1 in percent)


@dataclass(frozen=True)
class RunRow:
    """One run. Accuracies are top-1 in percent, by network, after the final epoch."""

    name: str
    place: str  # a folder, or an MLflow run id
    method: str
    status: str  # finished, failed, interrupted or unfinished
    data: str
    fraction: float
    seed: int
    config: Mapping[str, str]  # flattened, values as `param_text` writes them
    test: Mapping[str, float] = field(default_factory=dict)  # empty where there is no test split
    held_out: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)  # by network
    epochs: int = 0
    seconds: float | None = None
    gpu_seconds: float | None = None
    fingerprint: str = ""  # of the data
    reason: str = ""  # why it is not finished

    @property
    def split(self) -> Split:
        """What the run is judged by: the test split, else the images held out of the training set."""
        return "test" if self.test else "held_out"

    @property
    def scores(self) -> Mapping[str, float]:
        """Top-1 by network on `split`."""
        return self.test or self.held_out


def collect_folders(places: Sequence[Place]) -> list[RunRow]:
    """Every run in or below the folders, here or in stores, trials of sweeps included, each once.

    Raises `UserError` for a folder that does not exist, for a broken file, and where there are no runs at all.
    """
    paths = [place for place in places if isinstance(place, Path)]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; train first, such as: bootvit train digits/joint")
    folders = sorted({found.resolve() for path in paths for found in _run_folders(path)})
    stores = {found.at: found for place in places if isinstance(place, Store) for found in _runs_in_store(place)}
    if not folders and not stores:
        where = ", ".join(map(str, places)) or "no folder"
        raise UserError(f"{where}: no runs there; train first, such as: bootvit train digits/joint")
    with ThreadPoolExecutor(8) as pool:
        there = list(pool.map(read_run_in_store, (stores[at] for at in sorted(stores))))
    return [read_run(folder) for folder in folders] + there


def _runs_in_store(top: Store) -> Iterator[Store]:
    names = {item.name for item in top.list(deep=True) if not item.is_folder}
    for name in names:
        folder, _, file = name.rpartition("/")
        if file == "config.yaml" and any(other.startswith(f"{folder}/leases/".lstrip("/")) for other in names):
            yield top / folder if folder else top


def read_run_in_store(store: Store) -> RunRow:
    """A run in an object store, from a copy of what is small of it."""
    return replace(read_run(reading_copy(store)), place=str(store))


def _run_folders(top: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(top):
        is_run = "config.yaml" in files and any(name in files for name in RUN_FILES)
        if is_run or "result.json" in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if name != "mlruns" and not name.startswith("."))


def read_run(folder: Path) -> RunRow:
    """One run directory; `UserError` names a file that is broken or missing."""
    config = read_config(folder / "config.yaml")
    path = folder / "result.json"
    result: dict[str, Any] = read_object(path) if path.exists() else {"status": "unfinished"}
    curves = read_curves(folder / "metrics.jsonl")
    try:
        return RunRow(
            name=str(result.get("name", config.get("name", folder.name))),
            place=str(folder),
            method=str(result.get("method") or config["method"]),
            status=str(result["status"]),
            data=data_name(config["data.source"], None if config["data.root"] == "null" else config["data.root"]),
            fraction=float(result.get("fraction") or config["data.fraction"]),
            seed=int(result["seed"] if "seed" in result else config["seed"]),
            config=config,
            held_out=top1(result.get("held_out")),
            test=_test_scores(result, curves),
            curves={network: longest(found) for network, found in curves.items()},
            epochs=int(result.get("epochs") or 0),
            seconds=_number(result.get("seconds")),
            gpu_seconds=_number(result.get("gpu_seconds")),
            fingerprint=str(result.get("data_fingerprint") or ""),
            reason=str(result.get("reason") or ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"{path}: not a run's result: {type(err).__name__}: {err}") from err


def _test_scores(result: Mapping[str, Any], curves: Mapping[str, Mapping[Split, Curve]]) -> dict[str, float]:
    """`final` is the held-out part's where the data set has no test split: then it is the same as `held_out`."""
    final: dict[str, Any] | None = result.get("final")
    held_out: dict[str, Any] | None = result.get("held_out")
    tested = any("test" in found for found in curves.values())
    return {} if final is None or (final == held_out and not tested) else top1(final)


def top1(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """{network: {"top1": …}} -> {network: top-1}."""
    return {network: float(values["top1"]) for network, values in (scores or {}).items()}


def longest(found: Mapping[Split, Curve]) -> Curve:
    """The curve with more points, the test split's if equal: a test set is often touched once, at the end."""
    return max(found.values(), key=lambda curve: (len(curve.points), curve.split == "test"))


def read_curves(path: Path) -> dict[str, dict[Split, Curve]]:
    """Top-1 over epochs, by network and split; complete lines of a journal only."""
    points: dict[tuple[str, Split], dict[float, float]] = defaultdict(dict)
    if path.exists():
        with path.open("rb") as file:
            offset = 0
            for line in file:
                offset += len(line)
                if b"/top1" in line and line.endswith(b"\n"):
                    record = parse_record(line, path, offset)
                    split, network, _ = record.name.split("/")
                    points[network, "test" if split == "test" else "held_out"][record.epoch + 1] = record.value
    curves: dict[str, dict[Split, Curve]] = defaultdict(dict)
    for (network, split), values in points.items():
        curves[network][split] = Curve(split, tuple(sorted(values.items())))
    return dict(curves)


def read_config(path: Path) -> dict[str, str]:
    """A run's resolved config, flattened. Not checked against the schema, so that old runs can be reported."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"{path}: cannot be read: {err}") from err
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a run's config")
    return {key: param_text(value) for key, value in leaves(tree).items()}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; anything else is a `UserError` that names the file."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, not {type(document).__name__}")
    return document


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
