"""The conductor behind Ray Tune's interfaces: the real Tune, with trials that take no time."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle, tune
from tiny_sweeps import make_conductor, make_sweep

from tune.decide.conductor import Conductor
from tune.decide.log import Trial, read_events
from tune.run import tuner
from tune.run.capacity import Room
from tune.run.job import Job, Report
from tune.run.trainable import TrialActor
from tune.run.tuner import execute
from tune.run.work import Work

KD = "objective.vit.kd"
EPOCHS = 3


class Scripted(TrialActor):
    """A trial that does at each epoch what its job's config says, once: {"2": "die"}."""

    @staticmethod
    def attempt(job: Job) -> Iterator[Report]:
        done = Path(job.config["folder"]) / job.config["name"]
        for epoch in range(job.heard + 1, EPOCHS + 1):
            mark = done.with_suffix(f".{epoch}")
            if not mark.exists():
                mark.touch()
                misbehave(job.config["script"].get(str(epoch)))
            with done.open("a") as file:
                file.write(f"{epoch} ")
            yield Report(epoch, {job.metric: job.config["value"] + epoch}, epoch == EPOCHS)


def misbehave(how: str | None) -> None:
    """Die, hang or raise."""
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    if how == "raise":
        raise ValueError("no luck\nthe last line")


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Heard(tune.Callback):  # type: ignore[misc]
    """What Tune tells a callback, in a file: Tune pickles its callbacks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{trial.trial_id} {result['epoch']}\n")


class Run:
    """A sweep whose trials are scripted."""

    def __init__(self, folder: Path, scripts: dict[int, dict[str, str]] | None = None, **content: Any) -> None:
        self.folder, self.scripts = folder, scripts or {}
        self.sweep = make_sweep(folder, **content)
        (folder / "trials").mkdir(exist_ok=True)
        self.conductor: Conductor = make_conductor(self.sweep, clock=time.monotonic)  # type: ignore[arg-type]

    def job(self, trial: Trial) -> Job:
        number = int(trial.spec.id[:4])
        config = {
            "name": trial.spec.id,
            "folder": str(self.folder / "trials"),
            "script": self.scripts.get(number, {}),
            "value": trial.overrides.get(KD, 0),
        }
        return Job(config, "held_out/vit/top1", "never", 1, trial.epochs)

    def execute(self, timeout: float | None = None) -> tune.ResultGrid:
        work = Work(self.conductor, self.job, Room(self.sweep), {"CPU": 1.0}, False, self.sweep.file.retries, timeout)
        work = work._replace(callbacks=[Heard(self.folder / "heard")], trainable=Scripted)
        return execute(work, self.sweep.folder, "trials")

    def done(self, name: str) -> str:
        """The epochs that a trial has done, in this order."""
        return (self.folder / "trials" / name).read_text().strip()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_events(self.sweep.folder / "events.jsonl") if e["event"] == kind]


@pytest.mark.usefixtures("_ray")
def test_a_trial_of_the_sweep_is_a_trial_of_tune(tmp_path: Path) -> None:
    """Names, folders, results and values; nothing of Tune's own state is left."""
    run = Run(tmp_path, space={KD: {"grid": [1, 2, 3, 4, 5]}})
    grid = run.execute()
    names = [f"{n:04d}-kd={n + 1},seed=0" for n in range(5)]
    assert sorted(Path(result.path).name for result in grid) == names
    by_name = {Path(result.path).name: result for result in grid}
    assert grid.num_errors == 0
    assert grid.get_best_result(metric="value", mode="max").path.endswith(names[-1])
    assert grid.get_best_result(metric="held_out/vit/top1", mode="min", scope="all").path.endswith(names[0])
    for number, name in enumerate(names):
        assert by_name[name].path == str(run.sweep.folder / "trials" / name)
        assert by_name[name].config == {KD: number + 1, "seed": 0}
        metrics = by_name[name].metrics
        assert (metrics["trial"], metrics["epoch"], metrics["value"]) == (name, EPOCHS, number + 1 + EPOCHS)
        assert run.done(name) == "1 2 3"
    heard = (tmp_path / "heard").read_text().splitlines()
    assert sorted(heard) == sorted(f"{name} {epoch}" for name in names for epoch in (1, 2, 3))
    assert {trial.status for trial in run.conductor.trials.values()} == {"finished"}
    assert [path.name for path in (run.sweep.folder / "trials").iterdir() if not path.is_dir()] == []


@pytest.mark.usefixtures("_ray")
def test_failures_are_retried_from_where_the_log_is_and_then_the_trial_fails(tmp_path: Path) -> None:
    """A killed worker, an error, one error too many; the others go on, and no epoch is heard of twice."""
    scripts = {0: {"2": "die"}, 1: {"3": "raise"}, 2: {"1": "raise", "2": "die"}}
    run = Run(tmp_path, scripts, space={KD: {"grid": [1, 2, 3, 4]}}, retries=1)
    grid = run.execute()
    trials = list(run.conductor.trials.values())
    assert [(t.status, t.crashes) for t in trials] == [("finished", 1), ("finished", 1), ("failed", 2), ("finished", 0)]
    assert trials[2].reason == "its worker died: killed, or out of memory"
    assert [run.done(t.spec.id) for t in trials] == ["1 2 3", "1 2 3", "1", "1 2 3"]
    reasons = [e["reason"] for e in run.events("crash") if e["id"].startswith("0001")]
    assert reasons == ["ValueError: the last line"]
    heard = (tmp_path / "heard").read_text().splitlines()
    assert len(heard) == len(set(heard)) == 10
    assert grid.num_errors == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_trial_that_tune_has_given_up_goes_on_where_its_node_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune counts a dead node against its own limit, the sweep does not."""
    monkeypatch.setattr("tune.run.scheduler.reason_of", lambda *_, **__: ("its node has died", "node"))
    run = Run(tmp_path, {0: {"2": "die"}, 1: {"3": "die"}}, space={KD: {"grid": [1, 2, 3]}}, retries=0)
    run.execute()
    trials = list(run.conductor.trials.values())
    assert [(t.status, t.crashes) for t in trials] == [("finished", 0)] * 3
    assert [run.done(t.spec.id) for t in trials] == ["1 2 3"] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_trial_that_says_nothing_is_started_again_and_then_fails(tmp_path: Path) -> None:
    scripts = {0: {"2": "hang"}, 1: {"1": "hang", "2": "hang"}}
    run = Run(tmp_path, scripts, space={KD: {"grid": [1, 2, 3]}}, retries=1)
    run.execute(timeout=4)
    trials = list(run.conductor.trials.values())
    assert [(t.status, t.crashes) for t in trials] == [("finished", 1), ("failed", 2), ("finished", 0)]
    assert trials[1].reason == "it has reported nothing for trial_timeout=4 seconds"


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_members_of_a_population_wait_and_leave_nothing_on_disk(tmp_path: Path) -> None:
    """Four members, two at a time: every round is complete before the next; the log says who copied whom."""
    search = {"algorithm": "pbt", "samples": 4, "interval": 1}
    run = Run(tmp_path, space={KD: {"loguniform": [0.1, 10]}}, search=search)
    run.execute()
    order = [(e["event"], e.get("epoch")) for e in read_events(run.sweep.folder / "events.jsonl") if "epoch" in e]
    assert [kind for kind, _ in order] == ["result"] * 4 + ["round"] + ["result"] * 4 + ["round"] + ["result"] * 4
    changed = {change["id"] for event in run.events("round") for change in event["changes"]}
    for name, trial in run.conductor.trials.items():
        assert run.done(name) == "1 2 3"
        assert (trial.status, bool(trial.changes)) == ("finished", name in changed)
    assert not list((run.sweep.folder / "trials").rglob("checkpoint_*"))


@pytest.mark.usefixtures("_ray")
def test_a_new_driver_tells_tune_of_the_trials_that_have_ended(tmp_path: Path) -> None:
    """After a kill the results hold all trials: those that ended before, and those that went on from the log."""
    first = Run(tmp_path, {1: {"1": "raise"}}, space={KD: {"grid": [1, 2, 3]}}, retries=0)
    first.execute()
    log = first.sweep.folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("id") != "0002-kd=3,seed=0"]
    log.write_text("".join(kept))
    second = Run(tmp_path, space={KD: {"grid": [1, 2, 3]}}, retries=0)
    grid = second.execute()
    assert [t.status for t in second.conductor.trials.values()] == ["finished", "failed", "finished"]
    by_name = {Path(result.path).name: result for result in grid}
    assert [by_name[name].metrics["epoch"] for name in sorted(by_name)] == [3, 0, 3]
    assert (grid.num_errors, grid.num_terminated) == (1, 2)
    assert "the last line" in str(by_name["0001-kd=2,seed=0"].error)
    assert second.done("0000-kd=1,seed=0") == "1 2 3", "it was not run again"


@pytest.mark.usefixtures("_ray")
def test_tunes_table_has_the_sweeps_names(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, space={KD: {"grid": [1, 2]}}, progress="table")
    work = Work(run.conductor, run.job, Room(run.sweep), {"CPU": 1.0}, False, 0, trainable=Scripted, table=True)
    execute(work, run.sweep.folder, "trials")
    out = capfd.readouterr().out
    assert "0000-kd=1,seed=0" in out
    assert "TERMINATED" in out
    assert "folder" not in out, "an actor's order is not spelled out"


def test_garbage_that_has_grown_old_is_collected_while_trials_run() -> None:
    """With the imports of torch and Ray counted as old, a thousand new objects are no reason to look at old ones."""

    class Node:
        def __init__(self) -> None:
            self.own = self

    thresholds = gc.get_threshold()
    try:
        with tuner.settled_heap():
            assert gc.get_freeze_count() > 10_000
            node = Node()
            gc.collect(1)  # it survives, and so it is old
            gone = weakref.ref(node)
            gc.set_threshold(50, 5, 5)
            del node
            kept: list[list[int]] = [[] for _ in range(10_000)]
            assert gone() is None
    finally:
        gc.set_threshold(*thresholds)
    assert len(kept) == 10_000
    assert gc.get_freeze_count() == 0
