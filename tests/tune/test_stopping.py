"""Early stopping: the same decisions as Ray Tune's schedulers, a rule for each group, what is no number included."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule
from tiny_sweeps import make_conductor, make_sweep, run

from tune.decide.log import Trial
from tune.decide.stopping import Halving, HyperBand, Median, Rule, decision_epochs

KD = "objective.vit.kd"


def decisions(rule: Rule, seed: int, trials: int = 20, epochs: int = 27) -> dict[str, int]:
    """{trial: the epoch after which it was stopped} when trials with random scores take turns."""
    generator = random.Random(seed)
    level = {f"t{n}": generator.uniform(0, 100) for n in range(trials)}
    at = dict.fromkeys(level, 0)
    stopped: dict[str, int] = {}
    while left := [name for name in level if name not in stopped and at[name] < epochs]:
        name = generator.choice(left)
        at[name] += 1
        score = round(level[name] + generator.gauss(0, 10), -1)  # some are equal
        if rule.result(name, at[name], score):
            stopped[name] = at[name]
    return stopped


class Theirs:
    """One of Ray Tune's schedulers, asked as ours are."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler, self._trials = scheduler, {}

    def result(self, name: str, epoch: int, score: float) -> bool:
        if name not in self._trials:
            self._trials[name] = Named(name)
            self._scheduler.on_trial_add(None, self._trials[name])
        result = {"epoch": epoch, "value": score}
        return bool(self._scheduler.on_trial_result(Idle(), self._trials[name], result) == "STOP")


class Named:
    """A trial, as a scheduler sees it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name


class Idle:
    """A Tune in which no trial waits."""

    def get_live_trials(self) -> list[Any]:
        return []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("grace", "reduction"), [(1, 3), (2, 2), (3, 4), (1, 1.5)])
def test_halving_decides_as_tunes_asha(seed: int, grace: int, reduction: float) -> None:
    theirs = AsyncHyperBandScheduler(
        time_attr="epoch",
        metric="value",
        mode="max",
        max_t=27,
        grace_period=grace,
        reduction_factor=reduction,
        stop_last_trials=False,
    )
    found = decisions(Halving(grace, 27, reduction), seed)
    assert found == decisions(Theirs(theirs), seed)
    assert found


@pytest.mark.parametrize("seed", range(5))
def test_the_median_rule_decides_as_tunes(seed: int) -> None:
    theirs = MedianStoppingRule(time_attr="epoch", metric="value", mode="max", grace_period=3, min_samples_required=3)
    found = decisions(Median(3), seed)
    assert found == decisions(Theirs(theirs), seed)
    assert found


def test_hyperband_divides_trials_among_halvings_of_different_grace() -> None:
    band = HyperBand(1, 9, 3)
    for number in range(26):
        band.result(f"t{number:02d}", 1, float(number))
    sizes = Counter(band._members.values())
    assert [sizes[s] for s in range(3)] == [14, 7, 5], "9/3, 3/2 and 1/1 parts"
    assert [[rung for rung, _ in bracket.rungs] for bracket in band.brackets] == [[1, 3, 9], [3, 9], [9]]
    late = next(name for name, bracket in band._members.items() if bracket == 2)
    assert not band.result(late, 3, -1.0), "its bracket compares at nine epochs"
    early = next(name for name, bracket in band._members.items() if bracket == 0)
    band.result("better", 3, 5.0)
    assert band.result(early, 3, -1.0)


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
@pytest.mark.parametrize("cut", [9, 30, 61])
def test_every_rule_is_replayed_from_the_log(tmp_path: Path, name: str, cut: int) -> None:
    content = {
        "space": {"data.fraction": {"grid": [0.05, 0.5]}, KD: {"grid": list(range(1, 9))}},
        "scheduler": {"name": name, "reduction": 2},
        "set": {"schedule.epochs": 9},
    }

    def value(trial: Trial, epoch: int) -> float:
        return random.Random(f"{trial.spec.id} {epoch}").uniform(0, 100)

    whole = make_conductor(make_sweep(tmp_path, **content))
    run(whole, value, epochs=9, at_once=4)
    assert "stopped" in {t.status for t in whole.trials.values()}
    log = make_sweep(tmp_path, **content).folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    replayed = {}
    for end in (cut, len(lines)):
        log.write_text("".join(lines[:end]))
        replayed[end] = make_conductor(make_sweep(tmp_path, **content))
    stopper = replayed[len(lines)]._stopper
    assert {key: vars_of(rule) for key, rule in stopper._groups.items()} == {
        key: vars_of(rule) for key, rule in whole._stopper._groups.items()
    }
    assert len(stopper._groups) == 2


def vars_of(rule: Any) -> Any:
    """Everything that a rule remembers."""
    if isinstance(rule, HyperBand):
        return rule._members, [bracket.rungs for bracket in rule.brackets]
    return rule.rungs if isinstance(rule, Halving) else rule._scores


def test_what_is_no_number_is_the_worst_and_never_wins(tmp_path: Path) -> None:
    """A diverged trial is stopped at its first comparison; one that reaches its end wins nothing."""
    from tune.decide.winners import winners

    content = {"space": {KD: {"grid": [1, 2, 3]}}, "scheduler": {"name": "asha", "reduction": 2}}
    sweep = make_sweep(tmp_path, **content)
    conductor = make_conductor(sweep)
    bad = {2: float("nan"), 3: float("inf")}
    run(conductor, lambda t, e: bad.get(t.spec.overrides[KD], 10.0 + e))
    assert [t.status for t in conductor.trials.values()] == ["finished", "stopped", "stopped"]
    alone = make_sweep(tmp_path, name="alone", space={KD: {"grid": [2]}})
    conductor = make_conductor(alone)
    run(conductor, lambda t, e: float("nan"))
    assert [t.status for t in conductor.trials.values()] == ["finished"]
    assert winners(alone, conductor.trials) == {}


def test_a_smaller_loss_wins(tmp_path: Path) -> None:
    from tune.decide.winners import winners

    sweep = make_sweep(tmp_path, space={KD: {"grid": [1, 2, 3]}}, select={"metric": "held_out.vit.loss"})
    conductor = make_conductor(sweep)
    run(conductor, lambda t, e: abs(t.spec.overrides[KD] - 2) + 0.5)
    (best,) = winners(sweep, conductor.trials).values()
    assert (best.trials[0].spec.overrides, best.mean) == ({KD: 2}, 0.5)


@pytest.mark.parametrize(
    ("scheduler", "every", "expected"),
    [
        ({"name": "asha", "grace_epochs": 2, "reduction": 3}, 2, [2, 6, 18]),
        ({"name": "asha", "grace_epochs": 2, "reduction": 1.5}, 2, [2, 4, 6, 8, 12, 16]),
        ({"name": "median", "grace_epochs": 8}, 4, [8, 12, 16]),
        ({"name": "none"}, 1, []),
    ],
)
def test_the_epochs_of_decisions(tmp_path: Path, scheduler: dict[str, Any], every: int, expected: list[int]) -> None:
    sweep = make_sweep(tmp_path, space={KD: {"grid": [1]}}, scheduler=scheduler)
    assert decision_epochs(sweep, 20, every) == expected
