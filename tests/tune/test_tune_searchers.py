"""Ray Tune's searchers: replayed after a crash, or refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import Clock, make_sweep, run

from bootvit.errors import RunFailed, UserError
from tune.decide.budget import Budget
from tune.decide.conductor import Conductor
from tune.decide.log import Log
from tune.decide.search import make_source
from tune.decide.stopping import Stopper
from tune.run.tune_searchers import check_searcher, searcher_of
from tune.spec.schema import Sweep

KD = "objective.vit.kd"
OPTUNAS = "ray.tune.search.optuna:OptunaSearch"  # Tune's own, not ours
CONTENT: dict[str, Any] = {
    "space": {
        "data.fraction": {"grid": [0.05, 0.5]},
        KD: {"loguniform": [0.01, 10]},
        "schedule.epochs": {"randint": [2, 4]},
        "optim.name": {"choice": ["adamw", "sgd"]},
    },
    "search": {"algorithm": OPTUNAS, "samples": 12, "seed": 1},
}


def conduct(sweep: Sweep) -> Conductor:
    """A conductor as the driver makes it."""
    source = make_source(sweep, searcher_of(sweep))
    log, budget = Log(sweep.folder / "events.jsonl"), Budget(sweep.file.budget, 0)
    return Conductor(sweep, log, source, Stopper(sweep, 9), budget, clock=Clock())


def near_two(trial: Any, epoch: int) -> float:
    return -abs(float(trial.overrides[KD]) - 2)


@pytest.mark.parametrize("cut", [5, 40])
def test_after_a_kill_a_searcher_suggests_what_it_would_have(tmp_path: Path, cut: int) -> None:
    sweep = make_sweep(tmp_path, **CONTENT)
    check_searcher(sweep)
    whole = conduct(sweep)
    run(whole, near_two, epochs=1)
    settings = [trial.spec.overrides for trial in whole.trials.values()]
    assert len(settings) == 24
    assert min(abs(setting[KD] - 2) for setting in settings) < 0.7
    assert all(setting["schedule.epochs"] in (2, 3, 4) for setting in settings)
    log = sweep.folder / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:cut]))
    resumed = conduct(sweep)
    run(resumed, near_two, epochs=1)
    assert [trial.spec.overrides for trial in resumed.trials.values()] == settings


def test_one_that_answers_otherwise_is_one_line(tmp_path: Path) -> None:
    run(conduct(make_sweep(tmp_path, **CONTENT)), near_two, epochs=1)
    other = make_sweep(tmp_path, **{**CONTENT, "search": {**CONTENT["search"], "seed": 2}})
    with pytest.raises(RunFailed, match=r"now suggests .* cannot be replayed"):
        conduct(other)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ("hyperopt", "search.algorithm=hyperopt: AssertionError: HyperOpt must be installed"),
        ("zoopt", "search.algorithm=zoopt: it takes no seed"),
        ("ray.tune.search.optuna:Nothing", "has no attribute 'Nothing'"),
        ("nowhere.at:All", "No module named 'nowhere'"),
        ("pathlib:Path", "it is no ray.tune.search.Searcher"),
        ("optunna", "unknown algorithm 'optunna', did you mean 'optuna'"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Path, algorithm: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_searcher(make_sweep(tmp_path, **{**CONTENT, "search": {"algorithm": algorithm}}))
    assert "\n" not in str(caught.value)
