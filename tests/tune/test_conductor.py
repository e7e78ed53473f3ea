"""Who runs next, who stops, what a killed driver's log makes of a new one: no Ray, no training."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import Clock, make_conductor, make_sweep, run

from bootvit.errors import RunFailed
from tune.decide.budget import Budget, Spent
from tune.decide.conductor import Conductor
from tune.decide.log import Log, Trial, read_events
from tune.decide.winners import winners
from tune.spec.schema import BudgetConfig

KD = "objective.vit.kd"
TWO_GROUPS: dict[str, Any] = {
    "space": {"data.fraction": {"grid": [0.05, 0.5]}, KD: {"grid": [1, 2, 3, 4]}},
    "scheduler": {"name": "asha", "grace_epochs": 1, "reduction": 2},
}


def statuses(conductor: Conductor) -> dict[str, str]:
    """{id: status}"""
    return {name: trial.status for name, trial in conductor.trials.items()}


def weight(trial: Trial, epoch: int) -> float:
    """A metric by which a larger weight is better, and a larger fraction far better."""
    return 10 * trial.spec.overrides[KD] + 100 * trial.spec.overrides.get("data.fraction", 0) + epoch


def test_groups_never_compete(tmp_path: Path) -> None:
    """Every trial at 50% is far better than any at 5%, and comes first: yet within 5% the usual ones go on."""
    both = make_conductor(make_sweep(tmp_path, **TWO_GROUPS))
    run(both, lambda t, e: weight(t, e), at_once=8)
    small = {n: s for n, s in statuses(both).items() if "fraction=0.05" in n}
    alone = {**TWO_GROUPS, "space": {**TWO_GROUPS["space"], "data.fraction": {"grid": [0.05]}}, "name": "alone"}
    separate = make_conductor(make_sweep(tmp_path, **alone))
    run(separate, lambda t, e: weight(t, e), at_once=8)
    assert list(small.values()) == list(statuses(separate).values())
    assert "finished" in small.values()


def test_a_mixed_group_would_have_stopped_small_fractions(tmp_path: Path) -> None:
    """The counterpart: with one group for all, the same values stop every trial at 5%."""
    sweep = make_sweep(tmp_path, **TWO_GROUPS, group_by=[])
    conductor = make_conductor(sweep)
    order = sorted(range(8), reverse=True)  # the large fractions report first
    while conductor.next():
        pass
    trials = list(conductor.trials.values())
    for place in order:
        conductor.result(trials[place].spec.id, 1, weight(trials[place], 1), done=False)
    assert {t.status for t in trials if t.spec.overrides["data.fraction"] == 0.05} == {"stopped"}


@pytest.mark.parametrize("cut", [3, 9, 14, 20])
def test_a_killed_driver_s_log_leads_to_the_same_end(tmp_path: Path, cut: int) -> None:
    """ASHA's rungs are those of the uninterrupted sweep, wherever the log ends, torn line included."""
    whole = make_conductor(make_sweep(tmp_path, **TWO_GROUPS))
    run(whole, weight)
    log = make_sweep(tmp_path, **TWO_GROUPS).folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) > cut
    log.write_text("".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
    resumed = make_conductor(make_sweep(tmp_path, **TWO_GROUPS))
    run(resumed, weight)
    assert statuses(resumed) == statuses(whole)
    assert [t.values for t in resumed.trials.values()] == [t.values for t in whole.trials.values()]
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_a_running_trial_goes_on_and_what_it_repeats_changes_nothing(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2]}})
    first = make_conductor(sweep)
    trial = first.next()
    assert trial is not None
    first.result(trial.spec.id, 1, 11.0, done=False)
    first.result(trial.spec.id, 2, 12.0, done=False)
    second = make_conductor(sweep)
    again = second.next()
    assert again is not None
    assert (again.spec.id, again.epochs) == (trial.spec.id, 2)
    before = len((sweep.folder / "events.jsonl").read_text().splitlines())
    assert not second.result(again.spec.id, 1, 99.0, done=False)
    assert len((sweep.folder / "events.jsonl").read_text().splitlines()) == before
    assert again.values == {1: 11.0, 2: 12.0}


def test_a_crash_is_retried_then_the_trial_fails_and_the_others_go_on(tmp_path: Path) -> None:
    conductor = make_conductor(make_sweep(tmp_path, space={KD: {"grid": [1, 2]}}, retries=2))
    for attempt in range(3):
        trial = conductor.next()
        assert trial is not None
        assert trial.spec.id.startswith("0000")
        assert trial.crashes == attempt
        conductor.crashed(trial.spec.id, "RunFailed: the loss is not finite")
    assert (trial.status, trial.reason) == ("failed", "RunFailed: the loss is not finite")
    other = conductor.next()
    assert other is not None
    assert other.spec.id.startswith("0001")


def test_the_number_of_crashes_survives_the_driver(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}}, retries=1)
    for _ in range(2):
        conductor = make_conductor(sweep)
        trial = conductor.next()
        assert trial is not None
        conductor.crashed(trial.spec.id, "its worker died")
    assert trial.status == "failed"


def test_a_node_that_is_taken_away_costs_no_retry(tmp_path: Path) -> None:
    """However often; one that dies costs one only if the trial has done nothing since the last did."""
    conductor = make_conductor(make_sweep(tmp_path, space={KD: {"grid": [1]}}, retries=0))
    trial = conductor.next()
    assert trial is not None
    name = trial.spec.id
    for _ in range(3):
        assert conductor.crashed(name, "its node was taken away", "preempted")
        assert conductor.resume(name)
    conductor.result(name, 1, 1.0, done=False)
    assert conductor.crashed(name, "its node has died", "node")
    assert make_conductor(make_sweep(tmp_path, space={KD: {"grid": [1]}}, retries=0)).trials[name].lost_at == 1
    conductor = make_conductor(make_sweep(tmp_path, space={KD: {"grid": [1]}}, retries=0))
    assert conductor.resume(name)
    conductor.result(name, 2, 1.0, done=False)
    assert conductor.crashed(name, "its node has died", "node")
    assert conductor.resume(name)
    assert not conductor.crashed(name, "its node has died", "node"), "twice in one epoch: its own fault"
    trial = conductor.trials[name]
    assert (trial.status, trial.crashes) == ("failed", 1)


def test_time_without_events_counts_although_the_driver_is_killed(tmp_path: Path) -> None:
    """A long epoch and then a SIGKILL: what was written down meanwhile is not lost, and not counted twice."""
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}})
    clock = Clock()
    first = make_conductor(sweep, clock)
    trial = first.next()
    assert trial is not None
    first.began(trial.spec.id)
    for _ in range(100):
        clock.now += 7
        first.beat()
    beats = [e for e in read_events(sweep.folder / "events.jsonl") if e["event"] == "beat"]
    assert len(beats) == 20
    second = make_conductor(sweep, Clock())
    assert second.seconds == 700
    assert second.trials[trial.spec.id].seconds == 700


def test_a_larger_budget_lets_stopped_trials_go_on(tmp_path: Path) -> None:
    """Also when the driver that was told of it has died at once; those that a scheduler stopped stay stopped."""
    content = {"space": {KD: {"grid": [1, 2]}}, "budget": {"hours": 1, "at_end": "stop"}}
    clock = Clock()
    first = make_conductor(make_sweep(tmp_path, **content), clock)
    trial = first.next()
    assert trial is not None
    clock.now += 3700
    assert first.result(trial.spec.id, 1, 1.0, done=False)
    assert (trial.status, trial.stopped_by) == ("stopped", "budget")
    same = make_conductor(make_sweep(tmp_path, **content))
    same.reopen(failed=False)
    assert same.trials[trial.spec.id].status == "stopped"
    larger = {**content, "budget": {"hours": 2, "at_end": "stop"}}
    make_conductor(make_sweep(tmp_path, **larger)).reopen(failed=False)
    again = make_conductor(make_sweep(tmp_path, **larger))
    run(again, weight)
    assert statuses(again) == dict.fromkeys(again.trials, "finished")
    assert list(again.trials[trial.spec.id].values) == [1, 2, 3]


def test_failed_trials_are_tried_again_with_all_their_retries(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}}, retries=1)
    first = make_conductor(sweep)
    trial = first.next()
    assert trial is not None
    first.crashed(trial.spec.id, "no luck")
    assert first.resume(trial.spec.id)
    assert not first.crashed(trial.spec.id, "no luck")
    second = make_conductor(sweep)
    second.reopen(failed=True)
    again = second.next()
    assert again is not None
    assert (again.crashes, again.reason) == (0, None)
    assert second.crashed(again.spec.id, "no luck")


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_samples_may_grow(tmp_path: Path, algorithm: str) -> None:
    """What was drawn stays, and equals the beginning of a sweep that had them all from the start."""
    space = {KD: {"uniform": [0, 1]}}

    def content(samples: int, name: str = "grown") -> dict[str, Any]:
        return {"name": name, "space": space, "search": {"algorithm": algorithm, "samples": samples}}

    run(make_conductor(make_sweep(tmp_path, **content(3))), lambda t, e: -t.overrides[KD], epochs=1)
    grown = make_conductor(make_sweep(tmp_path, **content(5)))
    run(grown, lambda t, e: -t.overrides[KD], epochs=1)
    whole = make_conductor(make_sweep(tmp_path, **content(5, "whole")))
    run(whole, lambda t, e: -t.overrides[KD], epochs=1)
    assert [t.spec for t in grown.trials.values()] == [t.spec for t in whole.trials.values()]
    assert statuses(grown) == dict.fromkeys(grown.trials, "finished")
    assert len(grown.trials) == 5


def test_seeds_may_grow(tmp_path: Path) -> None:
    content = {"space": {KD: {"grid": [1, 2]}}}
    run(make_conductor(make_sweep(tmp_path, **content, seeds=[0])), weight)
    grown = make_conductor(make_sweep(tmp_path, **content, seeds=[0, 1]))
    run(grown, weight)
    assert [(t.spec.overrides[KD], t.spec.seed) for t in grown.trials.values()] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert statuses(grown) == dict.fromkeys(grown.trials, "finished")


def test_the_tests_of_winners_count_in_a_budget(tmp_path: Path) -> None:
    budget = BudgetConfig(hours=2, gpu_hours=1)
    spent = Budget(budget, 0.5, Spent(seconds=3600, held=3600 * 2))
    assert spent.time_spent({}, 0.5) == "budget.gpu_hours=1 are spent"
    assert Budget(budget, 0.5, Spent(seconds=3600, held=3600)).time_spent({}, 0.5) is None
    assert Budget(budget, 0.5, Spent(seconds=3600, held=0)).time_spent({}, 1.0) == "budget.hours=2 are spent"


def test_thousands_of_samples_of_a_small_space_do_not_recurse(tmp_path: Path) -> None:
    """Almost all are repeats, which are not run."""
    search = {"algorithm": "optuna", "sampler": "qmc", "samples": 1000}
    sweep = make_sweep(tmp_path, space={KD: {"choice": [1, 2, 3]}}, search=search)
    limit = sys.getrecursionlimit()
    conductor = make_conductor(sweep)
    sys.setrecursionlimit(300)
    try:
        run(conductor, weight, epochs=1)
    finally:
        sys.setrecursionlimit(limit)
    assert 1 <= len(conductor.trials) <= 3
    assert sum(e["event"] == "new" for e in read_events(sweep.folder / "events.jsonl")) == 1000


def test_a_budget_of_trials_lets_no_more_start(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2, 3]}}, budget={"trials": 2})
    conductor = make_conductor(sweep)
    run(conductor, weight)
    assert list(statuses(conductor).values()) == ["finished", "finished", "waiting"]
    assert conductor.budget_note == "budget.trials=2 are started"
    more = make_sweep(tmp_path, space={KD: {"grid": [1, 2, 3]}}, budget={"trials": 3})
    conductor = make_conductor(more)
    run(conductor, weight)
    assert list(statuses(conductor).values()) == ["finished"] * 3
    assert conductor.budget_note is None, "it is spent, and nothing is left undone"


@pytest.mark.parametrize(("samples", "note"), [(2, None), (3, "budget.trials=2 are started")])
def test_a_budget_that_ends_with_the_samples_is_not_missed(tmp_path: Path, samples: int, note: str | None) -> None:
    content = {"algorithm": "optuna", "samples": samples}
    sweep = make_sweep(tmp_path, space={KD: {"uniform": [0, 1]}}, search=content, budget={"trials": 2})
    conductor = make_conductor(sweep)
    run(conductor, weight)
    assert (len(conductor.trials), conductor.budget_note) == (2, note)


@pytest.mark.parametrize(("at_end", "expected"), [("finish", "finished"), ("stop", "stopped")])
def test_a_budget_of_time_counts_over_drivers(tmp_path: Path, at_end: str, expected: str) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2, 3]}}, budget={"hours": 1, "at_end": at_end})
    clock = Clock()
    first = make_conductor(sweep, clock)
    trial = first.next()
    assert trial is not None
    clock.now += 3000
    first.result(trial.spec.id, 1, 1.0, done=False)
    clock = Clock()
    second = make_conductor(sweep, clock)
    assert second.seconds == 3000
    again = second.next()
    assert again is not None
    clock.now += 700
    left = second.result(again.spec.id, 2, 2.0, done=False)
    assert left == (expected == "stopped")
    if not left:
        second.result(again.spec.id, 3, 3.0, done=True)
    assert again.status == expected
    assert second.next() is None
    assert "budget.hours=1" in str(second.budget_note)


def test_a_budget_of_gpu_hours_counts_the_share_of_a_gpu(tmp_path: Path) -> None:
    content = {"space": {KD: {"grid": [1, 2, 3]}}, "budget": {"gpu_hours": 1}, "resources": {"gpu": 0.5}}
    clock = Clock()
    conductor = make_conductor(make_sweep(tmp_path, **content), clock)
    for expected in (True, False):  # each trial holds half a GPU for an hour and a half
        trial = conductor.next()
        assert trial is not None
        conductor.began(trial.spec.id)
        clock.now += 5400
        conductor.result(trial.spec.id, 3, 1.0, done=True)
        assert (conductor.next() is not None) == expected if not expected else True


def test_a_driver_that_was_overtaken_stops(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}})
    old = make_conductor(sweep)
    make_conductor(sweep)
    with pytest.raises(RunFailed, match="taken over"):
        old.next()


def test_the_winner_is_the_best_mean_over_seeds(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2]}}, seeds=[0, 1])
    values = {(1, 0): 90.0, (1, 1): 10.0, (2, 0): 60.0, (2, 1): 62.0}
    conductor = make_conductor(sweep)
    run(conductor, lambda t, e: values[t.spec.overrides[KD], t.spec.seed])
    (best,) = winners(sweep, conductor.trials).values()
    assert (best.trials[0].spec.overrides, best.mean) == ({KD: 2}, 61.0)
    assert best.sd == pytest.approx(2**0.5)


def test_a_lucky_seed_does_not_win_when_the_others_were_stopped(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2]}}, seeds=[0, 1])
    conductor = make_conductor(sweep)
    run(conductor, lambda t, e: 99.0 if t.spec.overrides[KD] == 1 else 50.0)
    lucky = next(t for t in conductor.trials.values() if t.spec.overrides[KD] == 1)
    lucky.status = "stopped"
    (best,) = winners(sweep, conductor.trials).values()
    assert best.trials[0].spec.overrides == {KD: 2}


def test_a_log_with_a_broken_line_inside_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "new"}\nnonsense\n{"event": "start"}\n')
    with pytest.raises(Exception, match="line 2"):
        Log(tmp_path / "events.jsonl")


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path / "events.jsonl")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*events\.jsonl'"):
        log.write({"event": "start"})
