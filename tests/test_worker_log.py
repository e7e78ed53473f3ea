"""What workers say is kept beside the run, by attempt and rank, and is found again without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ONE, TINY, write

from bootvit.__main__ import main
from bootvit.config import dump_config
from bootvit.errors import RunFailed, UserError
from bootvit.learner import World
from bootvit.load import make_config
from bootvit.runs import RunFolder
from bootvit.worker_log import read_logs, worker_log


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder, as the driver leaves it."""
    write(tmp_path / "runs" / "tiny" / "config.yaml", dump_config(make_config(TINY, "tiny")))
    return RunFolder(tmp_path / "runs" / "tiny")


def test_what_is_printed_and_the_traceback_are_in_the_log_and_where_they_were(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        print("said")
        print("careful", file=sys.stderr)  # as warnings do
        raise RunFailed("the reason")

    before = sys.stdout, sys.stderr
    with pytest.raises(RunFailed), worker_log(folder, ONE):
        fails()
    assert (sys.stdout, sys.stderr) == before
    shown = capsys.readouterr()
    assert shown.out == "said\n"
    assert "careful" in shown.err
    log = "\n".join(read_logs(folder))
    assert log.startswith("==> logs/attempt-01/rank-0.log <==\n")
    for text in ("began: rank 0 of 1 on ", "\nsaid\n", "\ncareful\n", "in fails\n", ": the reason\n"):
        assert text in log
    assert log.endswith(" failed")


def test_every_attempt_has_its_own(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        with worker_log(folder, ONE):
            print(name)
    assert "second" in "".join(read_logs(folder))
    assert "first" in "".join(read_logs(folder, attempt=1))
    with pytest.raises(UserError, match=r"^--attempt 3: .*tiny has attempt 1, 2$"):
        list(read_logs(folder, attempt=3))
    with pytest.raises(UserError, match=r"^--rank 1: attempt 2 of .*tiny has rank 0$"):
        list(read_logs(folder, rank=1))


def test_a_trial_that_is_stopped_has_not_failed(folder: RunFolder) -> None:
    def run() -> object:
        with worker_log(folder, ONE):
            yield

    trial = run()
    next(trial)  # type: ignore[call-overload]
    trial.close()  # type: ignore[attr-defined]
    assert list(read_logs(folder))[-1].endswith(" stopped")


def test_a_node_that_does_not_see_the_run_says_so_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^ray\.storage_path: node .* does not see .*config\.yaml: give a folder that"):
        worker_log(RunFolder(tmp_path / "run"), ONE).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_all_workers_or_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.path.parent.parent)
    assert main(["logs", "tiny"]) == 2
    assert capsys.readouterr().err.endswith(
        "runs/tiny: no worker has left a log; a run with --local says everything on its terminal\n"
    )
    (folder.path / "logs" / "attempt-04").mkdir(parents=True)
    told: list[int] = []

    def broadcast(number: list[int], src: int) -> None:
        told.extend(number)
        number[0] = told[src]

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    for rank in (0, 1):  # the second is told by the first
        with worker_log(folder, World(rank, 2, torch.device("cpu"))):
            print(f"I am {rank}")
    capsys.readouterr()
    assert main(["logs", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(("==>", "I am"))] == [
        *("==> logs/attempt-05/rank-0.log <==", "I am 0"),
        *("==> logs/attempt-05/rank-1.log <==", "I am 1"),
    ]
    assert main(["logs", "tiny", "--rank", "1"]) == 0
    assert "I am 0" not in capsys.readouterr().out
    assert main(["logs", "nothing"]) == 2
    assert capsys.readouterr().err == "bootvit: error: nothing: no run is there (no config.yaml in it)\n"


def test_a_log_starts_no_ray(folder: RunFolder) -> None:
    ray = pytest.importorskip("ray")
    before = ray.is_initialized()
    with worker_log(folder, ONE):
        print("here")
    assert ray.is_initialized() == before
