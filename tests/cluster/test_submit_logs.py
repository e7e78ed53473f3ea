"""Following a job: each line once, Ray's own lines dropped, and what each end means."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from cluster import logs

HEAD = "2026-01-02 03:04:05,678\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
ENTRY = "Running entrypoint for job x: python -m bootvit train\n"


class Client:
    """A cluster whose connection may break: `sends` holds, for each connection, the pieces before it ends."""

    def __init__(self, sends: list[list[str]], ends: list[str], whole: str = "", code: int | None = 0) -> None:
        self.sends, self.ends, self.whole, self.code = sends, ends, whole, code

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        for piece in self.sends.pop(0):
            if piece == "LOST":
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield piece

    def get_job_logs(self, name: str) -> str:
        return self.whole

    def get_job_info(self, name: str) -> SimpleNamespace:
        end = self.ends.pop(0)
        if end == "LOST":
            raise OSError("no answer")
        status = SimpleNamespace(value=end, is_terminal=lambda: end != "RUNNING")
        return SimpleNamespace(status=status, driver_exit_code=self.code, message="what\nhappened")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PAUSE_S", 0)


def followed(client: Client) -> tuple[int, str]:
    taken: list[str] = []
    return logs.follow(client, "x", taken.append), "".join(taken)


def test_rays_own_lines_are_left_out() -> None:
    client = Client([[HEAD + ENTRY[:9], ENTRY[9:] + "epoch 1\n", "epo", "ch 2"]], ["SUCCEEDED"])
    assert followed(client) == (0, "epoch 1\nepoch 2\n")


def test_a_lost_connection_repeats_and_loses_nothing() -> None:
    sends = [[HEAD, "a\nb", "LOST"], ["LOST"], [HEAD + "a\n", "b\nc\n", "LOST"], [HEAD, "a\nb\nc\nd\n"]]
    client = Client(sends, ["RUNNING", "LOST", "RUNNING", "SUCCEEDED"])
    assert followed(client) == (0, "a\nb\nc\nd\n")


def test_the_end_of_a_log_is_fetched_when_its_connection_was_lost() -> None:
    assert followed(Client([["a\n", "LOST"]], ["SUCCEEDED"], whole="a\nb\n")) == (0, "a\nb\n")


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOST_S", -1)
    with pytest.raises(OSError, match="no answer"):
        followed(Client([["a\n", "LOST"]], ["LOST"]))


@pytest.mark.parametrize(
    ("end", "code", "status", "line"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, "bootvit: error: x failed: exit status 2\n"),
        ("FAILED", 137, 1, "bootvit: error: x failed: exit status 137\n"),
        ("FAILED", None, 1, "bootvit: error: x failed: what happened\n"),
        ("STOPPED", None, 1, "bootvit: error: x was stopped before its end\n"),
        ("STOPPED", 0, 1, "bootvit: error: x was stopped before its end\n"),
    ],
)
def test_the_jobs_end_is_the_commands_end(
    end: str, code: int | None, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert followed(Client([[]], [end], code=code))[0] == status
    assert capsys.readouterr().err == line
