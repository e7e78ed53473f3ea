"""Sweeps as their users run them: a process of its own, which a test may kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def command(path: Path, *arguments: str, address: str | None = None) -> subprocess.Popen[str]:
    """`bootvit sweep` in the file's folder, on the Ray at `address` or on one of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    environment |= {} if address is None else {"RAY_ADDRESS": address}
    return subprocess.Popen(
        [sys.executable, "-m", "bootvit", "sweep", str(path), *arguments],
        cwd=path.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 900) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a sweep that runs to its end."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, out, err


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver alone: its Ray workers live on for a moment, as they would."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for_events(
    folder: Path, count: int, process: subprocess.Popen[str], log: str = "events.jsonl", timeout: float = 600
) -> None:
    """Until the sweep's log has so many events, or the driver has ended."""
    path = folder / log
    end = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)


def document(folder: Path) -> dict[str, Any]:
    """sweep.json."""
    return dict(json.loads((folder / "sweep.json").read_text()))


def outcome(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: {trial: status, epochs, accuracies}."""
    keys = ("status", "epochs", "held_out", "final", "overrides", "seed", "group")
    return {trial["id"]: {key: trial[key] for key in keys} for trial in document(folder)["trials"]}


def journal(run_dir: Path) -> list[tuple[Any, ...]]:
    """A run's records without what is measured in time."""
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["epoch"], r["name"], r["value"]) for r in rows if r["name"] != "train/images_per_second"]


def mlflow_points(store: Path, experiment: str = "digits") -> dict[str, list[tuple[str, int, float]]]:
    """{run name: its points (metric, step, value)}, times left out; a name that is there twice is an error."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000)
    names = Counter(run.info.run_name for run in runs)
    assert max(names.values()) == 1, names
    timed = ("seconds", "images_per_second")
    return {
        run.info.run_name: sorted(
            (key, point.step, point.value)
            for key in run.data.metrics
            if not key.endswith(timed)
            for point in client.get_metric_history(run.info.run_id, key)
        )
        for run in runs
    }


def mlflow_tags(store: Path, key: str, experiment: str = "digits") -> dict[str, str]:
    """{run name: a tag's value} of the runs that have the tag."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id], max_results=1000)
    return {run.info.run_name: run.data.tags[key] for run in runs if key in run.data.tags}
