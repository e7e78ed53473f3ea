"""sweep.json: what it says of trials in every state, and that writing it needs no memory of their number."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_sweeps import make_sweep

from bootvit.errors import UserError
from tune.decide.log import Trial
from tune.run.folder import read_state
from tune.spec.space import Spec
from tune.tell.record import Recorder, write


def trials(count: int) -> dict[str, Trial]:
    """Trials that wait, with weights 0, 1, 2 …"""
    specs = [Spec(f"t{n}", "all", 0, {"objective.vit.kd": float(n)}) for n in range(count)]
    return {spec.id: Trial(spec) for spec in specs}


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows as wide as a real one."""
    for number in range(count):
        yield {"id": f"t{number:05d}", "overrides": {"objective.vit.kd": number / 7}, "reason": "x" * 300}


def test_the_file_says_what_became_of_every_trial(tmp_path: Path) -> None:
    sweep = make_sweep(
        tmp_path, space={"objective.vit.kd": {"grid": [0.0, 1.0, 2.0, 3.0]}}, resources={"cpu": 2.0, "gpu": 0.5}
    )
    sweep.folder.mkdir(parents=True)
    known = trials(4)
    known["t0"].status, known["t0"].values, known["t0"].seconds = "finished", {1: 10.0, 3: 30.0}, 2.0
    known["t1"].status, known["t1"].values, known["t1"].seconds = "finished", {3: 20.0}, 1.5
    known["t2"].status, known["t2"].reason = "failed", "loss is nan"
    for name in ("t0", "t1", "t2"):
        known[name].started = True
    recorder = Recorder(sweep)

    recorder.write(known, "running", 4.0)
    running = json.loads((sweep.folder / "sweep.json").read_text())
    assert running["counts"] == {"finished": 2, "failed": 1, "waiting": 1}
    assert [row["status"] for row in running["trials"]] == ["finished", "finished", "failed", "waiting"]

    summary = recorder.write(known, "finished", 5.0)
    text = (sweep.folder / "sweep.json").read_text()
    document = json.loads(text)
    found = document.pop("trials")
    assert document == summary
    assert document["counts"] == {"finished": 2, "failed": 1, "not_run": 1}
    assert document["cost"] == {"seconds": 3.5, "cpu_seconds": 7.0, "gpu_seconds": 1.75}
    assert document["best"]["all"]["trial"] == "t0"
    assert [row["id"] for row in found] == ["t0", "t1", "t2", "t3"]
    assert [row["overrides"]["objective.vit.kd"] for row in found] == [0.0, 1.0, 2.0, 3.0]
    assert [row["reason"] for row in found] == [None, None, "loss is nan", None]
    assert text.count("\n    {") == 4, "a trial a line"


def test_a_sweep_without_trials_is_a_document_too(tmp_path: Path) -> None:
    write(tmp_path, {"name": "s"}, [])
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"name": "s", "trials": []}


def test_a_row_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, {"name": "s"}, [{"id": "a"}])
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, {"name": "s"}, [{"id": "a"}, {"id": "b", "held_out": math.nan}])
    assert (tmp_path / "sweep.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_writing_many_trials_takes_no_more_memory_than_a_few(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        write(tmp_path, {"name": "s"}, rows(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what the first call imports and keeps
    few, many = peak(10), peak(3000)
    assert (tmp_path / "sweep.json").stat().st_size > 1_000_000
    assert many < few + 50_000


@pytest.mark.parametrize("text", ["{}", "[]", '{"status": "finished", "trials": []}'])
def test_a_file_of_another_version_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json: lacks .*'counts'.*remove it, and --resume"):
        read_state(tmp_path)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={"objective.vit.kd": {"grid": [0.0, 1.0]}})
    sweep.folder.mkdir(parents=True)
    summary = Recorder(sweep).write(trials(2), "finished", 1.0)
    state = read_state(sweep.folder)
    assert len(state.pop("trials")) == 2
    assert state == summary
