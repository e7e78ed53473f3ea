"""Runs as rows of a report, read from their folders."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from bootvit.config import leaves, parse_yaml
from bootvit.errors import UserError
from bootvit.files import read_json
from bootvit.remote import fetch_folder, reading_copy
from bootvit.storage import Place, Store
from bootvit.tracking.journal import iter_journal
from bootvit.tracking.tags import data_name, param_text

Split = Literal["test", "held_out"]
RUN_FILES = ("result.json", "metrics.jsonl", "lease.json")  # one of these beside config.yaml makes a run


Points = tuple[tuple[float, float], ...]  # (epochs done, value)
TIMES = 200  # points that a curve of training keeps: each is the mean of a part of the run


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
    curves: Mapping[str, Points] = field(default_factory=dict)  # by the journal's names, such as test/vit/top1
    epochs: int = 0
    seconds: float | None = None
    gpu_seconds: float | None = None
    fingerprint: str = ""  # of the data
    reason: str = ""  # why it is not finished
    images: Mapping[str, int] = field(default_factory=dict)  # how many: train, held_out, test
    machine: str = ""
    commit: str = ""
    ended: float | None = None  # seconds since 1970
    folder: Path | None = None  # with the run's files; None where they are not at hand

    def scores(self, split: Split) -> Mapping[str, float]:
        """Top-1 by network on a split; empty where it was not evaluated."""
        return self.test if split == "test" else self.held_out


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
    copy = reading_copy(store)
    fetch_folder(store, copy, "explain")
    return replace(read_run(copy), place=str(store))


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
    curves, ended = read_curves(folder / "metrics.jsonl")
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
            curves=curves,
            epochs=int(result.get("epochs") or 0),
            seconds=_number(result.get("seconds")),
            gpu_seconds=_number(result.get("gpu_seconds")),
            fingerprint=str(result.get("data_fingerprint") or ""),
            reason=str(result.get("reason") or ""),
            images=dict(result.get("images") or {}),
            machine=str(result.get("machine") or ""),
            commit=str(result.get("git") or ""),
            ended=ended,
            folder=folder,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(f"{path}: not a run's result: {type(err).__name__}: {err}") from err


def _test_scores(result: Mapping[str, Any], curves: Mapping[str, Points]) -> dict[str, float]:
    """`final` is the held-out part's where the data set has no test split: then it is the same as `held_out`."""
    final: dict[str, Any] | None = result.get("final")
    held_out: dict[str, Any] | None = result.get("held_out")
    tested = any(name.startswith("test/") for name in curves)
    return {} if final is None or (final == held_out and not tested) else top1(final)


def top1(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """{network: {"top1": …}} -> {network: top-1}."""
    return {network: float(values["top1"]) for network, values in (scores or {}).items()}


def read_curves(path: Path) -> tuple[dict[str, Points], float | None]:
    """What a journal says over epochs, by its names, and the time of its last record; complete lines only.

    Evaluations are whole; of the many values of training parts of the run are averaged.
    """
    found: dict[str, dict[int, tuple[int, float]]] = defaultdict(dict)  # {name: {step: (epoch, value)}}
    steps_per_epoch, ended = 0.0, None
    for record, _ in iter_journal(path):
        ended = record.time
        if record.name == "epoch" and record.value > 0:
            steps_per_epoch = record.step / record.value
        elif record.name.startswith(("test/", "held_out/", "train/", "explain/")):
            found[record.name][record.step] = record.epoch, record.value
    return {
        name: thinned([(step / steps_per_epoch, value) for step, (_, value) in values.items()])
        if name.startswith("train/") and steps_per_epoch
        else tuple((float(epoch + 1), value) for epoch, value in values.values())
        for name, values in found.items()
    }, ended


def thinned(points: Sequence[tuple[float, float]]) -> Points:
    """At most `TIMES` points: means of neighbours."""
    size = -(-len(points) // TIMES)
    parts = (points[first : first + size] for first in range(0, len(points), size))
    return tuple((fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts)


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
