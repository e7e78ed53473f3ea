"""Slots: what they are given, and what their actors make of it; Ray is imported and not started."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.search.searcher import Searcher
from tiny_sweeps import make_conductor, make_sweep

from tune import execute
from tune.execute import Clock, Errors, Feed, Referee, Slots, Stage, TrialActor, Work
from tune.log import Trial
from tune.trial import Job, Report

KD = "objective.vit.kd"
EPOCHS = 3


class FakeTune:
    """Runs slots as Tune does, one at a time, with trials that take `EPOCHS` epochs and no time."""

    def __init__(self, folder: Path, **content: Any) -> None:
        self.conductor = make_conductor(make_sweep(folder, **content))
        stages = iter([Stage(self.conductor, self.make_job)])
        self.work = Work(stages, "held_out.vit.top1", folder)
        self.feed = Feed(self.work, Slots(1, {"CPU": 1.0}), Errors())
        self.referee = Referee(self.work, Errors())
        self.slots: list[list[str]] = []  # the trials that each slot ran

    @staticmethod
    def make_job(trial: Trial) -> Job:
        return Job({"name": trial.spec.id})

    def run_slot(self, *, fail_at: str | None = None) -> bool:
        """Until Tune is told to end the slot, or a trial fails; False if there was no slot to run."""
        slot = SimpleNamespace(trial_id=f"s{len(self.slots)}", pickled_error_file=None)
        config = self.feed.suggest(slot.trial_id)
        if config == Searcher.FINISHED:
            return False
        self.slots.append([])
        decision, iteration, epoch = "CONTINUE", 0, 0
        while decision == "CONTINUE":
            name = json.loads(Path(config["order"]).read_text())["job"]["config"]["name"]
            if name not in self.slots[-1]:
                self.slots[-1].append(name)
                epoch = 0
            if name == fail_at:
                self.referee.on_trial_error(None, slot)
                return True
            epoch, iteration = epoch + 1, iteration + 1
            result = {"epoch": epoch, "value": 1.0, "over": epoch == EPOCHS, "training_iteration": iteration}
            decision = self.referee.on_trial_result(None, slot, result)
        return True


def test_a_slot_takes_one_trial_after_another(tmp_path: Path) -> None:
    tune = FakeTune(tmp_path, space={KD: {"grid": [1, 2, 3, 4]}})
    assert tune.run_slot()
    assert not tune.run_slot()
    trials = tune.conductor.trials
    assert tune.slots == [list(trials)]
    assert [(t.status, t.epochs) for t in trials.values()] == [("finished", EPOCHS)] * 4


def test_a_slot_that_has_reported_enough_is_replaced_when_its_trial_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "SLOT_RESULTS", 4)
    tune = FakeTune(tmp_path, space={KD: {"grid": [1, 2, 3, 4, 5]}})
    while tune.run_slot():
        pass
    assert [len(slot) for slot in tune.slots] == [2, 2, 1]
    assert {t.status for t in tune.conductor.trials.values()} == {"finished"}


def test_nothing_is_kept_of_the_results_of_a_slot_that_is_over(tmp_path: Path) -> None:
    """Tune keeps its trials to the end of a sweep, and in each of them what it reported."""
    slot = TuneTrial("slot", stub=True)
    slot.update_last_result({"epoch": 1, "value": 1.0, "over": True, "training_iteration": 1})
    assert slot.metric_analysis
    assert slot.metric_n_steps
    Clock(FakeTune(tmp_path, space={KD: {"grid": [1]}}).work).on_trial_complete(1, [slot], slot)
    assert (slot.metric_analysis, slot.metric_n_steps) == ({}, {})


def test_a_failure_is_that_of_the_trial_that_the_slot_has(tmp_path: Path) -> None:
    """The second of a slot fails: it is tried again in another slot, before the third."""
    tune = FakeTune(tmp_path, space={KD: {"grid": [1, 2, 3]}}, retries=1)
    assert tune.run_slot(fail_at=(second := "0001-seed=0"))
    assert {name for name, t in tune.conductor.trials.items() if t.crashes} == {second}
    assert tune.run_slot()
    assert [slot[:2] for slot in tune.slots] == [["0000-seed=0", second], [second, "0002-seed=0"]]
    assert {t.status for t in tune.conductor.trials.values()} == {"finished"}


def test_an_actor_leaves_a_trial_as_soon_as_another_one_is_ordered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that was stopped is closed; one that comes back to the slot is begun again from its checkpoint."""
    seen: list[str] = []

    def attempt(job: Job) -> Iterator[Report]:
        seen.append(f"begin {job.config['name']}")
        try:
            for epoch in range(1, EPOCHS + 1):
                yield Report(epoch, {"held_out/vit/top1": 10.0 * epoch}, epoch == EPOCHS)
        finally:
            seen.append(f"end {job.config['name']}")

    monkeypatch.setattr(execute, "attempt", attempt)
    order = tmp_path / "order.json"

    def give(number: int, name: str) -> None:
        job = Job({"name": name})._asdict()
        order.write_text(json.dumps({"number": number, "metric": "held_out/vit/top1", "job": job}))

    actor = TrialActor({"order": str(order), "resources": {"CPU": 1.0}})
    give(1, "a")
    assert [(r["epoch"], r["value"]) for r in (actor.step(), actor.step())] == [(1, 10), (2, 20)]
    give(2, "b")
    assert [actor.step()["over"] for _ in range(EPOCHS)] == [False, False, True]
    give(3, "b")
    assert actor.step()["epoch"] == 1
    actor.cleanup()
    assert seen == ["begin a", "end a", "begin b", "end b", "begin b", "end b"]


def test_garbage_that_has_grown_old_is_collected_while_trials_run() -> None:
    """With the imports of torch and Ray counted as old, a thousand new objects are no reason to look at old ones."""

    class Node:
        def __init__(self) -> None:
            self.own = self

    thresholds = gc.get_threshold()
    try:
        with execute.settled_heap():
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
