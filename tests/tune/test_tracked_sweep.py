"""What MLflow knows of a sweep: times, cost, reasons and names as the folder has them, and no secret.

The sweeps are real, their trials run one after another in this process instead of Ray's.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_driver import document
from tiny_sweeps import sweep_file

from bootvit.__main__ import main
from bootvit.errors import RunFailed
from tune.decide.log import read_events
from tune.run import driver, trial
from tune.run.recording import Recording
from tune.run.trial import attempt
from tune.run.work import Work
from tune.tell import mlflow

KD = "objective.vit.kd"
SECRET = "hunter2"


class OneRoom:
    """Room for a trial."""

    def __init__(self, sweep: Any) -> None: ...

    def trials(self) -> int:
        return 1


def execute(work: Work, folder: Path, name: str) -> None:
    """What Ray Tune does with a sweep, without Ray Tune."""
    conductor = work.conductor
    while (given := conductor.next()) is not None:
        job = work.make_job(given)
        conductor.began(given.spec.id)
        try:
            for report in attempt(job):
                conductor.result(given.spec.id, report.epoch, report.metrics.get(job.metric), done=report.done)
        except RunFailed as err:
            conductor.crashed(given.spec.id, f"RunFailed: {err}")


@pytest.fixture
def sweep(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`bootvit sweep` with so much of the sweep file, and a CPU that passes for a GPU; its exit status."""
    monkeypatch.setattr(driver, "start_ray", lambda sweep: False)
    monkeypatch.setattr(driver, "check_resources", lambda sweep: None)
    monkeypatch.setattr(driver, "Room", OneRoom)
    monkeypatch.setattr("tune.run.tuner.execute", execute)
    monkeypatch.setattr(trial, "pick_device", lambda use_gpu: torch.device("cpu"))
    monkeypatch.setattr("tune.tell.mlflow.EVERY", 0.2)
    monkeypatch.setattr(Recording, "report", lambda self: [])  # takes seconds
    shutil.copy(empty_store, tmp_path / "mlflow.db")

    def run(*words: str, **content: Any) -> int:
        return main(["sweep", str(sweep_file(tmp_path, **content)), *words])

    return run


def runs(folder: Path) -> dict[str, Any]:
    """{name: MLflow's run}."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {run.info.run_name: run for run in found}


def rows(folder: Path) -> dict[str, list[Any]]:
    """All that the database holds."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(map(repr, database.execute(f"SELECT * FROM {name}"))) for name in names}


def check_times_and_cost(folder: Path) -> None:
    """MLflow, sweep.json, result.json and the log agree on when each trial ran, and on what it held."""
    events = list(read_events(folder / "runs" / "sweep" / "events.jsonl"))
    found = runs(folder)
    for row in document(folder / "runs" / "sweep")["trials"]:
        run = found[f"sweep/{row['id']}"]
        own = [event for event in events if event.get("id") == row["id"]]
        began = next(event["time"] for event in own if event["event"] == "begin")
        assert run.info.start_time == int(began * 1000)
        assert run.info.end_time == int(own[-1]["time"] * 1000)
        result = json.loads((folder / "runs" / "sweep" / row["run"] / "result.json").read_text())
        assert row["gpu_seconds"] == round(row["gpu_seconds"], 3) > 0
        assert row["gpu_seconds"] == pytest.approx(row["seconds"] / 4, abs=2e-3)
        assert row["gpu_seconds"] == result["gpu_seconds"] == run.data.metrics["final/gpu_seconds"]


@pytest.mark.parametrize("test", ["trial", "retrain"])
def test_what_mlflow_knows_is_what_the_folder_says(test: str, sweep: Callable[..., int], tmp_path: Path) -> None:
    fractions = [0.05, 0.1] if test == "trial" else [0.05]
    content = {"space": {"data.fraction": {"grid": fractions}, KD: {"grid": [0.5, 2]}}, "test": test}
    content |= {"resources": {"cpu": 1, "gpu": 0.25}, "set": {"schedule.epochs": 2}}
    assert sweep(**content) == 0
    check_times_and_cost(tmp_path)
    state, found = document(tmp_path / "runs" / "sweep"), runs(tmp_path)
    parent = found["sweep"]
    assert (parent.info.status, parent.data.metrics["cost/gpu_seconds"]) == ("FINISHED", state["cost"]["gpu_seconds"])
    assert {key for key in parent.data.metrics if not key.startswith("trials/")} == {"cost/seconds", "cost/gpu_seconds"}
    assert len([tag for tag in parent.data.tags if tag.startswith("bootvit.best.")]) == len(fractions)
    assert '"best.json"' in parent.data.tags["mlflow.loggedArtifacts"]
    for row in state["trials"]:
        fraction, weight = row["overrides"]["data.fraction"], row["overrides"][KD]
        name = (
            rf"sweep/\d+-fraction={fraction},kd={weight},seed=0" if test == "trial" else rf"sweep/\d+-.*kd={weight}.*"
        )
        assert re.fullmatch(name, found[f"sweep/{row['id']}"].info.run_name)
    if test == "retrain":
        for best in state["best"].values():
            path = tmp_path / "runs" / "sweep" / "winners" / best["trial"] / "result.json"
            metrics = found[f"sweep/{best['trial']} retrained winner"].data.metrics
            assert json.loads(path.read_text())["gpu_seconds"] == metrics["final/gpu_seconds"] > 0

    before = rows(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")}
    assert sweep("--resume", **content) == 0
    assert rows(tmp_path) == before, "a finished sweep's parent and trials stay as they are"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mlruns").rglob("*")} == files


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed before it could say when it ended"])
def test_a_sweep_that_mlflow_hears_of_late_and_its_failure_and_no_secret(
    killed: bool,
    sweep: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is down, at an address with a secret, while the sweep runs; one trial fails for good."""
    monkeypatch.setattr("bootvit.tracking.follow.PATIENCE_S", 30.0)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"http://me:{SECRET}@127.0.0.1:{sock.getsockname()[1]}"
    settings = {"schedule.epochs": 2, "tracking.log_every": 1, "tracking.uri": address}
    content = {"space": {"optim.lr": {"grid": [1e30, 1e-3]}}, "retries": 0, "resources": {"cpu": 1, "gpu": 0.25}}
    assert sweep(**content, set=settings) == 1
    folder = tmp_path / "runs" / "sweep"
    link = json.loads((folder / "mlflow.json").read_text())
    ended = link["ended_at"]
    if killed:
        (folder / "mlflow.json").write_text(json.dumps(link | {"ended": None, "ended_at": None}))
        ended = (folder / "sweep.json").stat().st_mtime
    out, err = capfd.readouterr()
    assert "MLflow at http://***@127.0.0.1" in err
    assert SECRET not in out + err
    (tmp_path / "sweep.yaml").unlink()  # the user's own
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []

    content["set"] = settings | {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    assert sweep("--resume", **content) == 1
    check_times_and_cost(tmp_path)
    found = runs(tmp_path)
    assert found["sweep"].info.end_time == int(ended * 1000)
    bad, good = document(folder)["trials"]
    run = found[f"sweep/{bad['id']}"]
    assert (run.info.status, run.data.tags["bootvit.reason"]) == ("FAILED", bad["reason"])
    assert run.data.metrics["train/vit/ce"] > 0, "its points, though it has no checkpoint"
    assert "bootvit.reason" not in found[f"sweep/{good['id']}"].data.tags


def test_no_artifact_of_a_sweep_holds_the_secret_of_its_file(
    sweep: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bootvit.tracking import store

    connect = store.connect
    local = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr("bootvit.tracking.tracked.connect", lambda uri: connect(local))
    settings = {"schedule.epochs": 1, "tracking.uri": f"http://me:{SECRET}@host:5000"}
    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    assert sweep(space={KD: {"grid": [0.5, 1]}}, set=settings) == 0
    assert (tmp_path / "sweep.yaml").read_text().count(SECRET) == 1
    (tmp_path / "sweep.yaml").unlink()
    sent = list(tmp_path.rglob("artifacts/sweep.yaml"))
    assert [SECRET in path.read_text() or "http://***@host:5000" not in path.read_text() for path in sent] == [False]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []


def test_mlflow_is_imported_before_the_thread_that_speaks_with_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune imports MLflow too when a sweep starts; two threads at once may see half of its modules."""
    importing: list[threading.Thread] = []

    class Parent:
        uri, run_id, folder = "sqlite:////nowhere/mlflow.db", None, Path()

        def connect(self) -> bool:
            assert importing  # in the thread: what fails here is raised by `close`
            return True

    def imports() -> None:
        importing.append(threading.current_thread())
        raise ImportError("a broken MLflow")

    monkeypatch.setattr(mlflow, "import_mlflow", imports)
    monkeypatch.setattr(mlflow, "EVERY", 0.0)
    shipper = mlflow.Shipper(Parent(), None, "sweep", "trial", None)
    assert importing == [threading.current_thread()]
    assert shipper.close()
