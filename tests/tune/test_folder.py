"""What a sweep's folder says when the sweep is started again: finished, or more to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import make_conductor, make_sweep, run

from bootvit.errors import UserError
from tune.decide.log import Trial
from tune.run.folder import check_folder, claim_folder
from tune.spec.schema import Sweep
from tune.tell.record import Recorder

KD = "objective.vit.kd"
CONTENT: dict[str, Any] = {"space": {KD: {"uniform": [0, 1]}}, "search": {"samples": 2, "seed": 1}, "seeds": [0]}


def finish(folder: Path, *, failing: bool = False, reason: str | None = None, **content: Any) -> Sweep:
    """A sweep that has come to its end; with `failing`, its first trial has not."""
    sweep = make_sweep(folder, **{**CONTENT, **content})
    claim_folder(sweep, check_folder(sweep, resume=False, overwrite=False))
    conductor = make_conductor(sweep)
    if failing:
        first = conductor.next()
        assert first is not None
        conductor.crashed(first.spec.id, "no luck")
    run(conductor, lambda trial, epoch: 1.0)
    Recorder(sweep).write(conductor.trials, "finished", 1.0, reason)
    return sweep


def state(folder: Path, retry_failed: bool = False, **content: Any) -> str:
    return check_folder(
        make_sweep(folder, **{**CONTENT, **content}), resume=True, overwrite=False, retry_failed=retry_failed
    )


def test_a_finished_sweep_has_more_to_do_when_more_is_asked_for(tmp_path: Path) -> None:
    """Also when the driver that was told so died at once: it had written the new sweep.yaml, and nothing else."""
    finish(tmp_path)
    assert state(tmp_path) == "finished"
    for more in ({"seeds": [0, 1]}, {"search": {"samples": 3, "seed": 1}}, {"budget": {"trials": 9}}):
        grown = make_sweep(tmp_path, **{**CONTENT, **more})
        assert check_folder(grown, resume=True, overwrite=False) == "unfinished"
        claim_folder(grown, "unfinished")
        assert check_folder(grown, resume=True, overwrite=False) == "unfinished"
        claim_folder(make_sweep(tmp_path, **CONTENT), "unfinished")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1]}, r"seeds=\[1\]: it was started with seeds=\[0\]"),
        ({"search": {"samples": 1, "seed": 1}}, "search.samples=1: it was started with search.samples=2"),
        ({"search": {"samples": 3, "seed": 2}}, "search"),
        ({"test": "retrain"}, "test=retrain"),
    ],
)
def test_what_would_be_another_sweep_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    finish(tmp_path)
    with pytest.raises(UserError, match=words):
        state(tmp_path, **change)


def test_a_population_does_not_grow(tmp_path: Path) -> None:
    pbt = {"search": {"algorithm": "pbt", "samples": 2}, "seeds": [0]}
    finish(tmp_path, **pbt)
    with pytest.raises(UserError, match="samples=3"):
        state(tmp_path, **{**pbt, "search": {"algorithm": "pbt", "samples": 3}})
    with pytest.raises(UserError, match="seeds"):
        state(tmp_path, **{**pbt, "seeds": [0, 1]})


def test_failed_trials_are_more_to_do_only_when_asked_for(tmp_path: Path) -> None:
    finish(tmp_path, failing=True, retries=0)
    assert state(tmp_path, retries=0) == "finished"
    assert state(tmp_path, retry_failed=True, retries=0) == "unfinished"


def test_a_winner_that_could_not_be_tested_is_more_to_do(tmp_path: Path) -> None:
    finish(tmp_path, reason="winner 0000 could not be tested: no luck")
    assert state(tmp_path) == "unfinished"


def test_a_failed_trial_keeps_its_reason(tmp_path: Path) -> None:
    sweep = finish(tmp_path, failing=True, retries=0)
    found: list[Trial] = list(make_conductor(sweep).trials.values())
    assert [(t.status, t.reason) for t in found] == [("failed", "no luck"), ("finished", None)]
