"""Who runs next, who stops, what a killed driver's log makes of a new one: no Ray, no training."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import Clock, make_conductor, make_sweep, run

from bootvit.errors import RunFailed
from tune.decide.conductor import Conductor
from tune.decide.log import Log, Trial
from tune.tell.record import winners

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
