"""Sweeps on clusters of several nodes, which come, are taken away and die."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cluster_processes import processes
from sweep_driver import ROOT, command, document, finish, kill, mlflow_points
from tiny_sweeps import sweep_file

from cluster.local import LocalCluster

KD = "objective.vit.kd"
SPACE = {KD: {"grid": [1, 2, 3, 4]}}
LONG = {"schedule.epochs": 30, "data.fraction": 0.3}


QUICK = {"RAY_health_check_period_ms": "1000", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # five are missed


@pytest.fixture
def nodes() -> Iterator[Callable[[int], LocalCluster]]:
    """Makes a cluster whose head has so many CPUs; its workers import this folder's files."""
    with ExitStack() as stack:
        yield lambda head_cpus: stack.enter_context(LocalCluster(head_cpus=head_cpus, env=QUICK))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The log's events of one kind; a torn last line is passed over."""
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in found if event["event"] == kind]


def wait_until(condition: Callable[[], object], process: Any, seconds: float = 240) -> None:
    """Until something is so; an error if the sweep ends before, or it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def check_complete(folder: Path, epochs: int, store: Path) -> None:
    """Every trial finished once, and no epoch is twice in the log or in MLflow."""
    trials = document(folder)["trials"]
    assert [t["status"] for t in trials] == ["finished"] * len(trials)
    seen = Counter((e["id"], e["epoch"]) for e in events(folder, "result"))
    assert seen == Counter((t["id"], epoch) for t in trials for epoch in range(1, epochs + 1))
    ends = Counter(e["id"] for e in events(folder, "result") if e["verdict"] == "finished")
    assert set(ends.values()) == {1}
    for run, found in mlflow_points(store).items():
        places = [(key, step) for key, step, _ in found]
        assert len(places) == len(set(places)), f"{run} has a point twice"


@pytest.mark.cluster
@pytest.mark.parametrize("notice", [True, False], ids=["drained", "killed"])
def test_a_node_is_lost_while_trials_run_and_another_joins(
    nodes: Callable[[int], LocalCluster], tmp_path: Path, notice: bool
) -> None:
    """With a spot notice or without: the trial that it had goes on elsewhere, and no retry is spent."""
    cluster = nodes(1)
    leaving = cluster.add_node()
    process = command(sweep_file(tmp_path, space=SPACE, set=LONG, retries=0), address=cluster.address)
    folder = tmp_path / "runs" / "sweep"
    wait_until(lambda: len({e["id"] for e in events(folder, "result")}) > 1, process)
    if notice:
        cluster.drain_node(leaving, 3)
        time.sleep(3)
    cluster.kill_node(leaving)
    cluster.add_node()
    status, out, err = finish(process)
    assert status == 0, out + err
    check_complete(folder, LONG["schedule.epochs"], tmp_path / "mlflow.db")
    assert [t["crashes"] for t in document(folder)["trials"]] == [0] * 4
    (lost,) = events(folder, "crash")
    assert (lost["verdict"], lost["reason"]) == ("lost", "its node was taken away" if notice else "its node has died")


@pytest.mark.cluster
def test_a_cluster_that_starts_at_zero(nodes: Callable[[int], LocalCluster], tmp_path: Path) -> None:
    """The sweep waits, says so, and uses the nodes that come: two trials at a time in the end."""
    cluster = nodes(0)
    process = command(sweep_file(tmp_path, space=SPACE, set=LONG), address=cluster.address)
    folder = tmp_path / "runs" / "sweep"
    wait_until(lambda: events(folder, "start"), process)
    time.sleep(3)
    assert not events(folder, "result")
    cluster.add_node()
    wait_until(lambda: events(folder, "result"), process)
    cluster.add_node()
    status, out, err = finish(process)
    assert status == 0, out + err
    assert "no node has room for a trial now; waiting for one that has" in out
    check_complete(folder, LONG["schedule.epochs"], tmp_path / "mlflow.db")
    order = [e["id"] for e in events(folder, "result")]
    assert order != sorted(order), "two trials never ran at the same time"


@pytest.mark.cluster
def test_what_no_node_can_ever_run_is_one_line(nodes: Callable[[int], LocalCluster], tmp_path: Path) -> None:
    cluster = nodes(1)
    cluster.add_node()
    path = sweep_file(tmp_path, space=SPACE, resources={"cpu": 2.0})
    begin = time.monotonic()
    status, _, err = finish(command(path, address=cluster.address))
    assert (status, err.count("\n")) == (2, 1)
    assert "resources.cpu=2" in err
    assert "nodes: 1 CPUs, 0 GPUs; 1 CPUs, 0 GPUs" in err
    assert time.monotonic() - begin < 120
    assert not (tmp_path / "runs" / "sweep").exists()


@pytest.mark.cluster
@pytest.mark.parametrize("title", ["ray::TrialActor", "ray::RayTrainWorker"], ids=["outer", "worker"])
def test_a_killed_actor_of_a_trial_of_two_workers(
    nodes: Callable[[int], LocalCluster], tmp_path: Path, title: str
) -> None:
    """Its placement group is removed, without a dashboard, so that the trial can go on: one retry."""
    cluster = nodes(2)
    run = {**LONG, "ray.num_workers": 2}
    path = sweep_file(tmp_path, space={KD: {"grid": [1, 2]}}, set=run, retries=1)
    process = command(path, address=cluster.address)
    folder = tmp_path / "runs" / "sweep"
    try:
        wait_until(lambda: len(events(folder, "result")) > 2, process)
        os.kill(processes(title, cluster)[0], signal.SIGKILL)
        status, out, err = finish(process, timeout=400)
    finally:
        if process.poll() is None:
            kill(process)
    assert status == 0, out + err
    check_complete(folder, LONG["schedule.epochs"], tmp_path / "mlflow.db")
    assert [t["crashes"] for t in document(folder)["trials"]] == [1, 0]
