"""Optuna per cell, rungs of fractions, populations; each the same after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import make_conductor, make_sweep, run

from bootvit import checkpoint
from bootvit.load import load_config
from bootvit.runs import RunFolder, claim
from tune.decide.log import Trial
from tune.decide.population import exchange, mutate
from tune.decide.select import WORST, Told, summary
from tune.run.copying import copy_member
from tune.spec.schema import Sweep
from tune.spec.space import Spec, trial_config

KD = "objective.vit.kd"
OPTUNA: dict[str, Any] = {
    "space": {"data.fraction": {"grid": [0.05, 0.5]}, KD: {"loguniform": [0.01, 10]}},
    "search": {"algorithm": "optuna", "samples": 14, "seed": 1},
}


def near_two(trial: Trial, epoch: int) -> float:
    """Best at a weight of 2 for small fractions, at 0.05 for large ones."""
    best = 2.0 if trial.spec.overrides.get("data.fraction") == 0.05 else 0.05
    return -abs(trial.overrides[KD] - best)


def by_cell(trials: dict[str, Trial]) -> dict[float, list[float]]:
    """{fraction: weights in the order in which they were suggested}"""
    out: dict[float, list[float]] = {}
    for trial in trials.values():
        out.setdefault(trial.spec.overrides["data.fraction"], []).append(trial.spec.overrides[KD])
    return out


def test_each_cell_has_a_study_of_its_own(tmp_path: Path) -> None:
    conductor = make_conductor(make_sweep(tmp_path, **OPTUNA))
    run(conductor, near_two, epochs=1)
    found = by_cell(conductor.trials)
    assert {cell: len(values) for cell, values in found.items()} == {0.05: 14, 0.5: 14}
    assert min(abs(v - 2) for v in found[0.05]) < 0.7
    assert min(abs(v - 0.05) for v in found[0.5]) < 0.05
    alone = {**OPTUNA, "name": "alone", "space": {**OPTUNA["space"], "data.fraction": {"grid": [0.05]}}}
    separate = make_conductor(make_sweep(tmp_path, **alone))
    run(separate, near_two, epochs=1)
    assert by_cell(separate.trials)[0.05] == found[0.05]


@pytest.mark.parametrize("sampler", ["tpe", "qmc", "gp"])
@pytest.mark.parametrize("cut", [5, 31])
def test_after_a_kill_optuna_suggests_what_it_would_have(tmp_path: Path, sampler: str, cut: int) -> None:
    content = {**OPTUNA, "search": {**OPTUNA["search"], "sampler": sampler, "samples": 12}}
    sweep = make_sweep(tmp_path, **content)
    whole = make_conductor(sweep)
    run(whole, near_two, epochs=1)
    log = sweep.folder / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:cut]))
    resumed = make_conductor(sweep)
    run(resumed, near_two, epochs=1)
    assert by_cell(resumed.trials) == by_cell(whole.trials)


@pytest.mark.parametrize("at", [0, 11])
def test_under_another_version_of_optuna_a_new_study_has_the_trials_that_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    """From one suggestion on the log has another than Optuna makes now: the sweep goes on, with what it has learnt."""
    sweep = make_sweep(tmp_path, **OPTUNA)
    run(make_conductor(sweep), near_two, epochs=1)
    log = sweep.folder / "events.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()[:70]]
    for event in [event for event in events if event["event"] == "new"][at : at + 2]:  # one of each study
        event["setting"][KD] = event["trials"][0]["overrides"][KD] = 7.0 + at / 10
    log.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    resumed = make_conductor(sweep)
    known = dict(by_cell(resumed.trials))
    studies = resumed._source._studies
    ended = [t for t in resumed.trials.values() if t.status == "finished"]
    assert sum(len(study._study.trials) for study in studies) == len(ended) > 15
    assert {trial.value for study in studies for trial in study._study.trials} == {t.value for t in ended}
    run(resumed, near_two, epochs=1)
    found = by_cell(resumed.trials)
    assert {cell: len(values) for cell, values in found.items()} == {0.05: 14, 0.5: 14}
    assert all(found[cell][: len(values)] == values for cell, values in known.items())
    assert capsys.readouterr().out.count("a new study has those that ended") == 2


def test_optuna_learns_from_seeds_that_were_stopped(tmp_path: Path) -> None:
    """One seed finished, one was stopped: the setting's value is the mean of both; NaN is the worst that was seen."""
    trials = [
        Trial(Spec(str(n), "all", n, {KD: 1.0}), status=s, values={2: v}, epochs=2)
        for n, (s, v) in enumerate([("finished", 80.0), ("stopped", 20.0)])
    ]
    assert summary("x", trials, worst=None) == Told("x", 50.0, None)
    assert summary("x", trials[1:], worst=None) == Told("x", 20.0, 2)
    trials[0].values = {2: -WORST}
    assert summary("x", trials, worst=10.0) == Told("x", 15.0, None)
    assert summary("x", trials[:1], worst=None) == Told("x", None, None)


def test_optuna_judges_a_setting_by_all_its_seeds(tmp_path: Path) -> None:
    content = {**OPTUNA, "seeds": [0, 1], "search": {**OPTUNA["search"], "samples": 3}}
    conductor = make_conductor(make_sweep(tmp_path, **content))
    run(conductor, near_two, epochs=1)
    settings = [trial.spec.setting for trial in conductor.trials.values()]
    assert len(settings) == 12
    assert all(settings.count(setting) == 2 for setting in settings)


def test_seeds_in_group_by_have_studies_of_their_own(tmp_path: Path) -> None:
    content = {**OPTUNA, "seeds": [0, 1], "group_by": ["data.fraction", "seed"]}
    conductor = make_conductor(make_sweep(tmp_path, **content, concurrency=1))
    run(conductor, near_two, epochs=1)
    weights = {s: {t.spec.overrides[KD] for t in conductor.trials.values() if t.spec.seed == s} for s in (0, 1)}
    assert not weights[0] & weights[1]


def test_conditions_and_choices_reach_optuna(tmp_path: Path) -> None:
    space = {
        "method": {"choice": ["vit", "joint"]},
        KD: {"uniform": [0.1, 1], "when": {"method": "joint"}},
        "schedule.epochs": {"randint": [2, 4]},
    }
    sweep = make_sweep(tmp_path, space=space, search={"algorithm": "optuna", "samples": 15}, group_by=[])
    conductor = make_conductor(sweep)
    run(conductor, lambda t, e: float(t.spec.overrides["schedule.epochs"]), epochs=1)
    for trial in conductor.trials.values():
        assert (KD in trial.spec.overrides) == (trial.spec.overrides["method"] == "joint")
        assert trial.spec.overrides["schedule.epochs"] in (2, 3, 4)
    settings = [trial.spec.setting for trial in conductor.trials.values()]
    assert len(set(settings)) == len(settings), "equal suggestions are run once"


def test_small_fractions_are_rungs_for_the_largest(tmp_path: Path) -> None:
    space = {
        "data.fraction": {"grid": [0.5, 0.05, 0.1]},
        KD: {"grid": list(range(1, 10))},
        "method": {"grid": ["joint", "shared"]},
    }
    sweep = make_sweep(tmp_path, space=space, fidelity="data.fraction", scheduler={"name": "none", "reduction": 3})
    conductor = make_conductor(sweep)
    run(conductor, lambda t, e: float(t.spec.overrides[KD]), epochs=1, at_once=4)
    for method in ("joint", "shared"):
        weights = {
            f: [
                t.spec.overrides[KD]
                for t in conductor.trials.values()
                if t.spec.overrides["data.fraction"] == f and t.spec.overrides["method"] == method
            ]
            for f in (0.05, 0.1, 0.5)
        }
        assert sorted(weights[0.05]) == list(range(1, 10))
        assert sorted(weights[0.1]) == [7, 8, 9]
        assert weights[0.5] == [9]


def test_rungs_are_the_same_after_a_kill(tmp_path: Path) -> None:
    space = {"data.fraction": {"grid": [0.05, 0.5]}, KD: {"grid": [1, 2, 3, 4]}}
    sweep = make_sweep(tmp_path, space=space, fidelity="data.fraction", seeds=[0, 1])
    whole = make_conductor(sweep)
    run(whole, near_two, epochs=1)
    log = sweep.folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for cut in range(1, len(lines), 4):
        log.write_text("".join(lines[:cut]))
        resumed = make_conductor(sweep)
        run(resumed, near_two, epochs=1)
        assert list(resumed.trials) == list(whole.trials)


# ---------------------------------------------------------------------------------------------- populations

PBT: dict[str, Any] = {
    "space": {KD: {"loguniform": [0.1, 10]}},
    "search": {"algorithm": "pbt", "samples": 4, "interval": 2, "quantile": 0.25},
}


def test_losers_copy_winners_and_change_what_they_copied(tmp_path: Path) -> None:
    copies: list[tuple[str, str, int]] = []
    conductor = make_conductor(
        make_sweep(tmp_path, **PBT), on_copy=lambda m, d, e: copies.append((m.spec.id, d.spec.id, e))
    )
    run(conductor, lambda t, e: t.overrides[KD], epochs=6, at_once=2)
    assert [epoch for *_, epoch in copies] == [2, 4]
    assert all(trial.status == "finished" for trial in conductor.trials.values())
    member = conductor.trials[copies[0][0]]
    donor = conductor.trials[copies[0][1]]
    assert member.changes[0]["overrides"][KD] != member.spec.overrides[KD]
    assert 0.1 <= member.overrides[KD] <= 10
    assert donor.spec.overrides[KD] == max(t.spec.overrides[KD] for t in conductor.trials.values())


@pytest.mark.parametrize("at_once", [1, 3])
def test_populations_are_the_same_after_a_kill(tmp_path: Path, at_once: int) -> None:
    sweep = make_sweep(tmp_path, **PBT, seeds=[0, 1])
    whole = make_conductor(sweep)
    run(whole, lambda t, e: t.overrides[KD], epochs=6, at_once=at_once)
    log = sweep.folder / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for cut in range(2, len(lines), 7):
        log.write_text("".join(lines[:cut]))
        resumed = make_conductor(sweep)
        run(resumed, lambda t, e: t.overrides[KD], epochs=6, at_once=at_once)
        assert [t.changes for t in resumed.trials.values()] == [t.changes for t in whole.trials.values()]


def test_a_mutation_stays_in_its_domain(tmp_path: Path) -> None:
    domain = make_sweep(tmp_path, **PBT).file.space[KD][0]
    assert (mutate(9.0, domain, 0.0), mutate(0.11, domain, 0.9)) == (10, 0.1)
    choice = make_sweep(tmp_path, space={KD: {"choice": [1, 2, 4]}}).file.space[KD][0]
    assert (mutate(2, choice, 0.0), mutate(2, choice, 0.9), mutate(4, choice, 0.0)) == (4, 1, 4)


def test_a_copy_is_done_once(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, **PBT)
    member, donor = (trial_config(sweep, {KD: value}, 0, name) for value, name in ((0.1, "member"), (5.0, "donor")))
    for config, text in ((member, "old"), (donor, "good")):
        folder, _ = claim(config, resume=True, overwrite=False)
        checkpoint.write(folder.checkpoints, checkpoint.pack({"text": text}), epoch=2, step=10, final=False)
    changed = trial_config(sweep, {KD: 6.0}, 0, "member")
    copy_member(member.run_dir, donor.run_dir, changed, 2)
    saved = checkpoint.newest(RunFolder(member.run_dir).checkpoints)
    assert saved is not None
    assert checkpoint.load(saved) == {"text": "good"}
    assert load_config(str(member.run_dir / "config.yaml")).objective.vit.kd == 6.0
    checkpoint.write(
        RunFolder(member.run_dir).checkpoints, checkpoint.pack({"text": "further"}), epoch=3, step=15, final=False
    )
    copy_member(member.run_dir, donor.run_dir, changed, 2)
    after = checkpoint.newest(RunFolder(member.run_dir).checkpoints)
    assert after is not None
    assert checkpoint.load(after) == {"text": "further"}


@pytest.mark.parametrize("at", ["rmtree", "copyfile", "rename"])
def test_a_copy_that_was_cut_in_the_middle_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A driver that dies at any step of it leaves something that the next one completes."""
    sweep = make_sweep(tmp_path, **PBT)
    member, donor = (trial_config(sweep, {KD: value}, 0, name) for value, name in ((0.1, "member"), (5.0, "donor")))
    for config, text in ((member, "old"), (donor, "good")):
        folder, _ = claim(config, resume=True, overwrite=False)
        checkpoint.write(folder.checkpoints, checkpoint.pack({"text": text}), epoch=2, step=10, final=False)
    changed = trial_config(sweep, {KD: 6.0}, 0, "member")
    whole = {"rmtree": (shutil, "rmtree"), "copyfile": (shutil, "copyfile"), "rename": (Path, "rename")}
    place, name = whole[at]
    done = getattr(place, name)

    def cut(*arguments: Any, **more: Any) -> None:
        if at == "rmtree" and more.get("ignore_errors"):
            return
        if at == "rmtree":
            done(*arguments, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, cut)
        with pytest.raises(KeyboardInterrupt):
            copy_member(member.run_dir, donor.run_dir, changed, 2)
    copy_member(member.run_dir, donor.run_dir, changed, 2)
    saved = checkpoint.newest(RunFolder(member.run_dir).checkpoints)
    assert saved is not None
    assert checkpoint.load(saved) == {"text": "good"}
    assert load_config(str(member.run_dir / "config.yaml")).objective.vit.kd == 6.0


def test_only_values_of_this_round_are_compared(tmp_path: Path) -> None:
    """A member whose best value is from an earlier round, and that has none in this one, is the worst."""
    sweep = make_sweep(tmp_path, **{**PBT, "set": {"schedule.epochs": 8}})
    members = [
        Trial(Spec(f"m{n}", "all", 0, {KD: 1.0 + n}), epochs=4, values=values)
        for n, values in enumerate([{2: 99.0}, {3: 5.0}, {4: 6.0}, {4: -WORST}])
    ]
    (change,) = exchange(sweep, members, 4)
    assert change["id"] in ("m0", "m3")
    assert change["donor"] == "m2"
    for member in members[3:]:
        member.values = {4: 1.0}
    assert exchange(sweep, members, 4)[0]["id"] == "m0"


def test_a_copied_member_may_be_resumed_under_its_new_weights(tmp_path: Path) -> None:
    sweep: Sweep = make_sweep(tmp_path, **PBT)
    config = trial_config(sweep, {KD: 0.1}, 0, "member")
    folder, _ = claim(config, resume=True, overwrite=False)
    checkpoint.write(folder.checkpoints, checkpoint.pack({}), epoch=2, step=10, final=False)
    changed = trial_config(sweep, {KD: 0.2}, 0, "member")
    donor, _ = claim(trial_config(sweep, {KD: 1.0}, 0, "donor"), resume=True, overwrite=False)
    checkpoint.write(donor.checkpoints, checkpoint.pack({}), epoch=2, step=10, final=False)
    copy_member(config.run_dir, donor.path, changed, 2)
    assert claim(changed, resume=True, overwrite=False)[1] == "unfinished"
