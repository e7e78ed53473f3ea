"""What lies in a folder of runs: listed, shown, compared, removed."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bootvit import checkpoint
from bootvit.errors import UserError
from bootvit.files import read_json
from bootvit.heartbeat import beat_of, check_nobody_writes, is_running
from bootvit.report.rows import RUN_FILES, RunRow, read_run, read_run_in_store
from bootvit.runs import open_run
from bootvit.storage import AT_ONCE, Place, Store
from bootvit.tracking.link import charts

SWEEP = "sweep.json"  # in the folder of a sweep
UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Listed(NamedTuple):
    """One line: a run, or a sweep with all of its trials."""

    name: str  # its folder below the one that is listed
    method: str  # `sweep` for a sweep
    data: str
    fraction: float | None
    status: str
    test: Mapping[str, float]  # top-1 in percent by network
    held_out: Mapping[str, float]
    age: float  # seconds since it last wrote anything


def list_runs(folder: Place, *, trials: bool = False) -> list[Listed]:
    """The runs and sweeps below a folder, the newest last; with `trials` those of sweeps too.

    Raises `UserError` for a folder that is not there, or holds no runs.
    """
    if isinstance(folder, Store):
        return _list_store(folder, trials=trials)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; train first, such as: bootvit train digits/joint")
    return _in_order((_listed(path, folder) for path in _places(folder, trials)), folder)


def _in_order(found: Iterable[Listed], folder: Place) -> list[Listed]:
    there = sorted(found, key=lambda one: -one.age)
    if not there:
        raise UserError(f"{folder}: no runs there; train first, such as: bootvit train digits/joint")
    return there


def _list_store(top: Store, *, trials: bool) -> list[Listed]:
    changed: dict[str, float] = {}  # of runs and sweeps, the newest of the objects that lie directly in them
    sweeps, runs = set(), set()
    for item in top.list(deep=True):
        place, _, name = item.name.rpartition("/")
        if not item.is_folder:
            changed[place] = max(changed.get(place, 0.0), (item.changed or 0) / 1e9)
            sweeps |= {place} if name == SWEEP else set()
            runs |= {place} if name == "config.yaml" else set()
    if not trials:
        runs = {run for run in runs if not any(run.startswith(f"{sweep}/".lstrip("/")) for sweep in sweeps)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda place: _listed_in_store(top, place, place in sweeps), sorted(sweeps | runs)))
    return _in_order((row._replace(age=time.time() - changed[row.name]) for row in rows), top)


def _listed_in_store(top: Store, place: str, sweep: bool) -> Listed:
    store = top / place if place else top
    if sweep:
        return _of_sweep(place, json.loads(store.read(SWEEP) or b"{}"), 0.0)
    return _of_run(place, read_run_in_store(store), store, 0.0)


def _places(top: Path, trials: bool) -> Iterator[Path]:
    """Folders of runs, and of sweeps."""
    for place, below, files in os.walk(top):
        sweep = SWEEP in files
        run = "config.yaml" in files and any(name in files for name in RUN_FILES)
        if sweep or run:
            yield Path(place)
        below[:] = [] if run or (sweep and not trials) else sorted(name for name in below if not name.startswith("."))


def _listed(path: Path, top: Path) -> Listed:
    name = str(path.relative_to(top)) if path != top else path.name
    age = time.time() - max((f.stat().st_mtime for f in path.iterdir() if f.is_file()), default=0)
    if (path / SWEEP).exists():
        return _of_sweep(name, read_json(path / SWEEP), age)
    return _of_run(name, read_run(path), path, age)


def _of_sweep(name: str, document: dict[str, Any], age: float) -> Listed:
    counts = ", ".join(f"{count} {status}" for status, count in document.get("counts", {}).items() if count)
    status = document["status"] + (f" ({counts})" if counts else "")
    return Listed(name, "sweep", "", None, status, {}, {}, age)


def _of_run(name: str, row: RunRow, place: Place, age: float) -> Listed:
    return Listed(name, row.method, row.data, row.fraction, _status(row, place), row.test, row.held_out, age)


def _status(row: RunRow, place: Place) -> str:
    """That of its result; without one, whether the process that trains it seems to be alive."""
    beat = beat_of(place) if row.status == "unfinished" else None
    if beat is None:
        return row.status
    if beat["host"] != socket.gethostname():
        return f"running on {beat['host']}?"
    return "running" if is_running(beat["pid"]) else row.status


def table(runs: Sequence[Listed]) -> str:
    """`bootvit list`; test and held-out accuracy are two columns."""
    rows = [("run", "method", "data", "fraction", "status", "test top-1", "held-out top-1", "age")]
    for run in runs:
        fraction = "" if run.fraction is None else f"{run.fraction:g}"
        scores = (_scores(run.test), _scores(run.held_out))
        rows.append((run.name, run.method, run.data, fraction, run.status, *scores, duration(run.age)))
    return columns(rows)


def _scores(scores: Mapping[str, float]) -> str:
    return " ".join(f"{net} {value:.2f}" for net, value in scores.items()) or "-"


def duration(seconds: float) -> str:
    """`3 min`: the largest unit alone."""
    unit, name = next(((unit, name) for unit, name in UNITS if seconds >= unit), UNITS[-1])
    return f"{seconds / unit:.0f} {name}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def in_short(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, dict):
        return "  ".join(f"{key} {in_short(part)}" for key, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return "-" if value is None else str(value)


# ------------------------------------------------------------------------------------------- one run, two runs


def show_run(name: str) -> dict[str, Any]:
    """What a run is and how it went; accuracies are top-1 in percent by network."""
    folder = open_run(name)[1]
    path = folder.path
    row = read_run(path)
    saved = checkpoint.described(path / "checkpoints")
    result = read_json(path / "result.json") if (path / "result.json").exists() else {}
    return {
        "folder": str(folder),
        "status": _status(row, folder.place) + (f": {row.reason}" if row.reason else ""),
        "method": row.method,
        "data": row.data,
        "fraction": row.fraction,
        "seed": row.seed,
        "epochs": f"{row.epochs} of {row.config['schedule.epochs']}",
        "test top-1": dict(row.test),
        "held-out top-1": dict(row.held_out),
        "seconds": row.seconds,
        "images per second": result.get("images_per_second"),
        "checkpoints": [saved_.path.name for saved_ in saved],
        "commit": result.get("git"),
        "mlflow run": result.get("mlflow_run_id"),
        "charts": charts(path),
    }


def compare_runs(first: str, second: str) -> dict[str, list[Any]]:
    """What differs between two runs: {key of the config, or what was measured: [of the first, of the second]}.

    Names and places are no difference.
    """
    one, two = (read_run(open_run(name)[1].path) for name in (first, second))
    keys = [key for key in {**one.config, **two.config} if key not in ("name", "ray.storage_path")]
    differ: dict[str, list[Any]] = {
        key: [one.config.get(key), two.config.get(key)] for key in keys if one.config.get(key) != two.config.get(key)
    }
    for what in ("status", "epochs", "seconds", "fingerprint"):
        values = [getattr(one, what), getattr(two, what)]
        if values[0] != values[1]:
            differ[what] = values
    for split, scores in (("test", (one.test, two.test)), ("held-out", (one.held_out, two.held_out))):
        for net in {**scores[0], **scores[1]}:
            differ[f"{split} top-1, {net}"] = [scores[0].get(net), scores[1].get(net)]
    return differ


def removable(name: str) -> Path:
    """A run's folder, to be deleted; `UserError` for one that is being trained, and for a trial of a sweep."""
    folder = open_run(name)[1]
    if folder.store is not None:
        raise UserError(f"{folder}: lies in an object store: remove it with the store's own tools")
    path = folder.path
    if path.parent.name == "trials" and (path.parent.parent / SWEEP).exists():
        raise UserError(f"{path}: a trial of the sweep {path.parent.parent}: remove that folder as a whole")
    check_nobody_writes(path)
    return path
