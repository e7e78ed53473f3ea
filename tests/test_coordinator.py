"""What a worker under Ray takes for a stop: what it is told, and the death of its driver, but no trouble on the way."""

from __future__ import annotations

from typing import Any

import pytest

from bootvit.asks import Ask

ray = pytest.importorskip("ray")


class Coordinator:
    """An actor's handle."""

    class stopping:
        @staticmethod
        def remote() -> None: ...


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        (True, True),
        (False, False),
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.ActorUnavailableError("cut off", b"0" * 16), False),
        (ray.exceptions.GetTimeoutError("busy"), False),
    ],
    ids=["told", "not told", "driver dead", "cut off", "busy"],
)
def test_what_stops_a_worker(answer: Any, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from bootvit import coordinator

    def get(reference: None, timeout: float) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    assert coordinator.is_stopping(Coordinator) is stops


@pytest.mark.parametrize("again", [100.0, 0.1])
def test_a_notice_that_the_node_goes_away_asks_for_a_checkpoint_now_and_then(
    again: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bootvit import coordinator

    monkeypatch.setattr(coordinator, "EVERY", 0.01)
    monkeypatch.setattr(coordinator, "LEAVING", again)
    monkeypatch.setattr(coordinator, "is_draining", lambda: True)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    watch = coordinator.Watch()
    asks = []
    for _ in range(100):
        watch._end.wait(0.01)
        asks.append(watch.asked())
    watch.close()
    assert asks.count(Ask.SAVE) == 1 if again > 1 else 1 < asks.count(Ask.SAVE) < 50
    assert set(asks) == {Ask.NOTHING, Ask.SAVE}
